"""Builds the classifier that a config names."""

from __future__ import annotations

from typing import Any

from cl_prompts.heads.aligned import AlignedClassifier
from cl_prompts.heads.base import FeatureClassifier
from cl_prompts.heads.discriminant import DiscriminantClassifier
from cl_prompts.heads.ridge import RidgeClassifier


def build_classifier(config: Any, width: int) -> FeatureClassifier | None:
    """The classifier that `config` names, for features [B, `width`]; None for a trained head without alignment."""
    # The ridge and the aligned head draw from covariances, of low rank or whole.
    kind, rank = config.class_covariance, config.covariance_rank
    drawn_from = kind if kind == "low_rank" else "full"
    if config.head in ("ridge", "analytic"):
        return RidgeClassifier(
            width,
            projection_size=config.projection_size,
            ridge=config.ridge,
            drift=config.drift,
            seed=config.classifier_seed,
            kind=drawn_from,
            rank=rank,
            save_statistics=config.save_statistics,
        )
    if config.head == "discriminant":
        return DiscriminantClassifier(
            width,
            kind=kind,
            rank=rank,
            drift=config.drift,
            own=config.own_covariance,
            spherical=config.spherical_covariance,
        )
    if config.alignment != "none":
        return AlignedClassifier(
            width,
            kind=drawn_from if config.alignment == "covariance" else config.alignment,
            rank=rank,
            drift=config.drift,
            seed=config.classifier_seed,
            save_statistics=config.save_statistics,
        )
    return None
