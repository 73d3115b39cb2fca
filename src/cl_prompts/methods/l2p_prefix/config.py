"""The config of L2P with key/value prefixes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.methods.config import INITS, LAYER_INITS
from cl_prompts.methods.shared.field_checks import (
    check_layers,
    check_top_k,
    choice,
    flag,
    not_negative,
    positive,
    splits_in_two,
)
from cl_prompts.methods.shared.prefix_config import QueriedPrefixConfig


@dataclass
class L2PPrefixConfig(QueriedPrefixConfig):
    """L2P with key/value prefixes: "L2P++" (block 0) and "Deep L2P++" (blocks 0-4) of CODA-Prompt's tables.

    Smith et al., "CODA-Prompt", CVPR 2023. Defaults are those of its released scripts, except that the key loss of an image
    depends on its own selection only.

    Args:
        pool_size: number of prompts M of a layer.
        prompt_length: rows of one prompt; the first half is keys, the second half is values (see `as_tokens`).
        top_k: prompts per image K.
        layers: blocks that get prefixes, from 0; each has its own pool. Deep: [0, 1, 2, 3, 4].
        prompt_init: as in `L2PConfig`; "unit_uniform" in the released code. In a short run with ViT-Tiny, "normal" was
            better on held-out images (57.5 against 54.0, docs/results.md).
        key_init: as in `L2PConfig`; "unit_uniform" in the released code.
        pull_coefficient: lambda, weight of the key loss.
        key_loss: "distance": lambda * (1 - cosine) of the image's selected keys, summed over layers and batch. "coupled":
            as in the released code, whose indexing error uses the keys selected by all images of the batch for every image.
            "similarity": -lambda * cosine, mean over images, as in L2P.
        as_tokens: prompts are tokens of their block instead: every row passes the block's norm and its key and value
            projections, and its output is dropped, as in deep visual prompt tuning. With one_stage=True and
            layer_query="mean" a layer's tokens are selected by the averaged tokens of its input. Ours.
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
    as_tokens: bool = False

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2211.13218", "https://arxiv.org/abs/2112.08654")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "prompt_length", "top_k")
        flag(self, "as_tokens")
        if not self.as_tokens:
            splits_in_two(self, "prompt_length")
        elif self.prefix_space != "projected":
            raise ValueError(
                f'prefix_space={self.prefix_space!r} is for prefixes: leave it at "projected" with as_tokens=True'
            )
        check_top_k(self)
        check_layers(self)
        choice(self, "prompt_init", LAYER_INITS)
        choice(self, "key_init", INITS)
        choice(self, "key_loss", ("distance", "coupled", "similarity"))
        not_negative(self, "pull_coefficient")
