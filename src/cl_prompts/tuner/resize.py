"""Replaces a pool by a larger one. Old rows stay bit-equal; new rows are initialized as in a new pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.interfaces import BackboneShape
from cl_prompts.learner.optimizer_hook import inner_optimizer
from cl_prompts.methods import PromptPool
from cl_prompts.runtime.gathered import gather_statistics
from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.validation import planned_adapter


def grow_pool(adapter: PoolAdapter, shape: BackboneShape, pool_size: int, optimizer: Any = None) -> None:
    """Grow an adapter's pool; see `TaskAPI.grow_pool`. After an error nothing has changed."""
    config, old = adapter.config, adapter.pool
    size = getattr(config, "pool_size", None)
    if size is None:
        raise ValueError(f"{config.method} has no pool_size: its pool grows with every task, call begin_task(classes)")
    if type(pool_size) is not int or pool_size <= size:
        raise ValueError(f"pool_size={pool_size!r}: the pool has {size} prompts and can only grow; give a larger number")
    if optimizer is not None:
        optimizer = inner_optimizer(optimizer)
        _check_grows_along(optimizer, old)
    before = dict(config.__dict__)
    try:
        config.pool_size = pool_size
        config.__post_init__()
        planned_adapter(config, shape, adapter.query_pooling)
        new = PoolAdapter(config, shape, adapter.query_pooling).pool  # a new pool of this size, with all tasks begun
    except BaseException:
        config.__dict__.update(before)
        raise
    gather_statistics(old)
    swapped = _copy_into(new.train(old.training), old)
    adapter.pool = new
    adapter.grown = True
    if optimizer is not None:
        _swap_parameters(optimizer, swapped)
        if adapter.update_scaler.attached:
            adapter.attach_optimizer(optimizer)


@torch.no_grad()
def _copy_into(new: PromptPool, old: PromptPool) -> dict[Tensor, nn.Parameter]:
    """Copy every tensor of `old` into the leading rows (and columns) of that of `new`. Returns new parameters by old."""
    swapped: dict[Tensor, nn.Parameter] = {}
    for name, tensor in [*old.named_parameters(), *old.named_buffers()]:
        owner, _, last = name.rpartition(".")
        module = new.get_submodule(owner)
        larger = _in_the_corner(tensor, getattr(module, last).detach().to(tensor))
        if isinstance(tensor, nn.Parameter):
            swapped[tensor] = nn.Parameter(larger, tensor.requires_grad)
            if tensor.grad is not None:
                swapped[tensor].grad = _in_the_corner(tensor.grad, torch.zeros_like(larger))
            larger = swapped[tensor]
        setattr(module, last, larger)
    return swapped


def _in_the_corner(tensor: Tensor, larger: Tensor) -> Tensor:
    larger[tuple(slice(length) for length in tensor.shape)] = tensor
    return larger


def _check_grows_along(optimizer: torch.optim.Optimizer, pool: PromptPool) -> None:
    """Raise ValueError if an optimizer does not train the pool, or has state of another shape than its parameter."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in pool.named_parameters() if p.requires_grad}
    missing = [name for name, p in parameters.items() if id(p) not in trained]
    if missing:
        raise ValueError(
            f"the optimizer does not train the pool's {missing}: pass the one that was built from "
            "model.parameter_groups(...), or None"
        )
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key} of shape {list(value.shape)} for {name} "
                    f"{list(parameter.shape)}, which cannot grow: call grow_pool without it and build a new optimizer"
                )


def _swap_parameters(optimizer: torch.optim.Optimizer, swapped: Mapping[Tensor, nn.Parameter]) -> None:
    """Replace old parameters by new ones in an optimizer. State of old rows is kept; that of new rows is zero."""
    for group in optimizer.param_groups:
        group["params"] = [swapped.get(p, p) for p in group["params"]]
    for old, new in swapped.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                key: _in_the_corner(value, value.new_zeros(new.shape))
                if isinstance(value, Tensor) and value.shape == old.shape
                else value
                for key, value in optimizer.state.pop(old).items()
            }
