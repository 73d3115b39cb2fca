"""Tiny models that learn tasks with a classifier made from features, step by step as a user would."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_prompts import get_prompt_pool_model
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER
from support.small_runs import CLASSES, pictures


def new_model(method: str, **config: Any) -> Any:
    base = build("vit")
    torch.manual_seed(3)
    return get_prompt_pool_model(base, {**METHODS, **WITH_CLASSIFIER}[method](**config))


def task_images(classes: Sequence[int], per_class: int = 6, seed: int = 1) -> dict[str, Any]:
    """One batch of images, numbered."""
    labels = [c for _ in range(per_class) for c in classes]
    pixels = pictures(labels, seed + 10 * classes[0])
    return {"pixel_values": pixels, "labels": torch.tensor(labels), "sample_ids": list(range(len(labels)))}


def in_batches(images: dict[str, Any], size: int) -> list[dict[str, Any]]:
    rows = range(0, len(images["labels"]), size)
    return [{name: value[i : i + size] for name, value in images.items()} for i in rows]


def train_steps(model: Any, images: dict[str, Any], steps: int = 2, lr: float = 0.02) -> None:
    """Steps that change every prompt: weight decay moves rows without a gradient, too."""
    optimizer = torch.optim.AdamW(model.parameter_groups(learning_rate=lr), weight_decay=0.1)
    model.attach_optimizer(optimizer)
    model.train()
    for _ in range(steps):
        model(**images).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def learn_task(
    model: Any, classes: Sequence[int], *, revisit: bool = False, train: bool = True, seed: int = 1, **names: Any
) -> None:
    """One task as the trainer takes it."""
    images = task_images(classes, seed=seed)
    if model.needs_features_before and model.classes:
        model.eval().record_features(in_batches(images, 5))
    model.begin_task(classes, revisit=revisit, **names)
    if train:
        train_steps(model, images)
    model.eval()
    if model.needs_consolidation:
        model.consolidate(in_batches(images, 5))
    model.end_task()


def learnt_model(method: str, tasks: Sequence[Sequence[int]] = CLASSES, **config: Any) -> Any:
    model = new_model(method, **config)
    for task in tasks:
        learn_task(model, task, train=model.trains_task(len(model.adapter.config.state.tasks)))
    return model


SEEN = pictures([0, 1, 2, 3, 4, 5, 1, 3], seed=77)


@torch.no_grad()
def answers(model: Any, seen: Tensor = SEEN) -> Tensor:
    found: Tensor = model.eval()(pixel_values=seen).logits
    return found


@torch.no_grad()
def features(model: Any, seen: Tensor = SEEN) -> Tensor:
    """What the classifier reads, as `model.features_of` sees it."""
    found: Tensor = model.eval().features_of({"pixel_values": seen})
    return found


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.training_state_dict()["tensors"].items()}
