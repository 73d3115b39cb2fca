"""Novelty of an image, which is high for images of classes that nobody has taught, and the threshold of "none of these".

A head made from class Gaussians measures the angle between a feature and the class means in the space in which the pooled
covariance is the identity, relative to the mean of all classes: 1 - the largest cosine, from 0 to 2 (ours; for features of
a frozen network alone, Mahalanobis distances: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution
Samples", NeurIPS 2018). Other heads have the energy -T logsumexp(logits / T) (Liu et al., "Energy-based Out-of-distribution
Detection", NeurIPS 2020), with the calibrated temperature T.
"""

from __future__ import annotations

import torch
from torch import Tensor


FEWEST_IMAGES = 5  # held out, for a threshold
EARLIER_IMAGES = 100  # held-out images that the threshold so far counts as


def energy(logits: Tensor, temperature: float) -> Tensor:
    """-T logsumexp of logits [B, C] that are divided by T, the `temperature`: [B]."""
    return -temperature * logits.float().logsumexp(1)


def threshold_of(scores: Tensor, rate: float) -> float | None:
    """The novelty that a share `rate` of held-out images with these `scores` [n] exceeds; None if they are too few."""
    scores = scores[scores.isfinite()].cpu().double()  # Apple's devices have no float64
    if len(scores) < FEWEST_IMAGES:
        return None
    return float(torch.quantile(scores, 1 - rate, interpolation="higher"))


def threshold_carried_on(earlier: float | None, newest: float | None, images: int) -> float | None:
    """The threshold after a task: a mean, in which the earlier one counts as 100 held-out images.

    More classes leave less room between them, so the novelty of known images falls from task to task.

    Args:
        earlier: threshold before the task; None if there was none.
        newest: that of the task's `images` held-out images; None if they were too few.
        images: their number.
    """
    if earlier is None or newest is None:
        return earlier if newest is None else newest
    return (images * newest + EARLIER_IMAGES * earlier) / (images + EARLIER_IMAGES)
