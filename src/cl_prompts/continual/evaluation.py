"""Class-incremental evaluation: the model gets images and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.collectives import gather_over_processes, sum_over_processes
from cl_prompts.continual.streams import PADDING_LABEL
from cl_prompts.model import extract_features


@dataclass(frozen=True)
class Evaluation:
    """What was measured on some images, over all processes.

    Args:
        accuracy: in percent.
        images: their number.
        prompt_ids: which prompts were chosen for each [images, ..., k], on the CPU, process by process; None where a method
            chooses none.
    """

    accuracy: float
    images: int
    prompt_ids: Tensor | None


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[dict[str, Any]], classes: list[int], device: Any) -> Evaluation:
    """Show images to a model, and nothing else.

    Args:
        model: in eval mode; gets `pixel_values` only.
        batches: this process's share, with `pixel_values` and `labels`.
        classes: class id of each column of the logits.
        device: where the model is.
    """
    ids = torch.tensor(classes)
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    chosen = []
    for batch in batches:
        output = model(pixel_values=batch["pixel_values"].to(device))
        predicted = ids[output.logits.argmax(1).cpu()]
        real = batch["labels"] != PADDING_LABEL
        hits += torch.stack([(predicted == batch["labels"])[real].sum(), real.sum()]).to(device)
        if output.prompt_ids is not None:
            chosen.append(output.prompt_ids[real.to(device)])
    right, images = sum_over_processes(hits).tolist()
    if not images:
        raise ValueError("there are no images to evaluate on")
    prompt_ids = torch.cat(gather_over_processes(torch.cat(chosen))).cpu() if chosen else None
    return Evaluation(100 * right / images, images, prompt_ids)


def accuracy(model: nn.Module, batches: Iterable[dict[str, Any]], classes: list[int], device: Any) -> tuple[float, int]:
    """Accuracy in percent over all processes, and the number of images; arguments as in `evaluate`."""
    found = evaluate(model, batches, classes, device)
    return found.accuracy, found.images


@torch.no_grad()
def stream_features(model: Any, batches: Iterable[dict[str, Any]], rows: int, device: Any) -> Tensor:
    """Un-prompted features of all images of a stream by row number: [rows, D] on the CPU, zeros for rows not asked for.

    Args:
        model: a model with a prompt pool, not wrapped.
        batches: this process's share (`ClassIncrementalStream.all_images`).
        rows: number of rows of the data set.
        device: where the model is.
    """
    found, numbers = [], []
    for batch in batches:
        features = extract_features(model, batch["pixel_values"].to(device)).cpu()
        sample_ids = torch.tensor(batch["sample_ids"])
        found.append(features[sample_ids >= 0])
        numbers.append(sample_ids[sample_ids >= 0])
    features, positions = torch.cat(found).to(device), torch.cat(numbers).to(device)
    table = torch.zeros(rows, features.shape[1])
    for part, where in zip(gather_over_processes(features), gather_over_processes(positions), strict=True):
        table[where.cpu()] = part.cpu()
    return table
