"""Rows of a comparison that are all combinations of some settings' values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cl_prompts.runtime.text import short_repr


@dataclass(frozen=True)
class Sweep:
    """A grid of settings.

    Args:
        values: the values of each setting, by its name; settings of the method are named alone, like "prompt_length".
        rows: arguments of each row by its name.
        points: the values that a row stands for, in the order of `values`, by its name.
    """

    values: dict[str, list[Any]]
    rows: dict[str, dict[str, Any]]
    points: dict[str, tuple[Any, ...]]


def read_sweep(content: Any, settings: Mapping[str, Any]) -> Sweep:
    """The grid of a comparison file, `{config: {top_k: [1, 5]}, learning_rate: [0.01, 0.03]}`.

    Args:
        content: what the file has as `sweep`.
        settings: arguments of all rows.

    Raises:
        ValueError: it is no mapping, or a setting has no list of values.
    """
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"sweep={short_repr(content)} must map settings to lists of values, like {{batch_size: [16, 128]}}"
        )
    of_method = content.get("config", {})
    plain = {name: values for name, values in content.items() if name != "config"}
    if not isinstance(of_method, dict):
        raise ValueError(f"sweep: config has {short_repr(of_method)}: map the method's settings to lists of values")
    for name, values in [*plain.items(), *of_method.items()]:
        if not isinstance(values, list) or not values:
            raise ValueError(f"sweep: {name} has {short_repr(values)}: give a list of values, like [1, 5, 10]")
    values = {**of_method, **plain}
    rows, points = {}, {}
    for point in itertools.product(*values.values()):
        chosen = dict(zip(values, point, strict=True))
        config = {**(settings.get("config") or {}), **{name: chosen[name] for name in of_method}}
        name = ", ".join(f"{key} {value}" for key, value in chosen.items())
        rows[name] = {**settings, **{key: chosen[key] for key in plain}, **({"config": config} if config else {})}
        points[name] = point
    return Sweep(values, rows, points)
