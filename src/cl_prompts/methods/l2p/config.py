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
        key_width: width W of keys and of the query's trained projection W_q [D, W]; None: no projection, keys of width D.
            The pull term trains it, as keys.
        pull_coefficient: lambda, weight of the pull term.
        key_loss: the pull term, summed over the selected keys: "similarity" -lambda * cosine of query and key (eq. 5), or
            "squared_distance" lambda * |query - key|^2 of the vectors as they are. Both are means over images.
        diversified_selection: in training, multiply distances by the frequency of a prompt in earlier tasks (eq. 4).
        batchwise_selection: select the same prompts for the whole batch by majority vote, in training and at test, as in
            the released code. Answers then depend on the batch. Only for comparison with published figures.
        ensemble: at test, average the class probabilities of this many passes. The n-th has the prompts of rank (n - 1) K
            + 1 to n K, so with top_k=1 the answers with the nearest, the second nearest, ... prompt are averaged. 1 is the
            paper. Ours.
        num_pools: number of pools of `pool_size` prompts and keys, drawn independently; each selects `top_k`. 1 is the
            paper. Ours.
        pool_average: what is averaged over several pools: "answers" (class probabilities, in training and at test, a pass
            for each pool) or "prompts" (the prompts of equal rank, one pass). Ours.
        grow_by: prompts that each task after the first adds to the pool; `pool_size` is then its size in the first task.
            0: the size is fixed, as it is without tasks (`num_labels`). Two to three are usual. Ours.
        max_size: size at which the pool stops to grow; None: it grows with every task. Ours.
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
    key_width: int | None = None
    pull_coefficient: float = 0.1
    key_loss: str = "similarity"
    diversified_selection: bool = False
    batchwise_selection: bool = False
    ensemble: int = 1
    num_pools: int = 1
    pool_average: str = "answers"
    grow_by: int = 0
    max_size: int | None = None
    position: str = "after_cls"
    add_cls_position_embedding: bool | None = None

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2112.08654",)
    retired_fields: ClassVar[tuple[str, ...]] = ("search",)  # which library found the nearest keys, always exactly

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "prompt_length", "top_k", "ensemble", "num_pools")
        choice(self, "prompt_init", INITS)
        choice(self, "key_init", INITS)
        choice(self, "key_type", ("learned", "prompt_mean", "none"))
        choice(self, "position", ("after_cls", "front"))
        not_negative(self, "pull_coefficient")
        flag(self, "diversified_selection", "batchwise_selection")
        if self.add_cls_position_embedding is not None:
            flag(self, "add_cls_position_embedding")
        check_top_k(self)
        self._check_variants()
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

    def _check_variants(self) -> None:
        choice(self, "key_loss", ("similarity", "squared_distance"))
        choice(self, "pool_average", ("answers", "prompts"))
        not_negative(self, "grow_by")
        if type(self.grow_by) is not int:
            raise ValueError(f"grow_by={self.grow_by!r} must be a whole number of prompts, like 2")
        for name in ("key_width", "max_size"):
            if getattr(self, name) is not None:
                positive(self, name)
        if self.key_type != "learned" and self.key_width is not None:
            raise ValueError(f'key_width={self.key_width} is of learned keys: set key_type="learned", or leave it at None')
        if self.key_width is not None and self.alignment_weight:
            raise ValueError(
                f"alignment_weight={self.alignment_weight} compares keys with prompt tokens, which have another width than "
                f"key_width={self.key_width}: leave one of them out"
            )
        if self.ensemble * self.top_k > self.pool_size:
            raise ValueError(
                f"ensemble={self.ensemble} passes of top_k={self.top_k} prompts need more than pool_size={self.pool_size}: "
                "choose fewer passes"
            )
        if self.key_type == "none" and self.num_pools > 1:
            raise ValueError(f'num_pools={self.num_pools}: key_type="none" selects nothing; leave it at 1')
        if self.pool_average != "answers" and self.num_pools == 1:
            raise ValueError(
                f'pool_average={self.pool_average!r} is for several pools: set num_pools, or leave it at "answers"'
            )
        if not self.grow_by:
            if self.max_size is not None:
                raise ValueError(f"max_size={self.max_size} limits a pool that grows: set grow_by, for example to 2")
        elif self.num_pools > 1 or self.key_type == "none":
            raise ValueError(
                f"grow_by={self.grow_by} is for one pool that selects: set num_pools=1 and another key_type, or grow_by=0"
            )
        elif self.max_size is not None and self.max_size < self.pool_size:
            raise ValueError(
                f"max_size={self.max_size} is smaller than pool_size={self.pool_size}, with which the pool starts: choose "
                "at least that"
            )
