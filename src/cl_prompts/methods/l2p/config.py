"""The config of L2P."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import INITS, PromptPoolConfig
from cl_prompts.methods.shared.field_checks import (
    check_top_k,
    choice,
    flag,
    not_negative,
    positive,
)


@dataclass
class L2PConfig(PromptPoolConfig):
    """L2P: prompts of a shared pool, selected by the distance of their keys to the query, in front of the patches.

    Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022. Defaults are those of the released PyTorch code
    (JH-LEE-KR/l2p-pytorch), except that prompts are selected per image. The paper's text has pull_coefficient 0.5. A pool
    of more than 4,096 prompts is searched in chunks, exactly, and the output then has no `scores`.

    Args:
        pool_size: number of prompts M.
        prompt_length: tokens Lp of one prompt.
        top_k: prompts per image K (N in the paper).
        prompt_init: "uniform" U(-1, 1) (released PyTorch code), "unit_uniform" U[0, 1), "small_uniform" U[0, 0.01)
            (released JAX code), "normal" (std 0.02) or "zeros".
        key_init: as `prompt_init`.
        key_type: "learned"; "prompt_mean", the mean token of a prompt is its key (ablation "w/o key"); or "none", every
            image gets every prompt, without a query (with pool_size=1: ablation "w/o pool", a single prompt).
        pull_coefficient: lambda, weight of the cosine between query and selected keys (eq. 5).
        diversified_selection: in training, multiply distances by the frequency of a prompt in earlier tasks (eq. 4).
        batchwise_selection: select the same prompts for the whole batch by majority vote, in training and at test, as in
            the released code. Answers then depend on the batch. Only for comparison with published figures.
        position: "after_cls" [CLS, prompts, patches] (first release, PyTorch code) or "front" [prompts, CLS, patches].
        add_cls_position_embedding: add CLS's position embedding to each prompt token (first release, PyTorch code).
            None: add it if the backbone has one.
    """

    method: str = "l2p"
    readout: str = "prompt"
    pool_size: int = 10
    prompt_length: int = 5
    top_k: int = 5
    prompt_init: str = "uniform"
    key_init: str = "uniform"
    key_type: str = "learned"
    pull_coefficient: float = 0.1
    diversified_selection: bool = False
    batchwise_selection: bool = False
    position: str = "after_cls"
    add_cls_position_embedding: bool | None = None

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2112.08654",)
    retired_fields: ClassVar[tuple[str, ...]] = ("search",)  # which library found the nearest keys, always exactly

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "prompt_length", "top_k")
        choice(self, "prompt_init", INITS)
        choice(self, "key_init", INITS)
        choice(self, "key_type", ("learned", "prompt_mean", "none"))
        choice(self, "position", ("after_cls", "front"))
        not_negative(self, "pull_coefficient")
        flag(self, "diversified_selection", "batchwise_selection")
        if self.add_cls_position_embedding is not None:
            flag(self, "add_cls_position_embedding")
        check_top_k(self)
        if self.alignment_weight and self.key_type != "learned":
            raise ValueError(f'alignment_weight={self.alignment_weight} needs learned keys: set key_type="learned"')
        if self.key_type == "none":
            if self.entropy_weight:
                raise ValueError(f'entropy_weight={self.entropy_weight}: key_type="none" selects nothing; leave it at 0')
            if self.top_k != self.pool_size:
                raise ValueError(
                    f'key_type="none" uses every prompt: set top_k={self.pool_size} (the pool_size), not {self.top_k}'
                )
            if self.diversified_selection or self.batchwise_selection:
                raise ValueError(
                    'key_type="none" selects nothing: set diversified_selection and batchwise_selection to False'
                )
        if self.batchwise_selection:
            warnings.warn(
                "batchwise_selection=True selects prompts by a vote of the batch: an image's answer then depends on what "
                "else is in its batch, and test batches of one task leak the task",
                stacklevel=2,
            )
