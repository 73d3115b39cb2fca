"""A backbone without prompts that may be trained, and the one feature per image that a classifier reads from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cl_prompts.backbones.fingerprint import fingerprint, unread_parts
from cl_prompts.backbones.input_checks import check_arguments
from cl_prompts.backbones.plan import PassPlan, PassRecord
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.readout import read_feature, resolve_pooling
from cl_prompts.backbones.trial import check_runs, check_weights


class FeatureExtractor(nn.Module):
    """Any supported Hugging Face vision transformer as a function from images to features.

    Parameters that the feature does not depend on (a bypassed classifier, a pooler, mask tokens) are never trained.

    Args:
        base: the backbone; which of its parameters take gradients is set in place.
        pooling: "auto", "cls", "mean", "cls_mean" or "pooler", as a prompt pool reads it.
        frozen: train none of it.
        arguments: further arguments of every forward of the base, like {"interpolate_pos_encoding": True}.

    Raises:
        TypeError: the base is not supported.
        ValueError: it has no such feature, or nothing is left to train because it was frozen before.
    """

    def __init__(
        self, base: nn.Module, pooling: str = "auto", *, frozen: bool = False, arguments: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.frozen = frozen
        self.arguments = arguments or {}
        self._backbone = PromptedBackbone.of(base, self)
        check_weights(base, training=not frozen)
        check_runs(self._backbone, self.arguments, training=False)
        self.structure = self._backbone.structure
        self.pooling = resolve_pooling(pooling, self.structure, type(base).__name__)
        self.fingerprint = fingerprint(base, self.structure, self.pooling)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and self._is_read(name) and not frozen)
        if not frozen and not any(p.requires_grad for p in base.parameters()):
            raise ValueError(
                "every parameter of the backbone is frozen already: load it anew, or pass freeze_backbone=True"
            )

    def _is_read(self, name: str) -> bool:
        inner = f"{self.structure.inner}." if self.structure.inner else ""
        inside = name.removeprefix(inner)
        unread = unread_parts(self.base, self.structure, self.pooling)
        return name.startswith(inner) and inside.split(".")[0] not in unread and not name.endswith("mask_token")

    @property
    def width(self) -> int:
        """Size D of a feature."""
        return self.structure.shape.width * (2 if self.pooling == "cls_mean" else 1)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Images [B, 3, H, W] -> features [B, D], float32. Raises TypeError if the base lacks an argument of `kwargs`."""
        check_arguments(self.base, kwargs)
        plan = PassPlan(PassRecord(), arguments=self.arguments)
        with self._backbone.prompted(plan):
            self.base(pixel_values=pixel_values, **kwargs)
        return read_feature(self.base, self.structure, plan.record, self.pooling)
