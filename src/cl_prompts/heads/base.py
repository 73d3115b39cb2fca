"""The contract of a classifier that is computed from features instead of being trained with the prompts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cl_prompts.heads.calibration import HELD_OUT_IMAGES, folds
from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.drift import KINDS as DRIFTS
from cl_prompts.heads.drift import FeatureMap, fit_map
from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.grouped_gaussians import group_gaussians
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.runtime.precision import device_of_float64


class HeldOut(NamedTuple):
    """Answers for images that a classifier was not fitted to.

    Args:
        logits: [held, C].
        targets: class index of each image [held].
        novelty: of each image [held]; None for a classifier without such a score.
        scale: of each image [held], as of `FeatureClassifier.scale`; None for a classifier without it.
    """

    logits: Tensor
    targets: Tensor
    novelty: Tensor | None
    scale: Tensor | None


class FeatureClassifier(nn.Module, ABC):
    """A classifier fitted to the features of each task after its training. No image is kept.

    For each task call `begin_task`, then `fit`. Features are [n, D] in float32; every process passes all features of the
    task.

    Args:
        save_statistics: save what learning further tasks needs.
        drift: how the statistics of old classes follow the features: "none", "shift" or "affine" (`fit_map`).

    Attributes:
        num_classes: number of known classes.
        num_tasks: number of tasks begun.
        fitted: number of tasks that were fitted; saved.
        counted: number of tasks whose statistics are available; saved with the statistics.
        newest_map: the map that moved old statistics in the newest fit; None without one. Not saved.

    Raises:
        ValueError: an unknown `drift`.
    """

    fitted: Tensor
    counted: Tensor

    # Name, in messages, of what `save_statistics` saves.
    statistics = "class means and covariances"
    # In messages: settings with which a class's statistics take less memory.
    lighter = 'class_covariance="low_rank" with a small covariance_rank'
    # Of `log_scores`, for a classifier whose scores are those of a regression.
    score_width: ClassVar[float | None] = None
    # The temperature of held-out images goes with this power of the number of classes.
    temperature_power: ClassVar[float] = 0.0
    # Held-out images of a task that `held_out_answers` fits folds for.
    held_out_images: ClassVar[int] = HELD_OUT_IMAGES

    def __init__(self, *, save_statistics: bool, drift: str) -> None:
        super().__init__()
        if drift not in DRIFTS:
            raise ValueError(f"drift={drift!r}: choose one of {DRIFTS}")
        self.drift = drift
        self.num_classes = 0
        self.num_tasks = 0
        self._newest: list[int] = []
        self.newest_map: FeatureMap | None = None
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))
        # It is 0 after loading an adapter that was saved without its statistics.
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64), persistent=save_statistics)

    @property
    def needs_before(self) -> bool:
        """Whether `fit` needs the features of the task's images before its training, from the second task on."""
        return self.drift != "none"

    @property
    def drift_explained(self) -> float | None:
        """R^2 of `newest_map` on held-out images of the newest task; None if it is unknown."""
        found = self.newest_map
        return None if found is None or math.isnan(found.explained) else found.explained

    @property
    def bytes_to_learn(self) -> int:
        """Bytes that `fit` needs beside the tensors of this module: statistics without room, and temporary matrices."""
        return sum(part.bytes_without_room for part in self.modules() if isinstance(part, ClassGaussians))

    @property
    def bytes_to_answer(self) -> int:
        """Bytes that answers need beside the tensors of this module."""
        return 0

    @property
    def bytes_per_class(self) -> int:
        """Bytes that the statistics of a further class take."""
        return sum(part.bytes_per_row for part in self.modules() if isinstance(part, ClassGaussians))

    def make_room(self) -> None:
        """Allocate the statistics that are not saved. Only `fit` needs them."""

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add what the next task needs; also replayed to rebuild shapes before values are loaded.

        Args:
            class_indices: logit indices of the task's classes.

        Raises:
            ValueError: the adapter was saved without its statistics.
        """
        self.check_statistics()
        self.num_classes = max(self.num_classes, max(class_indices, default=-1) + 1)
        self.num_tasks += 1
        self._newest = list(class_indices)

    def rebuild(self, tasks: Sequence[Sequence[int]]) -> None:
        """Replay `begin_task` for `tasks` (class indices of each), in linear time; the values come from a file."""
        *earlier, newest = tasks
        self.num_tasks = len(earlier)
        class_indices = [index for task in earlier for index in task]
        self.num_classes = max(class_indices, default=-1) + 1
        for part in self.modules():
            if isinstance(part, ClassGaussians):
                part.class_indices = class_indices
        self.begin_task(newest)

    @torch.no_grad()
    def group_classes(self, groups: ClassGroups, head: IncrementalHead) -> None:
        """Forget and merge classes, after all tasks were fitted. After an error this object cannot be used any more.

        Args:
            groups: of the old classes.
            head: the trained head, for the new classes.

        Raises:
            ValueError: classes cannot be merged, or a matrix cannot be inverted.
        """
        self.num_classes, self._newest = len(groups.members), []
        for part in self.modules():
            if isinstance(part, ClassGaussians):
                had_images = bool(part.seen)
                group_gaussians(part, groups)
                if had_images and not part.seen:
                    raise ValueError("none of the classes that would be left had images: keep one that had")
        self._group(groups, head)

    def _group(self, groups: ClassGroups, head: IncrementalHead) -> None:
        """Change what is not in the Gaussians, which are changed before."""

    @torch.no_grad()
    def fit(
        self, features: Tensor, targets: Tensor, before: Tensor | None = None, head: IncrementalHead | None = None
    ) -> None:
        """Fit the classifier to the newest task, after its training.

        Args:
            features: of all its training images [n, D].
            targets: class index of each image [n]; all of the newest task.
            before: features of the same images, in the same order, by the model before the task's training [n, D]. None for
                the first task, and without drift compensation.
            head: the trained head.

        Raises:
            ValueError: the adapter was saved without its statistics, the task was fitted before, features are not finite,
                targets are of other tasks, `before` is missing, or a matrix cannot be inverted. After an error nothing has
                changed.
        """
        self._check(features, targets, before)
        with self._at_work(features.device) as work:
            self._fit(features.to(work), targets.to(work), None if before is None else before.to(work), head)
        self.fitted += 1
        self.counted += 1

    @torch.no_grad()
    def held_out_answers(
        self,
        features: Tensor,
        targets: Tensor,
        before: Tensor | None = None,
        head: IncrementalHead | None = None,
        *,
        only_current: bool = True,
        loss_temperature: float = 1.0,
        untrained: Tensor | None = None,
    ) -> HeldOut:
        """Answers for images of the newest task by classifiers that were fitted without them. Call it in place of `fit`.

        The classifier is as before afterwards.

        Args:
            features: as for `fit` [n, D].
            targets: as for `fit` [n].
            before: as for `fit` [n, D], or None.
            head: the trained head.
            only_current: whether its loss compares classes of the current task only (`class_mask="task"`).
            loss_temperature: divides the head's logits in that loss.
            untrained: True for the images that no prompt was trained on [n], as for `folds`.

        Raises:
            ValueError: as `fit`, also if the images of a fold are too few.
        """
        self._check(features, targets, before)
        logits, held_targets = [features.new_zeros(0, self.num_classes)], [targets[:0]]
        found: dict[str, list[Tensor]] = {"novelty": [], "scale": []}
        for held in folds(targets, untrained, self.held_out_images):
            rest = ~held
            with self._at_work(features.device, keep=False) as work:
                earlier = None if before is None else before[rest].to(work)
                known = features[rest].to(work), targets[rest].to(work)
                self._fit(*known, earlier, head and self._head_without(head, *known, only_current, loss_temperature))
                del known, earlier
                self.fitted = self.fitted + 1
                scores, *further = self._answers_once(features[held].to(work))
                logits.append(scores.to(features.device))
                for name, values in zip(found, further, strict=True):
                    found[name] += [] if values is None else [values.to(features.device)]
            held_targets.append(targets[held])
        of_images = {name: torch.cat(values) if values else None for name, values in found.items()}
        return HeldOut(torch.cat(logits), torch.cat(held_targets), of_images["novelty"], of_images["scale"])

    def _head_without(
        self, head: IncrementalHead, features: Tensor, targets: Tensor, only_current: bool, loss_temperature: float
    ) -> IncrementalHead:
        """The trained head as if the task had only these images; the same head for a classifier that does not read it."""
        return head

    def scale(self, features: Tensor) -> Tensor | None:
        """What divides the logits of each image beside the temperature, for `features` [B, D]: [B]; None: nothing does."""
        return None

    def novelty(self, features: Tensor) -> Tensor | None:
        """How unlike the known classes `features` [B, D] are: [B]; None for a classifier that can tell by logits only."""
        return None

    def _answers_once(self, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits, novelty and scale of `features`; nothing is kept for further answers."""
        return self(features), self.novelty(features), self.scale(features)

    def forget_computed(self) -> None:
        """Drop what answers computed from the statistics and keep; they compute it again."""

    @contextmanager
    def _at_work(self, home: torch.device, *, keep: bool = True) -> Iterator[torch.device]:
        """The device to fit on. After an error, and without `keep`, all tensors are those of before."""
        work = device_of_float64(home)
        self.to(work)
        self.make_room()
        buffers = [(part, dict(part._buffers)) for part in self.modules()]
        newest = [(part, part.newest_rows()) for part in self.modules() if isinstance(part, ClassGaussians)]
        try:
            with torch.autocast(work.type, enabled=False):
                yield work
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                for part, before_fit in buffers:
                    part._buffers.update(before_fit)
                for gaussians, rows in newest:
                    gaussians.restore_newest(rows)
                self.forget_computed()
            self.to(home)

    def _map(self, before: Tensor, after: Tensor) -> FeatureMap:
        """The map that moves the statistics of old classes; it is kept as `newest_map`."""
        self.newest_map = fit_map(before, after, self.drift)
        return self.newest_map

    def _check(self, features: Tensor, targets: Tensor, before: Tensor | None) -> None:
        """Raise ValueError if the newest task cannot be fitted to these features of its images."""
        self.check_turn()
        if before is None and self.needs_before and int(self.fitted):
            raise ValueError(f"drift={self.drift!r} needs the features of the task's images before the task: pass before=")
        for given in (features,) if before is None else (features, before):
            self._check_features(given, targets)

    def _check_features(self, features: Tensor, targets: Tensor) -> None:
        if features.dim() != 2 or targets.shape != features.shape[:1] or not features.shape[0]:
            raise ValueError(
                f"features {list(features.shape)} and targets {list(targets.shape)} do not fit: give [n, D] and [n], n > 0"
            )
        others = sorted(set(targets.tolist()) - set(self._newest))
        if others:
            raise ValueError(f"targets {others} are not in the newest task, whose class indices are {self._newest}")
        if not all(part.isfinite().all() for part in features.split(64)):  # of all at once, a copy would be made
            raise ValueError("the features hold NaN or Inf: the training diverged, use a lower learning rate")

    @abstractmethod
    def _fit(self, features: Tensor, targets: Tensor, before: Tensor | None, head: IncrementalHead | None) -> None:
        """Fit the classifier; the arguments are those of `fit`, already checked. Replaces buffers, and writes into none
        but newest rows of `ClassGaussians`."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, C] of `features` [B, D]; -inf for classes without images."""

    def check_statistics(self) -> None:
        """Check that further tasks can be fitted.

        Raises:
            ValueError: the adapter was saved without its statistics.
        """
        if self.fitted.device.type != "meta" and int(self.fitted) != int(self.counted):
            raise ValueError(
                f"this adapter was saved without the {self.statistics} of its classifier, so it can answer but not learn "
                "further tasks: save with save_statistics=True in its config"
            )

    def check_turn(self) -> None:
        """Check that `fit` may be called.

        Raises:
            ValueError: all tasks are fitted, or the adapter was saved without its statistics.
        """
        self.check_statistics()
        if int(self.fitted) >= self.num_tasks:
            raise ValueError(f"all {self.num_tasks} tasks begun are fitted already: call begin_task for the next one first")

    def check_fitted(self) -> None:
        """Check that a task has been fitted; not in a graph, which cannot branch on a tensor.

        Raises:
            ValueError: no task has been fitted.
        """
        if not torch.compiler.is_compiling() and not int(self.fitted):
            raise ValueError("the closed-form head has seen no task yet: call model.consolidate(images) after training one")
