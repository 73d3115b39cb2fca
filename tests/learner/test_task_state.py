"""Tasks and classes of a learner, and the labels that it can learn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.learner.task_state import TaskState, class_ids
from cl_prompts.storage.adapter_state import AdapterState


def in_second_task() -> tuple[TaskState, IncrementalHead]:
    """Classes 7 and 2 are known, 5 and 2 are current."""
    tasks, head = TaskState(AdapterState()), IncrementalHead(4)
    for classes in ([7, 2], [5, 2]):
        task = tasks.plan_task(classes, revisit=True)
        head.expand(task.known, task.classes)
        tasks.begin(task)
        if classes == [7, 2]:
            tasks.end()
    return tasks, head


def test_classes_keep_the_order_in_which_they_came() -> None:
    tasks, _ = in_second_task()
    assert tasks.classes == [7, 2, 5]
    assert tasks.current_classes == [5, 2]
    assert tasks.class_indices(tasks.state.tasks) == [[0, 1], [2, 1]]
    assert tasks.state.task_open


def test_a_plan_changes_nothing() -> None:
    tasks = TaskState(AdapterState())
    task = tasks.plan_task([3], class_names={3: "owl"})
    assert tasks.state == AdapterState()
    tasks.begin(task)
    assert tasks.state.class_names == {"3": "owl"}
    tasks.end()
    with pytest.raises(ValueError, match="no task is open"):
        tasks.end()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda tasks: tasks.plan_task([1]), r"task 1 is still open: call end_task\(\)"),
        (lambda tasks: tasks.end() or tasks.plan_task([9, 5]), r"classes \[5\] were declared in an earlier task"),
        (lambda tasks: TaskState(AdapterState(), 4).plan_task([1]), "num_labels=4 makes this learner task-free"),
        (lambda tasks: tasks.end() or tasks.check_training(), "a training forward outside a task"),
    ],
)
def test_calls_out_of_order(call: Callable[[TaskState], Any], text: str) -> None:
    tasks, _ = in_second_task()
    before = tasks.classes
    with pytest.raises(ValueError, match=text):
        call(tasks)
    assert tasks.classes == before


@pytest.mark.parametrize("classes", [[3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1])])
def test_class_ids_come_in_any_sequence(classes: Any) -> None:
    assert class_ids(classes) == [3, 1]


def test_targets_are_indices_of_logits() -> None:
    tasks, head = in_second_task()
    labels = torch.tensor([5, -100, 7, 2])
    assert tasks.targets(labels, head, only_current=False).tolist() == [2, -100, 0, 1]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([5, 9], r"labels \[9\] are of no declared class; declared are \[7, 2, 5\]: see begin_task"),
        ([-1, 5], r"labels \[-1\] are of no declared class; .*: mark padding with -100"),
        ([7, 2], r"labels \[7\] do not belong to the current task \[5, 2\]"),
    ],
)
def test_wrong_labels_are_named(labels: list[int], text: str) -> None:
    tasks, head = in_second_task()
    with pytest.raises(ValueError, match=text):
        tasks.targets(torch.tensor(labels), head, only_current=True)


def test_wrong_labels_in_a_graph_are_counted_and_reported_later() -> None:
    tasks, head = in_second_task()
    compiled = torch.compile(tasks.targets, backend="aot_eager", fullgraph=True)
    targets = compiled(torch.tensor([5, 9, -100, 7]), head, only_current=True)
    assert targets.tolist() == [2, -100, -100, -100]
    with pytest.raises(ValueError, match=r"2 labels are of no declared class, or .*declared are \[7, 2, 5\]"):
        tasks.check_labels()
    tasks.check_labels()
