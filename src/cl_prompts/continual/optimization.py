"""Optimizers and learning rate schedules of a task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.distributed import world_size


Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine", "linear", "coda"]
OPTIMIZERS: dict[Optimizer, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def _cosine(progress: float, epoch: int, epochs: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _coda_cosine(progress: float, epoch: int, epochs: int) -> float:
    return math.cos(99 * math.pi * epoch / (200 * (epochs - 1))) if epochs > 1 else 1.0


# (share of the task's steps done, epoch, epochs) -> factor on the learning rate
SCHEDULES: dict[Schedule, Callable[[float, int, int], float]] = {
    "constant": lambda progress, epoch, epochs: 1.0,
    "cosine": _cosine,
    "linear": lambda progress, epoch, epochs: 1 - progress,
    # As in CODA-Prompt's released code: per epoch, from 1 to cos(99 pi / 200).
    "coda": _coda_cosine,
}


def rate_factor(schedule: Schedule, step: int, steps: int, warmup: int, epoch: int, epochs: int) -> float:
    """Factor on the learning rate of one step of a task: a linear warm-up, then the schedule.

    It depends on the position only, so checkpoints need no scheduler state.

    Args:
        schedule: "constant", "cosine" or "linear" (both to 0 over the steps after the warm-up), or "coda".
        step: number of the step in the task, from 0.
        steps: number of steps of the task.
        warmup: number of warm-up steps; warm-up step k has the factor (k + 1) / (warmup + 1).
        epoch, epochs: number of the step's epoch, from 0, and number of epochs of the task.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(steps - warmup, 1), epoch, epochs)


def build_optimizer(name: Optimizer, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Build an optimizer. Each group keeps its initial learning rate as `base_lr`.

    On CUDA one kernel updates all parameters (`fused`), unless `options` choose another implementation.

    Args:
        name: "adam", "adamw" or "sgd".
        groups: from `model.parameter_groups(learning_rate)`.
        options: arguments of the torch class (`weight_decay`, `betas`, `momentum`, `nesterov`).
    """
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    if on_cuda and not options.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        options["fused"] = True
    return OPTIMIZERS[name]([{**group, "base_lr": group["lr"]} for group in groups], **options)


def prepare(
    accelerator: Accelerator, model: Learner, optimizer: torch.optim.Optimizer, equal: dict[str, tuple[int, int]]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and the optimizer of a task, wrapped by Accelerate.

    `DistributedDataParallel` makes all processes' parameters and buffers equal when it wraps. It would send the buffers
    again before every step: earlier prompts, class statistics, matrices. They stay equal without, since counts are sums
    over processes. Frozen parameters that have not changed since an earlier task, as the backbone's, are not sent again.

    Args:
        accelerator: the run's accelerator.
        model: the learner.
        optimizer: of the task.
        equal: identity and version of the frozen parameters that are equal on all processes, by name; it is updated.
    """
    versions = {name: (id(p), p._version) for name, p in model.named_parameters() if not p.requires_grad}
    if world_size() > 1:
        unchanged = [name for name, version in versions.items() if equal.get(name) == version]
        sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]  # see `tuner.sharding`
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {*unchanged, *sharded})
    wrapped, prepared = accelerator.prepare(model, optimizer)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.broadcast_buffers = False
        equal.clear()
        equal.update({name: (id(p), p._version) for name, p in model.named_parameters() if name in versions})
    return wrapped, prepared


def release(accelerator: Accelerator, model: Learner, wrapped: nn.Module) -> None:
    """Undo `prepare` after a task, so that the model, which grows, can be wrapped again."""
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    for attribute in ("forward", "_is_accelerate_prepared"):
        # With these attributes Accelerate would not prepare the model again: the next task would lack mixed precision.
        vars(model).pop(attribute, None)
    accelerator.free_memory()


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]


def keep_state(
    old: torch.optim.Optimizer, before: dict[str, nn.Parameter], new: torch.optim.Optimizer, after: dict[str, nn.Parameter]
) -> None:
    """Copy the state of the last task's optimizer into the next task's.

    An unchanged parameter keeps its state. A parameter that replaces one of the same name with fewer rows (a grown head)
    keeps the state of the old rows; new rows get zeros. All others have no state.

    Args:
        old, new: optimizers of the last and the next task.
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
