"""Classifiers: the trained head, and those computed from the features of a task after its training. No image is kept."""

from cl_prompts.heads.aligned import AlignedClassifier, align
from cl_prompts.heads.base import FeatureClassifier
from cl_prompts.heads.build import build_classifier
from cl_prompts.heads.class_means import ClassMeans, class_means, class_sums
from cl_prompts.heads.discriminant import DiscriminantClassifier
from cl_prompts.heads.drift import FeatureMap, fit_map
from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.outliers import OutlierRegularizedHead, regularize_head
from cl_prompts.heads.retrained import RetrainedHead
from cl_prompts.heads.ridge import RidgeClassifier


CLASSIFIERS: dict[str, type[FeatureClassifier]] = {
    "aligned": AlignedClassifier,
    "discriminant": DiscriminantClassifier,
    "ridge": RidgeClassifier,
}

__all__ = [
    "CLASSIFIERS",
    "AlignedClassifier",
    "ClassGaussians",
    "ClassMeans",
    "DiscriminantClassifier",
    "FeatureClassifier",
    "FeatureMap",
    "OutlierRegularizedHead",
    "RetrainedHead",
    "RidgeClassifier",
    "align",
    "build_classifier",
    "class_means",
    "class_sums",
    "fit_map",
    "regularize_head",
]
