"""The order of classes over tasks: ascending, by a seed, as a release draws it, or as listed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cl_prompts.continual import split_classes
from cl_prompts.runtime.text import short_repr


PILOT_SEED = 1993  # of LAMDA-PILOT's scripts, and of many papers before
NAMED = ("natural", "seed", "pilot", "coda")


def ordered_classes(
    classes: Sequence[Any], order: Sequence[str], seed: int, names: Mapping[int, str] | None = None
) -> list[Any]:
    """Classes in the order in which tasks bring them.

    Args:
        classes: class ids, or class names.
        order: "natural" (ascending), "seed" (NumPy's `default_rng(seed)`), "pilot" (LAMDA-PILOT: NumPy's
            `RandomState(1993)`, whatever the seed), "coda" (CODA-Prompt: Python's `random` by the seed; seed 0 is
            ascending), the names or ids of all classes, or a file that lists them in YAML, in JSON or separated by spaces.
            Words that are names of all classes, like those of folders "0", "1", "10", are names.
        seed: of the run.
        names: names of classes by id, for classes that are ids.

    Raises:
        ValueError: `order` is empty, no such file exists, or it does not list every class once.
    """
    ascending = [c for part in split_classes(classes, 1) for c in part]
    numbers = np.arange(len(ascending)).tolist()
    if list(order) == ["seed"]:
        numbers = np.random.default_rng(seed).permutation(len(ascending)).tolist()
    elif list(order) == ["pilot"]:
        numbers = np.random.RandomState(PILOT_SEED).permutation(len(ascending)).tolist()
    elif list(order) == ["coda"]:
        if seed > 0:
            random.Random(seed).shuffle(numbers)
    elif list(order) != ["natural"]:
        return _listed(ascending, _words(order), names or {})
    return [ascending[number] for number in numbers]


def tasks_in_order(
    classes: Sequence[Any],
    tasks: int | Sequence[int],
    order: Sequence[str],
    seed: int,
    names: Mapping[int, str] | None = None,
) -> list[list[Any]]:
    """`ordered_classes`, split into `tasks`: their number, or the number of classes of each.

    Raises:
        ValueError: see `ordered_classes`; or the classes cannot be split so.
    """
    rest = iter(ordered_classes(classes, order, seed, names))
    return [[next(rest) for _ in part] for part in split_classes(classes, tasks)]


def _words(order: Sequence[str]) -> list[str]:
    """The words of a list, or of the file that it names."""
    if len(order) != 1 or not Path(order[0]).suffix:
        return list(order)
    path = Path(order[0])
    if not path.is_file():
        raise ValueError(
            f"class_order={order[0]!r} is no file: name one, or one of {', '.join(NAMED)}, or all classes in order"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"class_order={order[0]!r} cannot be read: {' '.join(str(error).split())}") from error
    values = content.split() if isinstance(content, str) else content
    if not isinstance(values, list):
        raise ValueError(f"class_order={order[0]!r} holds {short_repr(values)}: list the classes in it, like [3, 1, 2]")
    return [str(value) for value in values]


def _listed(ascending: list[Any], words: list[str], names: Mapping[int, str]) -> list[Any]:
    by_name = {names[c]: c for c in ascending if c in names}
    by_id = {str(c): c for c in ascending}
    tables = [by_name, by_id] if len(by_name) == len(ascending) else [by_id]
    by_word = min(tables, key=lambda table: sum(word not in table for word in words))  # names where both fit
    unknown = [word for word in words if word not in by_word]
    twice = sorted({word for word in words if words.count(word) > 1})
    missing = [word for word in by_word if word not in set(words)]
    if unknown or twice or missing:
        raise ValueError(
            f"class_order must be one of {', '.join(NAMED)}, a file, or list every class once: it has unknown "
            f"{short_repr(unknown)}, twice {short_repr(twice)}, and lacks {short_repr(missing)}"
        )
    return [by_word[word] for word in words]
