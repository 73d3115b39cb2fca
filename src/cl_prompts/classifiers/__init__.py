"""Classifiers made from features once a task is learnt; torch only. No image is kept."""

from cl_prompts.classifiers.alignment import AlignedClassifier, align
from cl_prompts.classifiers.base import FeatureClassifier
from cl_prompts.classifiers.build import build_classifier
from cl_prompts.classifiers.discriminant import DiscriminantClassifier
from cl_prompts.classifiers.drift import FeatureMap, fit_map
from cl_prompts.classifiers.gaussians import ClassGaussians
from cl_prompts.classifiers.ridge import RidgeClassifier


CLASSIFIERS: dict[str, type[FeatureClassifier]] = {
    "aligned": AlignedClassifier,
    "discriminant": DiscriminantClassifier,
    "ridge": RidgeClassifier,
}

__all__ = [
    "CLASSIFIERS",
    "AlignedClassifier",
    "ClassGaussians",
    "DiscriminantClassifier",
    "FeatureClassifier",
    "FeatureMap",
    "RidgeClassifier",
    "align",
    "build_classifier",
    "fit_map",
]
