"""Changes of an adapter's classes between tasks; see `ClassAPI`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from cl_prompts.heads.calibration import TaskTemperatures
from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.runtime.precision import without_autocast
from cl_prompts.runtime.text import short_repr
from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.novelty_threshold import KnownFeatures, threshold_after
from cl_prompts.tuner.validation import check_ready


def find_classes(adapter: PoolAdapter, given: Iterable[Any]) -> list[int]:
    """Ids of classes that are given by id or name.

    Raises:
        TypeError: one is neither an integer nor a text.
        ValueError: one is unknown, given twice, or a name of several classes; or there is none.
    """
    known, names = set(adapter.classes), adapter.config.state.class_names
    found: list[int] = []
    for one in given.tolist() if hasattr(given, "tolist") else given:
        if isinstance(one, str):
            ids = [int(c) for c, name in names.items() if name == one and int(c) in known]
            if len(ids) > 1:
                raise ValueError(f"classes {ids} have the name {short_repr(one)}: give the id of one")
            one = ids[0] if ids else one
        elif isinstance(one, bool) or not hasattr(one, "__index__"):
            raise TypeError(f"class {short_repr(one)} must be an id, as it stands in `labels`, or a name")
        if one not in known:
            raise ValueError(f"class {short_repr(one)} is unknown; known are {short_repr(adapter.classes)}")
        if int(one) in found:
            raise ValueError(f"class {int(one)} is given twice")
        found.append(int(one))
    if not found:
        raise ValueError("no class is given: name at least one")
    return found


def merged_ids(adapter: PoolAdapter, classes: list[int], into: Any) -> dict[int, int | None]:
    """The new id of each class that is merged.

    Raises:
        TypeError, ValueError: as `ClassAPI.merge_classes`.
    """
    config = adapter.config
    if isinstance(into, str) or into in adapter.classes:
        (target,) = find_classes(adapter, [into])
    elif isinstance(into, bool) or not hasattr(into, "__index__"):
        raise TypeError(f"into={short_repr(into)} must be a class id or the name of a known class")
    else:
        target = int(into)
    if not 0 <= target < 2**63:
        raise ValueError(f"into={target} is no class id: ids are from 0 to 2**63 - 1")
    merged = {*classes, target} & set(adapter.classes)
    if len(merged) < 2:
        raise ValueError(f"merge_classes({classes}, into={short_repr(into)}) needs at least two known classes")
    if not config.closed_form and config.alignment == "none":
        raise ValueError(
            f'head="{config.head}" is trained, and one row of it cannot answer for two classes: add their probabilities, '
            'or use a head made from statistics, like head="discriminant"'
        )
    return dict.fromkeys(merged, target)


@without_autocast()
def change_classes(adapter: PoolAdapter, new_id: Mapping[int, int | None], call: str) -> PoolAdapter:
    """A copy of an adapter with other classes.

    Args:
        adapter: between tasks; it is not changed.
        new_id: id after the change of the classes that change; None for one that is forgotten.
        call: name of the caller, for messages.

    Raises:
        ValueError: a task is open, the adapter has no tasks or was cast, or the statistics cannot be changed.
    """
    check_ready(adapter, learning=False)
    if adapter.config.num_labels is not None:
        raise ValueError(f"num_labels={adapter.config.num_labels} fixes the classes of this model: {call} needs tasks")
    if adapter.config.state.task_open:
        raise ValueError(f"a task is open: call end_task() before {call}")
    device = adapter.head.weight.device
    new = copy.deepcopy(adapter).cpu()  # where statistics can be computed in float64
    state, old = new.config.state, adapter.classes
    temperature = state.temperature
    tasks = new.tasks.class_indices(state.tasks)
    ids = [new_id.get(c, c) for c in old]
    known = None if state.novelty_threshold is None else KnownFeatures.of(new, [c is not None for c in ids])
    state.tasks = [
        list(dict.fromkeys(c for c in (new_id.get(old, old) for old in task) if c is not None)) for task in state.tasks
    ]
    state.forgotten_tasks = [number for number, task in enumerate(state.tasks) if not task]
    if state.temperature_information:
        for number in state.forgotten_tasks:
            if number < len(state.temperature_information):
                state.task_temperatures[number], state.temperature_information[number] = 1.0, 0.0
        state.temperature = TaskTemperatures(state.task_temperatures, state.temperature_information).common
    new.tasks.keep_names()
    new.calibration.update(new.tasks)
    groups = ClassGroups([[index for index, c in enumerate(ids) if c == kept] for kept in state.classes], tasks)
    new.head.group_classes(groups)
    new.head.expand(state.classes, state.tasks[-1])
    if new.running_gaussians is not None:
        new.running_gaussians.group_classes(groups)
        new.running_gaussians.expand(len(state.classes), new.tasks.class_indices([state.tasks[-1]])[0])
    if new.classifier is not None:
        new.classifier.group_classes(groups, new.head)
    new.pool.group_classes(groups)
    state.novelty_threshold = threshold_after(new, known, call, temperature)
    if new.classifier is not None:
        new.classifier.forget_computed()  # for these answers, on the CPU
    new.grown = True
    return new.to(device)


def rename(adapter: PoolAdapter, class_id: int, name: Any) -> None:
    """Give a class another name; see `ClassAPI.rename_class`."""
    if not isinstance(name, str):
        raise TypeError(f"new={short_repr(name)} must be a name; to change an id in `labels`, change the labels")
    if not name.strip():
        raise ValueError("a class name needs a character that can be seen")
    labels = dict(zip(adapter.classes, adapter.tasks.id2label.values(), strict=True))
    taken = [c for c, other in labels.items() if other == name and c != class_id]
    if taken:
        raise ValueError(f"class {taken[0]} has the name {short_repr(name)} already: merge_classes makes one class of two")
    adapter.tasks.rename(class_id, name)
