"""The config of SMoPE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.methods.config import LAYER_INITS, PromptPoolConfig
from cl_prompts.methods.shared.field_checks import (
    check_layers,
    check_top_k,
    choice,
    no_prompt_readout,
    not_negative,
    positive,
)


@dataclass
class SMoPEConfig(PromptPoolConfig):
    """SMoPE: one prefix per layer for all tasks, whose rows are experts; each head selects some of them.

    Le et al., "One-Prompt Strikes Back: Sparse Mixture of Experts for Prompt-based Continual Learning", ICLR 2026. Defaults
    are those of the released CIFAR-100 script (AdamW, experts at five times the head's rate). Its ImageNet-R scripts have
    epsilon 0.7 / 0.5 / 0.3, router_weight 1e-4 / 5e-5 / 1e-4 and prototype_weight 1e-5 / 1e-4 / 5e-5 for 5 / 10 / 20 tasks.

    Not included: the released code trains the first task twice, first for half the epochs with all experts (top_k =
    pool_size), and retrains the classifier on class statistics in a last stage.

    Args:
        pool_size: number of experts E of a head (the released "prompt length" of 50 is 25 keys and 25 values).
        top_k: number of experts K that a head selects for an image.
        layers: blocks that get experts, from 0.
        prompt_init: initial values of the experts, as in `L2PConfig`; "unit_uniform" in the released code.
        epsilon: penalty, in training, on the score of an expert that earlier tasks used frequently, in units of the range
            of the image's scores; also the margin of the router loss.
        router_weight: weight of the router loss, which sharpens the selection.
        prototype_weight: weight of the prototype loss, which preserves the selection of earlier tasks. It uses their keys
            in place of their images.
    """

    method: str = "smope"
    pool_size: int = 25
    top_k: int = 5
    layers: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4, 5])
    prompt_init: str = "unit_uniform"
    epsilon: float = 0.4
    router_weight: float = 1e-5
    prototype_weight: float = 1e-5

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2509.24483",)
    has_keys: ClassVar[bool] = False  # an expert is selected by its prefix key

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "top_k")
        check_top_k(self)
        check_layers(self)
        no_prompt_readout(self)
        choice(self, "prompt_init", LAYER_INITS)
        not_negative(self, "epsilon", "router_weight", "prototype_weight")
