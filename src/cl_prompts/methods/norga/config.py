"""The config of NoRGa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.hide.config import HiDePromptConfig
from cl_prompts.methods.shared.field_checks import choice


@dataclass
class NoRGaConfig(HiDePromptConfig):
    """NoRGa: HiDe-Prompt with a non-linear residual gate on the attention logits of prompts.

    Le et al., "Mixture of Experts Meets Prompt-Based Continual Learning", NeurIPS 2024. Defaults are those of the released
    scripts (Minhchuyentoancbn/MoE_PromptCL) for CIFAR-100, which do not mix prompts.

    Args:
        gate: activation of the gate: "sigmoid" (released scripts) or "tanh" (default of the released code).
    """

    method: str = "norga"
    prompt_momentum: float = 0.0
    gate: str = "sigmoid"

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2405.14124", "https://arxiv.org/abs/2310.07234")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "gate", ("sigmoid", "tanh"))
        if self.prefix_space != "projected":
            raise ValueError(
                f"prefix_space={self.prefix_space!r}: the gate needs dot products with projected prefix keys; "
                'leave it at "projected"'
            )
