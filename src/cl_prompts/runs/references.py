"""Classifiers without prompts on the features of a run's frozen backbone, which a method should beat.

Where un-prompted features are kept in a folder (`query_cache`), the accuracies of these classifiers are kept beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
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
from cl_prompts.continual.feature_cache.cache import folder_of_queries
from cl_prompts.heads import DiscriminantClassifier
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runs.arguments import Arguments, pairs
from cl_prompts.storage.bounded_read import read_json_object
from cl_prompts.storage.staging import staging_folder
from cl_prompts.version import __version__


KIND = 1  # counts up with every change of the references themselves
MAX_BYTES = 64 * 2**20  # of a file of accuracies: 2,000 tasks have 2 million numbers for each reference


def features_of(trainer: ContinualTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Un-prompted features of all training and test images by row number, each [rows, D]. All processes must call it."""
    provider = trainer.feature_provider
    return provider.frozen_features(train=True).cpu(), provider.frozen_features(train=False).cpu()


def references(
    train: torch.Tensor,
    test: torch.Tensor,
    stream: IndexedStream,
    args: Arguments,
    training: ContinualArguments,
    say: Callable[[str], object] = print,
) -> dict[str, AccuracyMatrix]:
    """Accuracies of classifiers without prompts on frozen features of the same images, with the head's learning rate.

    Args:
        train: features of all training images [rows, D].
        test: of all test images [rows, D].
        stream: the tasks.
        args: settings of the run.
        training: settings of its training. If its `query_cache` is a folder, accuracies are read from there and kept there.
        say: called with a message, one line, if they cannot be.
    """
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
    options = pairs(args.config)
    scale = options.get("head_scale", PromptPoolConfig.head_scale) if options.get("head") == "cosine" else None
    folder = folder_of_queries(training.query_cache)
    if folder is None:
        return computed(data, settings, scale)
    file = folder / f"references-{key_of(data, settings | {'cosine_scale': scale})}.json"
    matrices = read(file, say)
    if matrices is None:
        matrices = computed(data, settings, scale)
        write(file, matrices, say)
    return matrices


def computed(data: FrozenFeatures, settings: dict[str, Any], cosine_scale: float | None) -> dict[str, AccuracyMatrix]:
    """Train and fit the references on `data`; `settings` are those of the probes, `cosine_scale` of one more probe."""
    matrices = {"sequential linear probe": sequential_probe(data, **settings)}
    if cosine_scale is not None:
        matrices["sequential cosine probe"] = sequential_probe(data, **settings, cosine_scale=cosine_scale)
    matrices["nearest class mean"] = nearest_class_mean(data)
    width = data.train[0][0].shape[1]
    matrices["discriminant analysis"] = closed_form(data, DiscriminantClassifier(width, drift="none"))
    matrices["joint linear probe"] = joint_linear_probe(data, **settings)
    return matrices


def key_of(data: FrozenFeatures, settings: dict[str, Any]) -> str:
    """Sha256 over all that accuracies depend on: features and class ids of each task, settings, and versions."""
    sha = hashlib.sha256(json.dumps([__version__, torch.__version__, KIND, settings], sort_keys=True).encode())
    for part in (data.train, data.test):
        for tensor in (tensor for task in part for tensor in task):
            sha.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.contiguous().numpy().data)
    return sha.hexdigest()


def read(file: Path, say: Callable[[str], object]) -> dict[str, AccuracyMatrix] | None:
    """Accuracies that `write` kept in `file`; None if there are none, or if `say` is told that they are damaged."""
    try:
        content = read_json_object(file, MAX_BYTES)
        if not content:
            raise ValueError("it has no accuracies")
        return {name: AccuracyMatrix.from_dict(values) for name, values in content.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        say(f"query cache: {file} cannot be used ({error}) and is computed again")
        return None


def write(file: Path, matrices: dict[str, AccuracyMatrix], say: Callable[[str], object]) -> None:
    """Keep accuracies in `file`; `say` is told if that is not possible."""
    try:
        with staging_folder(file.parent) as staging:
            text = json.dumps({name: matrix.to_dict() for name, matrix in matrices.items()})
            (staging / file.name).write_text(text)
    except (OSError, ValueError) as error:
        say(f"query cache: nothing could be kept in {file.parent} ({error})")
