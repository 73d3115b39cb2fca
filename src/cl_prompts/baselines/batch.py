"""A training batch of a baseline, and its cross entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import IGNORE_INDEX, LossPart


@dataclass(frozen=True)
class Batch:
    """What the terms of the training loss are computed from.

    Args:
        features: [B, D].
        logits: of all known classes, none masked [B, C].
        targets: index of the logit of each image's class [B], -100 for padding.
        valid: True for real images, False for padding [B].
        sample_ids: a number per image [B], or None.
        teacher_logits: an earlier model's logits [B, earlier classes]; None without one.
        pixel_values: the images [B, 3, H, W].
        inputs: further inputs of the backbone.
    """

    features: Tensor
    logits: Tensor
    targets: Tensor
    valid: Tensor
    sample_ids: Sequence[int] | Tensor | None
    teacher_logits: Tensor | None
    pixel_values: Tensor
    inputs: Mapping[str, Any]

    @property
    def numbers(self) -> Tensor:
        """`sample_ids` as a tensor [B] on the device of the logits.

        Raises:
            ValueError: there are none.
        """
        if self.sample_ids is None:
            raise ValueError("this learner knows images by their numbers: pass sample_ids, as the streams do")
        return torch.as_tensor(self.sample_ids, device=self.logits.device)


def cross_entropy(logits: Tensor, targets: Tensor) -> LossPart:
    """Cross entropy of each image, for `logits` [B, C] and class indices `targets` [B]; -100 marks padding."""
    return LossPart(F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX), "mean")
