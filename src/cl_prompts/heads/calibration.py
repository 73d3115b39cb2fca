"""Temperature of the logits: the number that divides them, so that their softmax is as confident as it is right.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. The temperature is chosen on scores of images that the
classifier was not fitted to. In continual learning these can only be images of the newest task, scored against all classes.
Every task keeps the temperature of its own images, and an image is answered with that of the tasks of the class with the
largest logit (ours).

The scores of a regression on class indicators are no logarithms but estimates of probabilities, some below 0. No
temperature calibrates them; their logarithms, after a softplus, one does (`log_scores`; ours).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


# With more images held out of a fit, the temperature would be that of a classifier of fewer images, which is surer of
# itself than the one that answers.
FOLDS = 10
# A task's held-out images; folds are fitted until there are as many.
HELD_OUT_IMAGES = 200
# What the mean of all tasks counts beside a class's own tasks, in units of `information`: some hundred images.
COMMON_INFORMATION = 100.0
LOWEST, HIGHEST = 1e-4, 1e4


def folds(targets: Tensor, untrained: Tensor | None = None, images: int = HELD_OUT_IMAGES) -> Iterator[Tensor]:
    """Masks of images to hold out, [n] each: every tenth image of each class, another one for each mask.

    A class of fewer images has none in some masks, and its last one in the first. A class of one image is never held out.

    There are no more masks than needed for `images` held-out images.

    Where there are images that no prompt was trained on, only they are held out, each once, and no more than a tenth of all
    images at a time: images that prompts were trained on look easier than new ones.

    Args:
        targets: class index of each image [n].
        untrained: True for the images that no prompt was trained on [n]; None, or none of them: there is no difference.
        images: number of held-out images that are enough.
    """
    if untrained is not None and untrained.any():
        yield from _untrained_folds(targets, untrained)
        return
    position, size = torch.zeros_like(targets), torch.zeros_like(targets)
    for target in targets.unique():
        rows = (targets == target).nonzero().flatten()
        position[rows] = torch.arange(len(rows), device=targets.device)
        size[rows] = len(rows)
    for fold in range(min(FOLDS, max(1, -(-FOLDS * images // len(targets))))):
        held = ((position % FOLDS) == (size.clamp_max(FOLDS) - 1 - fold)) & (size > 1)
        if held.any():
            yield held


def _untrained_folds(targets: Tensor, untrained: Tensor) -> Iterator[Tensor]:
    """The masks of `folds` of the `untrained` images, without the images of classes that have no others."""
    rows = (untrained & torch.isin(targets, targets[~untrained])).nonzero().flatten()
    parts = -(-FOLDS * len(rows) // len(targets))
    for part in range(parts):
        held = torch.zeros_like(untrained)
        held[rows[part::parts]] = True
        yield held


def log_scores(scores: Tensor, width: float | None) -> Tensor:
    """What the temperature divides: log softplus(s / width) of the scores of a regression. Their order stays.

    Args:
        scores: [B, C]; -inf for classes without images.
        width: of the softplus, in units of the scores; None: the scores are logits, which are returned.
    """
    if width is None:
        return scores
    scaled = scores / width
    # Below -20, where float32 would round softplus to 0, log softplus(x) = x.
    return torch.where(scaled < -20, scaled, F.softplus(scaled.clamp_min(-20)).log())


@torch.no_grad()
def fit_temperature(logits: Tensor, targets: Tensor) -> float | None:
    """The temperature with the smallest cross entropy on held-out images and one further image that is answered wrongly.

    The further image keeps the temperature of few images, all answered rightly, away from 0. It is the mean of all images,
    with the class of the second largest logit as its target.

    Args:
        logits: [n, C]; -inf for classes without images.
        targets: class index of each image [n].

    Returns:
        A number from 1e-4 to 1e4; None if there is no image, only one class, or all logits of an image are equal.
    """
    logits, targets = _scored(logits, targets)
    logits = logits - logits.amax(1, keepdim=True)
    finite = logits.masked_fill(logits == -math.inf, 0.0)
    if not finite.any():
        return None
    wanted = finite.gather(1, targets[:, None]).sum() + logits.topk(2, 1).values[:, 1].mean()
    weight = 1 + 1 / len(targets)
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(50):  # the slope of the cross entropy over 1 / temperature rises: its zero is found by bisection
        middle = (low + high) / 2
        expected = (logits.mul(math.exp(-middle)).softmax(1) * finite).sum() * weight
        low, high = (low, middle) if expected < wanted else (middle, high)
    return math.exp((low + high) / 2)


def _scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64 and targets of the images whose class and a further one have finite logits."""
    logits, targets = logits.cpu().double(), targets.cpu()  # Apple's devices have no float64
    known = logits.gather(1, targets[:, None])[:, 0].isfinite() & (logits.isfinite().sum(1) > 1) & ~logits.isnan().any(1)
    return logits[known], targets[known]


@torch.no_grad()
def information(logits: Tensor, targets: Tensor, temperature: float) -> float:
    """What these images tell of the logarithm of their temperature: the curvature of the cross entropy over it.

    It is the sum over the images of the variance of z / T under their softmax. Where few answers are wrong, the further one
    of `fit_temperature` decides, so that the sum is multiplied by (w + 0.1) / (w + 1) for w wrong answers (ours).

    Args:
        logits: [n, C]; -inf for classes without images.
        targets: class index of each image [n].
        temperature: from `fit_temperature`.
    """
    logits, targets = _scored(logits, targets)
    wrong = int((logits.argmax(1) != targets).sum())
    scaled = logits / temperature
    scaled = scaled - scaled.amax(1, keepdim=True)
    probabilities = scaled.softmax(1)
    scaled = scaled.masked_fill(probabilities == 0, 0.0)
    mean = (probabilities * scaled).sum(1, keepdim=True)
    return float((probabilities * (scaled - mean).square()).sum()) * (wrong + 0.1) / (wrong + 1)


@dataclass(frozen=True)
class TaskTemperatures:
    """The temperature of each task's held-out images, for the number of classes known now.

    Args:
        values: of each task; any number where there were no images.
        information: of each task's images about it; the weight of its logarithm in means. 0: there were none.
    """

    values: list[float]
    information: list[float]

    @property
    def common(self) -> float | None:
        """The geometric mean over all tasks; None without images."""
        return _mean(self.values, self.information, range(len(self.values)))

    def after(self, task: int, newest: float | None, known: float, growth: float = 1.0) -> TaskTemperatures:
        """The temperatures after the task number `task`.

        Args:
            task: tasks between the last one here and this one have no images; later ones are dropped.
            newest: temperature of its held-out images; None if it is unknown: it stays, if there was one.
            known: `information` of these images.
            growth: what the temperatures of earlier tasks are multiplied by, because there are more classes now.
        """
        values, weights = [growth * value for value in self.values[:task]], self.information[:task]
        missing = task - len(values)
        if newest is None and task < len(self.values):
            newest, known = self.values[task], self.information[task]
        added = (1.0, 0.0) if newest is None else (newest, known)
        return TaskTemperatures([*values, *[1.0] * missing, added[0]], [*weights, *[0.0] * missing, added[1]])

    def of_classes(self, tasks: Sequence[Sequence[int]], classes: int) -> list[float]:
        """The temperature of each class: the geometric mean of its tasks', in which `common` has an information of 100.

        Args:
            tasks: class indices of each task.
            classes: number of classes.

        Returns:
            A number for each class; 1 for all where no task has images.
        """
        common = self.common
        own: list[list[int]] = [[] for _ in range(classes)]
        if common is None:
            return [1.0] * classes
        for number, task in enumerate(tasks[: len(self.values)]):
            for index in task:
                own[index].append(number)
        weights = [*self.information, COMMON_INFORMATION]
        return [_mean([*self.values, common], weights, [*numbers, -1]) or common for numbers in own]


def _mean(values: Sequence[float], weights: Sequence[float], chosen: Iterable[int]) -> float | None:
    """The geometric mean of the `chosen` values; None without weights."""
    total, logarithms = 0.0, 0.0
    for number in chosen:
        total += weights[number]
        logarithms += weights[number] * math.log(values[number])
    return math.exp(logarithms / total) if total else None
