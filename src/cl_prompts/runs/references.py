"""Classifiers without prompts on the features of a run's frozen backbone, which a method should beat."""

from __future__ import annotations

from typing import Any

import torch

from cl_prompts.continual import (
    AccuracyMatrix,
    ContinualArguments,
    ContinualTrainer,
    FrozenFeatures,
    IndexedStream,
    closed_form,
    joint_linear_probe,
    nearest_class_mean,
    sequential_probe,
)
from cl_prompts.heads import DiscriminantClassifier
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runs.arguments import Arguments, pairs


def features_of(trainer: ContinualTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Un-prompted features of all training and test images by row number, each [rows, D]. All processes must call it."""
    provider = trainer.feature_provider
    return provider.frozen_features(train=True).cpu(), provider.frozen_features(train=False).cpu()


def references(
    train: torch.Tensor, test: torch.Tensor, stream: IndexedStream, args: Arguments, training: ContinualArguments
) -> dict[str, AccuracyMatrix]:
    """Accuracies of classifiers without prompts on frozen features of the same images, with the head's learning rate."""
    data = FrozenFeatures(
        [(train[task.train_rows], torch.as_tensor(stream.train_labels[task.train_rows])) for task in stream],
        [(test[task.test_rows], torch.as_tensor(stream.test_labels[task.test_rows])) for task in stream],
    )
    settings: dict[str, Any] = {
        "num_train_epochs": 1 if training.max_steps else training.num_train_epochs,  # a dry run is short
        "batch_size": training.batch_size,
        "learning_rate": training.to_dict()["learning_rates"].get("head", training.learning_rate),
        "seed": training.seed,
    }
    matrices = {"sequential linear probe": sequential_probe(data, **settings)}
    options = pairs(args.config)
    if options.get("head") == "cosine":
        scale = options.get("head_scale", PromptPoolConfig.head_scale)
        matrices["sequential cosine probe"] = sequential_probe(data, **settings, cosine_scale=scale)
    matrices["nearest class mean"] = nearest_class_mean(data)
    width = data.train[0][0].shape[1]
    matrices["discriminant analysis"] = closed_form(data, DiscriminantClassifier(width, drift="none"))
    matrices["joint linear probe"] = joint_linear_probe(data, **settings)
    return matrices
