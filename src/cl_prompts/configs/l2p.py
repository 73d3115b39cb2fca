"""The configs of L2P and of L2P with prefixes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.configs.base import INITS, LAYER_INITS, PromptPoolConfig
from cl_prompts.configs.checks import check_layers, check_top_k, choice, flag, not_negative, positive, splits_in_two
from cl_prompts.configs.prefix import QueriedPrefixConfig


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


@dataclass
class L2PPrefixConfig(QueriedPrefixConfig):
    """L2P with key/value prefixes: "L2P++" (block 0) and "Deep L2P++" (blocks 0-4) of CODA-Prompt's tables.

    Smith et al., "CODA-Prompt", CVPR 2023. Defaults are those of its released scripts, except that an image's key loss sees
    its own choice only.

    Args:
        pool_size: number of prompts M of a layer.
        prompt_length: rows of one prompt; the first half are keys, the second half values.
        top_k: prompts per image K.
        layers: blocks that get prefixes, from 0; each has its own pool. Deep: [0, 1, 2, 3, 4].
        prompt_init: as in `L2PConfig`; "unit_uniform" in the released code. On held-out images of a short run with ViT-Tiny
            "normal" was better (57.5 against 54.0, docs/results.md).
        key_init: as in `L2PConfig`; "unit_uniform" in the released code.
        pull_coefficient: lambda, weight of the key loss.
        key_loss: "distance" lambda * (1 - cosine) over the image's chosen keys, added up over layers and batch. "coupled":
            as released, where an index slip pulls every image to the chosen keys of all images of the batch.
            "similarity": -lambda * cosine, mean over images, as in L2P.
    """

    method: str = "l2p_prefix"
    pool_size: int = 30
    prompt_length: int = 20
    top_k: int = 5
    layers: list[int] = field(default_factory=lambda: [0])
    prompt_init: str = "unit_uniform"
    key_init: str = "unit_uniform"
    pull_coefficient: float = 1.0
    key_loss: str = "distance"

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2211.13218", "https://arxiv.org/abs/2112.08654")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "prompt_length", "top_k")
        splits_in_two(self, "prompt_length")
        check_top_k(self)
        check_layers(self)
        choice(self, "prompt_init", LAYER_INITS)
        choice(self, "key_init", INITS)
        choice(self, "key_loss", ("distance", "coupled", "similarity"))
        not_negative(self, "pull_coefficient")
