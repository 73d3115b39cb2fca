"""Builds the classifier that a config names."""

from __future__ import annotations

from typing import Any

from cl_prompts.heads.aligned import AlignedClassifier
from cl_prompts.heads.base import FeatureClassifier
from cl_prompts.heads.discriminant import DiscriminantClassifier
from cl_prompts.heads.outliers import OutlierRegularizedHead
from cl_prompts.heads.ridge import RidgeClassifier


def build_classifier(config: Any, width: int) -> FeatureClassifier | None:
    """The classifier that `config` names, for features [B, `width`]; None for a trained head alone."""
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
            normalize=config.normalize_features,
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
    if config.outlier_epochs:
        return OutlierRegularizedHead(
            seed=config.classifier_seed,
            epochs=config.outlier_epochs,
            learning_rate=config.outlier_learning_rate,
            weight=config.outlier_weight,
            energy_in=config.outlier_energies[0],
            energy_out=config.outlier_energies[1],
            spread=config.outlier_spread,
            neighbors=config.outlier_neighbors,
            boundary=config.outlier_boundary,
            draws=config.outlier_draws,
            per_class=config.outliers_per_class,
        )
    return None
