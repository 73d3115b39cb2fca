"""The contract of a classifier that is made from features instead of being trained along with the prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_prompts.heads.drift import KINDS as DRIFTS
from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.incremental import IncrementalHead


class FeatureClassifier(nn.Module, ABC):
    """Logits from features, by what was seen of each task's features once its training was done. No image is kept.

    For each task: `begin_task`, then `fit`. Features are [n, D] in float32 and must be all of the task, on every process.

    Args:
        save_statistics: save what is needed to go on with further tasks.
        drift: "none", "shift" or "affine": how statistics of old classes follow the features (`fit_map`).

    Attributes:
        num_classes: head columns known.
        num_tasks: tasks begun.
        fitted: tasks that `fit` has seen, saved along.
        counted: tasks whose statistics are at hand.

    Raises:
        ValueError: an unknown `drift`.
    """

    fitted: Tensor
    counted: Tensor

    # What `save_statistics` saves, for messages.
    statistics = "class means and covariances"

    def __init__(self, *, save_statistics: bool, drift: str) -> None:
        super().__init__()
        if drift not in DRIFTS:
            raise ValueError(f"drift={drift!r}: choose one of {DRIFTS}")
        self.drift = drift
        self.num_classes = 0
        self.num_tasks = 0
        self._newest: list[int] = []
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))
        # Zero after loading an adapter that was saved without its statistics.
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64), persistent=save_statistics)

    @property
    def needs_before(self) -> bool:
        """Whether `fit` wants the features that the task's images had before the task (not for the first task)."""
        return self.drift != "none"

    @property
    def bytes_to_learn(self) -> int:
        """Memory that `fit` takes beside the tensors of this module."""
        return 0

    def make_room(self) -> None:
        """Allocate the statistics that are not saved; a classifier that only answers is spared them."""

    def begin_task(self, columns: Sequence[int]) -> None:
        """Open what the next task needs, whose classes have the head `columns`. Replayed to rebuild shapes for loading.

        Raises:
            ValueError: an adapter that was saved without its statistics.
        """
        self.check_statistics()
        self.num_classes = max(self.num_classes, max(columns) + 1)
        self.num_tasks += 1
        self._newest = list(columns)

    def rebuild(self, tasks: Sequence[Sequence[int]]) -> None:
        """As `begin_task` for the columns of each of `tasks`, in time linear in their number; values come from a file."""
        *earlier, newest = tasks
        self.num_tasks = len(earlier)
        columns = [column for task in earlier for column in task]
        self.num_classes = max(columns, default=-1) + 1
        for part in self.modules():
            if isinstance(part, ClassGaussians):
                part.columns = columns
        self.begin_task(newest)

    @torch.no_grad()
    def fit(
        self, features: Tensor, columns: Tensor, before: Tensor | None = None, head: IncrementalHead | None = None
    ) -> None:
        """Take in the newest task, whose training is done.

        Args:
            features: of all its training images [n, D].
            columns: head column of each [n], of the newest task's classes.
            before: features of the same images, in the same order, with the model as it was before the task [n, D]; None
                for the first task, and where features do not change.
            head: the trained head.

        Raises:
            ValueError: an adapter that was saved without its statistics, a task that was seen before, features that are
                not finite, images of other classes, or no `before` where drift is to be compensated.
        """
        self.check_turn()
        if before is None and self.needs_before and int(self.fitted):
            raise ValueError(f"drift={self.drift!r} needs the features of the task's images before the task: pass before=")
        self._check(features, columns)
        if before is not None:
            self._check(before, columns)
        # float64 is needed, which Apple's devices lack.
        home = features.device
        work = torch.device("cpu") if home.type == "mps" else home
        self.to(work)
        self.make_room()
        with torch.autocast(work.type, enabled=False):
            self._fit(features.to(work), columns.to(work), None if before is None else before.to(work), head)
        self.fitted += 1
        self.counted += 1
        self.to(home)

    def _check(self, features: Tensor, columns: Tensor) -> None:
        """Raise ValueError if these cannot be features of the newest task's images."""
        if features.dim() != 2 or columns.shape != features.shape[:1] or not len(features):
            raise ValueError(
                f"features {list(features.shape)} and columns {list(columns.shape)} do not fit: give [n, D] and [n], n > 0"
            )
        others = sorted(set(columns.tolist()) - set(self._newest))
        if others:
            raise ValueError(f"columns {others} are of no class of the newest task, whose columns are {self._newest}")
        if not features.isfinite().all():
            raise ValueError("the features hold NaN or Inf: the training diverged, lower its learning rate")

    @abstractmethod
    def _fit(self, features: Tensor, columns: Tensor, before: Tensor | None, head: IncrementalHead | None) -> None:
        """What a classifier does in `fit`."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, C] of `features` [B, D]; -inf for classes nothing is known of."""

    def check_statistics(self) -> None:
        """See that training can go on.

        Raises:
            ValueError: old tasks can be answered, but not learnt on from: the statistics were not saved.
        """
        if self.fitted.device.type != "meta" and int(self.fitted) != int(self.counted):
            raise ValueError(
                f"this adapter was saved without the {self.statistics} of its classifier, so it can answer but learn no "
                "further task: save with save_statistics=True in its config"
            )

    def check_turn(self) -> None:
        """See that `fit` may be called.

        Raises:
            ValueError: there is no task to fit, or the statistics to go on from are missing.
        """
        self.check_statistics()
        if int(self.fitted) >= self.num_tasks:
            raise ValueError(f"all {self.num_tasks} tasks begun are fitted already: call begin_task for the next one first")

    def check_fitted(self) -> None:
        """See that there is something to answer from.

        Raises:
            ValueError: no task has been fitted.
        """
        if not int(self.fitted):
            raise ValueError("the closed-form head has seen no task yet: call model.consolidate(images) when one is learnt")
