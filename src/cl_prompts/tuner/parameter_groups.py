"""Optimizer groups of what an adapter trains, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.validation import check_trainable


def parameter_groups(
    adapter: PoolAdapter, base: nn.Module, learning_rate: float, learning_rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Dicts with `name`, `params` and `lr`; see `TaskAPI.parameter_groups`.

    Raises:
        ValueError: a name in `learning_rates` is not a group, or the adapter was loaded without `is_trainable`.
    """
    check_trainable(adapter)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(adapter.group_of(name), []).append(parameter)
    of_base = [p for p in base.parameters() if p.requires_grad]
    if of_base:
        groups["base"] = of_base
    known = {"prompts", "keys", "routers", "head", "base"}
    unknown = sorted(set(learning_rates) - known)
    if unknown:
        raise ValueError(f"no parameter group is called {unknown}: choose from {sorted(known)}")
    return [
        {"name": name, "params": params, "lr": learning_rates.get(name, learning_rate)} for name, params in groups.items()
    ]
