"""A classifier that is a copy of the trained head, trained further on features after each task."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from cl_prompts.heads.base import FeatureClassifier, HeldOut
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.refit import trained_as_far


class RetrainedHead(FeatureClassifier):
    """Base of classifiers whose fit trains a copy of the trained head; `hand_over` gives the values back to that head.

    Args:
        save_statistics: save what learning further tasks needs.
        drift: how the statistics of old classes follow the features: "none", "shift" or "affine" (`fit_map`).
    """

    def __init__(self, *, save_statistics: bool, drift: str) -> None:
        super().__init__(save_statistics=save_statistics, drift=drift)
        self.head: IncrementalHead | None = None

    def _fit(self, features: Tensor, targets: Tensor, before: Tensor | None, head: IncrementalHead | None) -> None:
        if head is None:
            raise ValueError("this classifier starts from the trained head: pass head=")
        self._collect(features, targets, before)
        self.head = copy.deepcopy(head).to(features.device)
        self._train(self.head, features, targets)

    def _collect(self, features: Tensor, targets: Tensor, before: Tensor | None) -> None:
        """Update statistics before the head is trained; the arguments are those of `fit`."""

    @abstractmethod
    def _train(self, head: IncrementalHead, features: Tensor, targets: Tensor) -> None:
        """Train `head` in place on `features` [n, D] with class indices `targets` [n], or on what was collected."""

    def held_out_answers(self, *args: Any, **kwargs: Any) -> HeldOut:
        """As `FeatureClassifier.held_out_answers`, with its `args` and `kwargs`."""
        trained = self.head
        try:
            return super().held_out_answers(*args, **kwargs)
        finally:
            self.head = trained

    def _head_without(
        self, head: IncrementalHead, features: Tensor, targets: Tensor, only_current: bool, loss_temperature: float
    ) -> IncrementalHead:
        head = copy.deepcopy(head).to(features.device)
        return trained_as_far(head, features, targets, only_current, loss_temperature)

    @torch.no_grad()
    def hand_over(self, head: IncrementalHead) -> None:
        """Copy the trained values into `head`, and drop the copy."""
        assert self.head is not None
        for old, new in zip(head.parameters(), self.head.parameters(), strict=True):
            old.copy_(new)
        self.head = None

    def forward(self, features: Tensor) -> Tensor:
        """The copy's logits, [B, C]."""
        self.check_fitted()
        assert self.head is not None
        return self.head(features)
