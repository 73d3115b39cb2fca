"""Builds the classifier that a config names."""

from __future__ import annotations

from typing import Any

from cl_prompts.heads.aligned import AlignedClassifier
from cl_prompts.heads.base import FeatureClassifier
from cl_prompts.heads.discriminant import DiscriminantClassifier
from cl_prompts.heads.ridge import RidgeClassifier


def build_classifier(config: Any, width: int) -> FeatureClassifier | None:
    """The classifier that `config` names, for features [B, `width`]; None for a trained head without alignment."""
    if config.head in ("ridge", "analytic"):
        return RidgeClassifier(
            width,
            projection_size=config.projection_size,
            ridge=config.ridge,
            drift=config.drift,
            seed=config.classifier_seed,
            save_statistics=config.save_statistics,
        )
    if config.head == "discriminant":
        return DiscriminantClassifier(
            width,
            kind=config.class_covariance,
            drift=config.drift,
            own=config.own_covariance,
            spherical=config.spherical_covariance,
        )
    if config.alignment != "none":
        return AlignedClassifier(
            width,
            kind="full" if config.alignment == "covariance" else config.alignment,
            drift=config.drift,
            seed=config.classifier_seed,
            save_statistics=config.save_statistics,
        )
    return None
