"""Class-incremental evaluation: the model gets images and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.collectives import gather_over_processes, sum_over_processes
from cl_prompts.continual.streams import PADDING_LABEL
from cl_prompts.model import extract_features


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[dict[str, Any]], classes: list[int], device: Any) -> tuple[float, int]:
    """Accuracy in percent over all processes, and the number of images.

    Args:
        model: in eval mode; gets `pixel_values` only.
        batches: this process's share, with `pixel_values` and `labels`.
        classes: class id of each column of the logits.
        device: where the model is.
    """
    ids = torch.tensor(classes)
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        predicted = ids[model(pixel_values=batch["pixel_values"].to(device)).logits.argmax(1).cpu()]
        real = batch["labels"] != PADDING_LABEL
        hits += torch.stack([(predicted == batch["labels"])[real].sum(), real.sum()]).to(device)
    right, images = sum_over_processes(hits).tolist()
    if not images:
        raise ValueError("there are no images to evaluate on")
    return 100 * right / images, images


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
