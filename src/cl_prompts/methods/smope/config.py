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
    """SMoPE: one prefix shared by all tasks, whose rows are experts that each head chooses from.

    Le et al., "One-Prompt Strikes Back: Sparse Mixture of Experts for Prompt-based Continual Learning", ICLR 2026. Defaults
    are those of the released CIFAR-100 script (AdamW, experts at five times the head's rate). Its ImageNet-R scripts have
    epsilon 0.7 / 0.5 / 0.3, router_weight 1e-4 / 5e-5 / 1e-4 and prototype_weight 1e-5 / 1e-4 / 5e-5 for 5 / 10 / 20 tasks.

    Not done here: the released code trains task 0 twice, first for half the epochs with all experts in use (top_k =
    pool_size). Its last stage, which re-trains the classifier on class statistics, is no part of the pool.

    Args:
        pool_size: experts of a head, in each layer (the released "prompt length" of 50 is 25 keys and 25 values).
        top_k: experts that a head uses for an image.
        layers: blocks that get experts, from 0.
        prompt_init: how experts start, as in `L2PConfig`; "unit_uniform" in the released code.
        epsilon: in training, what an expert that was frequently used in earlier tasks loses in the choice, in units of the
            range of the image's scores; also the margin of the router loss.
        router_weight: weight of the loss that sharpens the choice.
        prototype_weight: weight of the loss that keeps the choice of earlier tasks; their keys stand for their images.
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
    has_keys: ClassVar[bool] = False  # an expert is found by its prefix key

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "top_k")
        check_top_k(self)
        check_layers(self)
        no_prompt_readout(self)
        choice(self, "prompt_init", LAYER_INITS)
        not_negative(self, "epsilon", "router_weight", "prototype_weight")
