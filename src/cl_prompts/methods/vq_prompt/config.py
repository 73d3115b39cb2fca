"""The config of VQ-Prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.methods.config import INITS, LAYER_INITS
from cl_prompts.methods.shared.field_checks import (
    check_layers,
    choice,
    not_negative,
    positive,
    scales_logits,
    splits_in_two,
)
from cl_prompts.methods.shared.prefix_config import PrefixPromptConfig


@dataclass
class VQPromptConfig(PrefixPromptConfig):
    """VQ-Prompt: the prompts of a pool are mixed, and the mixture is quantized to the nearest of them.

    Jiao et al., "Vector Quantization Prompting for Continual Learning", NeurIPS 2024. Defaults are those of the released
    code, which trains prompts and keys at five times the head's rate (AdamW without weight decay). Its second stage,
    which rebalances the classifier on class statistics, is not included.

    Args:
        pool_size: number of prompts M of a layer, shared by all tasks and never frozen.
        prompt_length: rows of one prompt; the first half is keys, the second half is values.
        layers: blocks that get prefixes, from 0; each has its own pool.
        prompt_init: as in `L2PConfig`; "unit_uniform" in the released code.
        key_init: as `prompt_init`.
        temperature: tau; divides the scores before the softmax. The query is not normalized, so tau is on the scale of the
            features.
        soft_to_hard_weight: weight of the squared distance that moves the mixture to its nearest prompt.
        hard_to_soft_weight: weight of the squared distance that moves the nearest prompt to the mixture.
    """

    method: str = "vq_prompt"
    pool_size: int = 10
    prompt_length: int = 8
    layers: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    prompt_init: str = "unit_uniform"
    key_init: str = "unit_uniform"
    temperature: float = 1.0
    soft_to_hard_weight: float = 0.4
    hard_to_soft_weight: float = 0.1

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2410.20444",)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "prompt_length")
        splits_in_two(self, "prompt_length")
        check_layers(self)
        choice(self, "prompt_init", LAYER_INITS)
        choice(self, "key_init", INITS)
        scales_logits(self, "temperature")
        not_negative(self, "soft_to_hard_weight", "hard_to_soft_weight")
