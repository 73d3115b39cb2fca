"""The novelty threshold after classes are forgotten or merged: no image is at hand then to choose it again.

Features of the classes that are left are drawn from what is kept of them. The threshold moves by as much as the novelty
moves that a share `false_alarm_rate` of these features exceeds (ours).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.novelty import threshold_of
from cl_prompts.heads.sampling import FeatureSampler
from cl_prompts.tuner.adapter import PoolAdapter


IMAGES = 100  # drawn of each class of each task
MOST = 20_000  # drawn of all classes
AT_ONCE = 256  # answered


@dataclass(frozen=True)
class KnownFeatures:
    """Features drawn of the classes that are left, with their novelty before the change.

    Args:
        features: [n, D].
        novelty: at test [n].
    """

    features: Tensor
    novelty: Tensor

    @classmethod
    def of(cls, adapter: PoolAdapter, left: Sequence[bool]) -> KnownFeatures | None:
        """Draw features.

        Args:
            adapter: before the change.
            left: for each of its classes, whether it is not forgotten.

        Returns:
            None if the adapter has no statistics of every class.
        """
        sampler = _sampler(adapter)
        if sampler is None:
            return None
        images = max(1, min(IMAGES, MOST // len(sampler.class_indices)))
        features, indices = sampler.draw(images, torch.Generator().manual_seed(0))
        features = features[torch.tensor(left)[indices]]
        return cls(features, novelty_of(adapter, features))


def _sampler(adapter: PoolAdapter) -> FeatureSampler | None:
    parts = [] if adapter.classifier is None else [*adapter.classifier.modules()]
    for part in parts:
        if isinstance(part, ClassGaussians) and part.count.any():
            return part.sampler(own=1.0, spherical=0.1)
    running = adapter.running_gaussians
    return running.sampler() if running is not None and len(running.count) and running.count.all() else None


@torch.no_grad()
def novelty_of(adapter: PoolAdapter, features: Tensor) -> Tensor:
    """Novelty at test [n] of `features` [n, D]."""
    found = [adapter.novelty(part, adapter.calibrated(adapter.classify(part), part)) for part in features.split(AT_ONCE)]
    return torch.cat(found)


def threshold_after(
    adapter: PoolAdapter, known: KnownFeatures | None, call: str, earlier_temperature: float | None
) -> float | None:
    """The threshold after a change of classes.

    Args:
        adapter: after the change, with the threshold of before.
        known: of the adapter before the change.
        call: name of the caller, for messages.
        earlier_temperature: before the change.

    Returns:
        None if there was none, one class is left (novelty compares classes), or energies have another temperature than
        the threshold and nothing is known to move it by.
    """
    state, rate = adapter.config.state, adapter.config.false_alarm_rate
    threshold, same_temperature = state.novelty_threshold, state.temperature == earlier_temperature
    if threshold is None or len(state.classes) == 1 or (state.temperature is None and not same_temperature):
        return None
    if known is None:
        means = (
            "known images exceed it more often or less often than false_alarm_rate says"
            if same_temperature
            else "there is none, because energies have another temperature now"
        )
        warnings.warn(
            f"{call}: no statistics of the classes' features are kept to move novelty_threshold by. Until the next task is "
            f"consolidated, {means}. A discriminant head keeps them, and so does save_statistics=True with a trained or an "
            "aligned head",
            stacklevel=5,
        )
        return threshold if same_temperature else None
    before = threshold_of(known.novelty, rate)
    after = threshold_of(novelty_of(adapter, known.features), rate)
    return None if before is None or after is None else threshold + after - before
