"""The contract of a classifier that is made from features instead of being trained along with the prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_prompts.head import GrowingHead


class FeatureClassifier(nn.Module, ABC):
    """Logits from features, by what was seen of each task's features once its training was done. No image is kept.

    For each task: `begin_task`, then `fit`. Features are [n, D] in float32 and must be all of the task, on every process.

    Attributes:
        num_classes: head columns known.
        fitted: tasks that `fit` has seen, saved along.
    """

    fitted: Tensor
    counted: Tensor

    def __init__(self, *, save_statistics: bool) -> None:
        super().__init__()
        self.num_classes = 0
        self.num_tasks = 0
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))
        # Zero after loading an adapter that was saved without its statistics.
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64), persistent=save_statistics)

    # What `save_statistics` saves, for messages.
    statistics = "class means and covariances"

    @property
    def needs_before(self) -> bool:
        """Whether `fit` wants the features that the task's images had before the task."""
        return False

    def begin_task(self, columns: Sequence[int]) -> None:
        """Open what the next task needs, whose classes have these head columns. Replayed to rebuild shapes for loading.

        Raises:
            ValueError: an adapter that was saved without its statistics.
        """
        self.check_statistics()
        self.num_classes = max(self.num_classes, max(columns) + 1)
        self.num_tasks += 1

    @torch.no_grad()
    def fit(self, features: Tensor, columns: Tensor, before: Tensor | None = None, head: GrowingHead | None = None) -> None:
        """Take in the newest task, whose training is done.

        Args:
            features: of all its training images [n, D].
            columns: head column of each [n].
            before: features of the same images, in the same order, with the model as it was before the task [n, D]; None
                for the first task, and where features do not change.
            head: the trained head.

        Raises:
            ValueError: an adapter that was saved without its statistics.
        """
        self.check_statistics()
        self._fit(features, columns, before, head)
        self.fitted += 1
        self.counted += 1

    @abstractmethod
    def _fit(self, features: Tensor, columns: Tensor, before: Tensor | None, head: GrowingHead | None) -> None:
        """What a classifier does in `fit`."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, C]; -inf for classes nothing is known of."""

    def check_statistics(self) -> None:
        """Raise ValueError if old tasks can be answered, but not learnt on from."""
        if self.fitted.device.type != "meta" and int(self.fitted) != int(self.counted):
            raise ValueError(
                f"this adapter was saved without the {self.statistics} of its classifier, so it can answer but learn no "
                "further task: save with save_statistics=True in its config"
            )

    def check_fitted(self) -> None:
        """Raise ValueError if there is nothing to answer from."""
        if not int(self.fitted):
            raise ValueError("the closed-form head has seen no task yet: call model.consolidate(images) when one is learnt")
