"""The config of APT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import LAYER_INITS, PromptPoolConfig
from cl_prompts.methods.shared.field_checks import check_layers, choice, no_prompt_readout, share


@dataclass
class APTConfig(PromptPoolConfig):
    """APT: vectors that are added to key and value of the CLS token, averaged over tasks.

    Chen et al., "Achieving More with Less: Additive Prompt Tuning for Rehearsal-Free Class-Incremental Learning", ICCV
    2025. Defaults are those of the released code (HaoranChen/Additive-Prompt-Tuning) for CIFAR-100, also that of
    `head`.

    Args:
        layers: blocks with added vectors, from 0; None: all, as released.
        average: alpha, the weight of the average of earlier tasks when a task ends; the newest prompt has the rest.
            Released: 0.7; 0.8 for ImageNet-R.
        prompt_init: as in `L2PConfig`. Released: a normal of std 0.02, cut at two.
    """

    method: str = "apt"
    layers: list[int] | None = None
    average: float = 0.7
    prompt_init: str = "normal"
    head: str = "layer_norm"

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2503.07979",)
    has_keys: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "prompt_init", LAYER_INITS)
        share(self, "average")
        no_prompt_readout(self)
        if self.layers is not None:
            check_layers(self)
        if self.diversity_weight:
            raise ValueError(f"diversity_weight={self.diversity_weight}: apt has one prompt; leave it at 0")
