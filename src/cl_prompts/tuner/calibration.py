"""Calibration of an adapter's scores: the temperatures, the novelty threshold, and how both are chosen after a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from cl_prompts.heads import FeatureClassifier
from cl_prompts.heads.calibration import COMMON_INFORMATION, TaskTemperatures, fit_temperature, information, log_scores
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.novelty import energy, threshold_carried_on, threshold_of
from cl_prompts.heads.refit import held_out_logits
from cl_prompts.learner.features import Recorded
from cl_prompts.learner.task_state import TaskState
from cl_prompts.methods import PromptPoolConfig


class Calibration(nn.Module):
    """What divides an adapter's logits at test. It follows the config's state.

    Call `update` when tasks or temperatures in the state have changed.

    Args:
        config: of the adapter.
        tasks: its tasks and classes.
    """

    def __init__(self, config: PromptPoolConfig, tasks: TaskState) -> None:
        super().__init__()
        self.config = config
        self._values: list[float] = []
        # No buffer: it is computed from the state, and would be rounded when a model is cast.
        self._divisors = torch.ones(0, device="cpu")  # also where PEFT builds on "meta"
        self.update(tasks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._place(fn(self._divisors).device)
        return self

    def _place(self, device: torch.device) -> None:
        self._divisors = torch.tensor(self._values, dtype=torch.float32, device=device)

    def update(self, tasks: TaskState) -> None:
        """Compute the temperature of each class [C], with the adapter's `tasks`."""
        state = self.config.state
        count = len(tasks.classes)
        if state.temperature_information:
            self._values = _temperatures(self.config).of_classes(tasks.class_indices(state.tasks), count)
        else:
            self._values = [state.temperature or 1.0] * count
        self._place(self._divisors.device)

    @property
    def temperature(self) -> float:
        """The config's `logit_temperature`, times the mean of the tasks' temperatures if there is one."""
        return self.config.logit_temperature * (self.config.state.temperature or 1.0)

    def divisors(self, scores: Tensor) -> Tensor:
        """What divides the `scores` [B, C] of each image: [B, 1]. It is that of the class with the largest one."""
        # Wrappers that place parameters and buffers on several devices leave this tensor where it was.
        found = self._divisors.to(scores.device)[scores.argmax(1)].to(scores.dtype)
        return self.config.logit_temperature * found[:, None]

    def calibrated(self, logits: Tensor, scale: Tensor | None) -> Tensor:
        """Logits at test [B, C] from those of the classifier and the scale of each image [B], if it has one."""
        scores = log_scores(logits, self.config.state.score_width)
        calibrated = scores / self.divisors(scores)
        return calibrated if scale is None else calibrated / scale[:, None]

    def energy(self, logits: Tensor) -> Tensor:
        """Energy of images [B] from their logits at test [B, C], with the same temperature for all images."""
        temperature = self.temperature
        return energy(logits * (self.divisors(logits) / temperature), temperature)

    def choose(
        self,
        tasks: TaskState,
        seen: Recorded,
        targets: Tensor,
        before: Tensor | None,
        head: IncrementalHead,
        classifier: FeatureClassifier | None,
    ) -> dict[str, Any]:
        """What the state holds of the scores after the newest task, from its images while they are held out.

        Args:
            tasks: the adapter's tasks.
            seen: the task's images after its training, n in number.
            targets: index of their logit [n].
            before: their features before the task's training [n, D], or None.
            head: the trained head.
            classifier: the classifier computed from features, before its fit, or None.

        Returns:
            Values by the name of the state's field; none if there are too few images to leave some out.
        """
        config, state, novelty, scale, width = self.config, self.config.state, None, None, None
        only_current, features, untrained = config.class_mask == "task", seen.features, seen.untrained
        divided = config.loss_temperature
        if classifier is None:
            logits, held = held_out_logits(head, features, targets, only_current, untrained, loss_temperature=divided)
        else:
            try:
                logits, held, novelty, scale = classifier.held_out_answers(
                    features,
                    targets,
                    before,
                    head,
                    only_current=only_current,
                    loss_temperature=divided,
                    untrained=untrained,
                )
            except ValueError:  # too few images to leave some out, or none at all; `fit` tells the latter
                return {}
            width = classifier.score_width
        logits = log_scores(logits, width)
        if scale is not None:
            logits = logits / scale[:, None]
        kind, earlier_kind = (width, scale is not None), (state.score_width, state.image_scale)
        newest = fit_temperature(logits, held)
        if newest is None:
            kind = earlier_kind
        # Temperatures of other scores, as of a file of an earlier version, are not carried on.
        comparable = kind == earlier_kind
        classes, earlier_classes = len(tasks.classes), len(tasks.earlier_classes)
        power = classifier.temperature_power if classifier is not None else 0.0
        growth = (classes / earlier_classes) ** power if earlier_classes else 1.0
        earlier = _temperatures(config) if comparable else TaskTemperatures([], [])
        # Without tasks each part of the stream counts, like a task.
        task = max(len(state.tasks) - 1, 0) if tasks.num_labels is None else len(earlier.values)
        known = 0.0 if newest is None else information(logits, held, newest)
        after = earlier.after(task, newest, known, growth if len(earlier.values) <= task else 1.0)
        temperature = after.common
        same_novelty = comparable or novelty is not None
        if novelty is None:  # it depends on the scores
            divisor = config.logit_temperature * (temperature or 1.0)
            novelty = energy(logits / divisor, divisor)
        threshold = threshold_of(novelty, config.false_alarm_rate) if logits.shape[1] > 1 else None
        threshold = threshold_carried_on(state.novelty_threshold if same_novelty else None, threshold, len(held))
        return {
            "temperature": temperature,
            "task_temperatures": after.values,
            "temperature_information": after.information,
            "score_width": kind[0],
            "image_scale": kind[1],
            "novelty_threshold": threshold,
        }


def _temperatures(config: PromptPoolConfig) -> TaskTemperatures:
    """The temperatures of the tasks before the newest one, or of all. A file of an earlier version has one for all."""
    state = config.state
    if state.temperature_information or state.temperature is None:
        return TaskTemperatures(state.task_temperatures, state.temperature_information)
    earlier = max(len(state.tasks) - 1, 0) if config.num_labels is None else 1
    return TaskTemperatures([state.temperature] * earlier, [COMMON_INFORMATION / max(earlier, 1)] * earlier)
