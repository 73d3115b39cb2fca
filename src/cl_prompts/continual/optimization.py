"""Optimizers and learning rate schedules of a task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def _cosine(progress: float, epoch: int, epochs: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _coda_cosine(progress: float, epoch: int, epochs: int) -> float:
    return math.cos(99 * math.pi * epoch / (200 * (epochs - 1))) if epochs > 1 else 1.0


# (share of the task's steps done, epoch, epochs) -> factor on the learning rate
SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "constant": lambda progress, epoch, epochs: 1.0,
    "cosine": _cosine,
    "linear": lambda progress, epoch, epochs: 1 - progress,
    # CODA-Prompt's release: by epoch, from 1 to cos(99 pi / 200)
    "coda": _coda_cosine,
}


def rate_factor(schedule: str, step: int, steps: int, warmup: int, epoch: int, epochs: int) -> float:
    """Factor on the learning rate of step number `step` of a task: a linear warm-up, then the schedule.

    A function of the position alone, so that a resumed run needs no state for it.

    Args:
        schedule: "constant", "cosine" (to 0 over the steps after the warm-up), "linear" (likewise) or "coda".
        step: from 0.
        steps: steps of the task.
        warmup: steps of the warm-up; step k of them has factor (k + 1) / (warmup + 1).
        epoch, epochs: the epoch the step is in, from 0, and the task's number of them.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(steps - warmup, 1), epoch, epochs)


def build_optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """An optimizer over parameter groups; each group remembers its own rate as `base_lr`.

    Args:
        name: "adam", "adamw" or "sgd".
        groups: from `model.parameter_groups(learning_rate)`.
        options: of the torch class (`weight_decay`, `betas`, `momentum`, `nesterov`).
    """
    return OPTIMIZERS[name]([{**group, "base_lr": group["lr"]} for group in groups], **options)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its own rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]


def keep_state(
    old: torch.optim.Optimizer, before: dict[str, nn.Parameter], new: torch.optim.Optimizer, after: dict[str, nn.Parameter]
) -> None:
    """Hand an optimizer's state to one over the parameters of the next task.

    A parameter that is still the same keeps its state; one that has taken the place of a smaller one of its name (a head
    that grew by rows) keeps it for the old rows, zeros for the new; all others start afresh.

    Args:
        old, new: the optimizers.
        before, after: parameters by name, before and after `begin_task`.
    """
    for name, parameter in after.items():
        previous = before.get(name)
        if previous is None or previous not in old.state:
            continue
        grown = len(parameter) > len(previous) and parameter.shape[1:] == previous.shape[1:] if parameter.dim() else False
        if parameter is previous or grown:
            new.state[parameter] = {key: _fit(value, previous, parameter) for key, value in old.state[previous].items()}


def _fit(value: Any, previous: Tensor, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != previous.shape or value.shape == parameter.shape:
        return value
    grown = value.new_zeros(parameter.shape)
    grown[: len(value)] = value
    return grown
