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
    """L2P: the prompts of a shared pool whose keys are nearest to the image's query go in front of its patches.

    Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022. Defaults are those of the released PyTorch code
    (JH-LEE-KR/l2p-pytorch), except that the choice is made per image; the paper's text has pull_coefficient 0.5.

    Args:
        pool_size: number of prompts M.
        prompt_length: tokens of one prompt Lp.
        top_k: prompts per image N (paper) or K.
        prompt_init: "uniform" U(-1, 1) (released PyTorch code), "unit_uniform" U[0, 1), "small_uniform" U[0, 0.01)
            (released JAX code), "normal" (std 0.02) or "zeros".
        key_init: likewise.
        key_type: "learned" keys; "prompt_mean" takes a prompt's mean token as its key (ablation "w/o key"); "none" uses
            every prompt for every image, without a query (with pool_size=1: ablation "w/o pool", a single prompt).
        pull_coefficient: lambda, weight of the cosine between query and chosen keys (eq. 5).
        diversified_selection: in training, weigh distances by how often a prompt was chosen in earlier tasks (eq. 4).
        batchwise_selection: one set of prompts for the whole batch by majority vote, in training and at test, as in the
            released code. Answers then depend on the batch; only for comparison with published figures.
        position: "after_cls" [CLS, prompts, patches] (first release, PyTorch code) or "front" [prompts, CLS, patches].
        add_cls_position_embedding: add CLS's position embedding to each prompt token (first release, PyTorch code).
            None: do so where the backbone has one.
        search: what finds the nearest keys, exactly in both cases: "torch" (in pools of more than 4,096 prompts chunk by
            chunk, in memory that does not grow with the pool; the output then has no `scores`) or "faiss" (`pip install
            faiss-cpu`; on the CPU, never with `scores`). Ours.
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
    search: str = "torch"

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2112.08654",)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "prompt_length", "top_k")
        choice(self, "prompt_init", INITS)
        choice(self, "key_init", INITS)
        choice(self, "key_type", ("learned", "prompt_mean", "none"))
        choice(self, "position", ("after_cls", "front"))
        choice(self, "search", ("torch", "faiss"))
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
                raise ValueError('key_type="none" chooses nothing: leave diversified and batchwise selection off')
        if self.search == "faiss" and (self.diversified_selection or self.entropy_weight or self.key_type == "none"):
            raise ValueError(
                'search="faiss" finds the nearest keys and nothing else: set search="torch" with diversified_selection, '
                'entropy_weight or key_type="none"'
            )
        if self.batchwise_selection:
            warnings.warn(
                "batchwise_selection=True lets the images of a batch vote on their prompts: an image's answer then "
                "depends on what else is in its batch, and test batches of one task leak the task",
                stacklevel=2,
            )
