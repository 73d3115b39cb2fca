"""LoRA, trained on one task after the other: what PEFT's users would take in place of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cl_prompts.baselines.base import Baseline


class SequentialLoRA(Baseline):
    """A low-rank update of the blocks' linear layers, W + (alpha / r) B A, and the head are trained on each task in turn.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, as PEFT has it. Nothing protects earlier
    tasks; with `extra_classifiers` of a run, class statistics are computed on its features and moved as these drift.

    Args:
        backbone: see `Baseline`; its own weights stay fixed.
        rank: r, of each update.
        alpha: the update's scale times r.
        layers: name or names of linear layers within a block, as the last part of their path, like ("q_proj", "v_proj");
            None: all.
        options: see `Baseline`.

    Raises:
        ValueError: `rank` is no positive integer, no linear layer of a block has one of the names in `layers`, or the
            backbone has adapters of PEFT already.
    """

    name = "lora"
    default_rates: ClassVar[Mapping[str, float]] = {"base": 1e-3}
    learns_without_tasks = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 8.0,
        layers: str | tuple[str, ...] | list[str] | None = None,
        **options: Any,
    ) -> None:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank={rank!r} must be a positive integer")
        if any(isinstance(module, BaseTunerLayer) for module in backbone.modules()):
            raise ValueError("the backbone has adapters of PEFT already: load it anew")
        super().__init__(backbone, **options)
        if self.features.frozen:
            raise ValueError('freeze_backbone=True leaves no layer to update: that learner is "frozen"')
        names = [layers] if isinstance(layers, str) else layers and list(layers)
        self.options |= {"rank": rank, "alpha": self.number("alpha", alpha), "layers": names}
        blocks = tuple(f"{block}." for block in self.features.structure.blocks)
        modules = [(n, module) for n, module in self.features.base.named_modules() if n.startswith(blocks)]
        linear = [name for name, module in modules if isinstance(module, nn.Linear)]
        if names is not None:
            linear = [name for name in linear if name.split(".")[-1] in names]
        if not linear:
            raise ValueError(f"layers={layers!r}: no linear layer in a block of {type(backbone).__name__} is called so")
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear)
        inject_adapter_in_model(config, self.features.base)  # all other weights of the base take no gradient from here on

    def compute_features(self, pixel_values: Tensor, query: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Features [B, D] of images; `pixel_values`, `query`, `kwargs` and errors as in `Baseline`.

        Raises:
            ValueError: no gradient reaches the updates in training.
        """
        features = super().compute_features(pixel_values, query, **kwargs)
        if self.training and torch.is_grad_enabled() and not features.requires_grad:
            raise ValueError(
                "no gradient reaches the LoRA: the base checkpoints with use_reentrant=True. Enable it with "
                '{"use_reentrant": False}, the default of transformers'
            )
        return features
