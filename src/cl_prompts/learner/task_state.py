"""The tasks of a learner: classes known so far, classes of the current task, and checks of labels against them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor, nn

from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.runtime.distributed import sum_over_processes
from cl_prompts.runtime.text import short_repr
from cl_prompts.storage.adapter_state import AdapterState


@dataclass(frozen=True)
class NextTask:
    """A task that may begin.

    Args:
        classes: its class ids.
        known: class ids that are known once it has begun, in the order of the logits.
        class_names: names by `str(class id)`.
    """

    classes: list[int]
    known: list[int]
    class_names: dict[str, str]


class TaskState(nn.Module):
    """Tasks and classes of a learner. Prompt learners and baselines have the same one.

    Args:
        state: what a file keeps of the tasks; this class keeps it up to date.
        num_labels: number of classes of a learner without tasks, which knows ids 0 to `num_labels` - 1 from the start.

    Attributes:
        unknown_labels: number of labels, seen on a device by this process, that could not be learned. Not saved.
    """

    def __init__(self, state: AdapterState, num_labels: int | None = None) -> None:
        super().__init__()
        self.state = state
        self.num_labels = num_labels
        self._id2label: dict[int, str] | None = None  # made when it is asked for
        # No buffer: DDP would replace the buffers of every process by those of the first before each forward.
        self.unknown_labels = torch.zeros((), dtype=torch.int64, device="cpu")  # also where PEFT builds on "meta"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.unknown_labels = fn(self.unknown_labels)
        return self

    @property
    def classes(self) -> list[int]:
        """Known class ids, in the order of the logits."""
        return list(range(self.num_labels)) if self.num_labels is not None else self.state.classes

    @property
    def current_classes(self) -> list[int]:
        """Class ids of the newest task; without tasks all known ones."""
        return self.state.tasks[-1] if self.state.tasks else self.classes

    @property
    def earlier_classes(self) -> set[int]:
        """Class ids of all tasks but the newest."""
        return {c for task in self.state.tasks[:-1] for c in task}

    def class_indices(self, tasks: Iterable[Sequence[int]]) -> list[list[int]]:
        """For each of `tasks`, given by its class ids: the indices of these classes' logits."""
        index = {c: i for i, c in enumerate(self.classes)}
        return [[index[c] for c in task] for task in tasks]

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each logit's class by the index of the logit, or its id as text if it has no name."""
        if self._id2label is None:
            names = self.state.class_names
            self._id2label = {index: names.get(str(c), str(c)) for index, c in enumerate(self.classes)}
        return dict(self._id2label)

    def rename(self, class_id: int, name: str) -> None:
        """Give a class another name."""
        self.state.class_names = {**self.state.class_names, str(class_id): name}
        self._id2label = None

    def keep_names(self) -> None:
        """Drop the names of classes that are not known any more."""
        known = set(map(str, self.classes))
        self.state.class_names = {c: name for c, name in self.state.class_names.items() if c in known}
        self._id2label = None

    # ---- state dict --------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The declared classes, for `state_dict`: equal shapes do not mean that the logits are of the same classes.

        Returns:
            int64 [n, 2] on the CPU: a row (number of the task, class id) for each class of each task. Without tasks one
            row, (-1, `num_labels`).
        """
        rows = [(number, c) for number, task in enumerate(self.state.tasks) for c in task]
        if self.num_labels is not None:
            rows = [(-1, self.num_labels)]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 2)

    def set_extra_state(self, state: Tensor) -> None:
        """Check, in `load_state_dict`, that the loaded state is of a learner with the same tasks.

        Args:
            state: from `get_extra_state` of that learner.

        Raises:
            ValueError: its tasks have other classes, or the same ones in another order.
        """
        own = self.get_extra_state()
        if state.tolist() != own.tolist():
            raise ValueError(
                f"the state is of a model with {_tasks_in(state)}, this one has {_tasks_in(own)}: logits follow the order "
                "of the classes. Begin the same tasks before loading, or load the saved files with from_pretrained"
            )

    # ---- begin and end -----------------------------------------------------------------------------------------------

    def plan_task(
        self, classes: Sequence[int], revisit: bool = False, class_names: Mapping[int, str] | None = None
    ) -> NextTask:
        """Check the next task; nothing changes yet.

        Args:
            classes: its class ids as they stand in `labels`, in any order.
            revisit: whether known classes may come back.
            class_names: names by class id.

        Raises:
            TypeError: class ids are not integers.
            ValueError: the learner has no tasks, a task is still open, a class is declared twice, or known already without
                `revisit`, or a known class gets another name.

        Warns:
            UserWarning: two classes have the same name.
        """
        if self.num_labels is not None:
            raise ValueError(f"num_labels={self.num_labels} makes this learner task-free: leave begin_task out")
        if self.state.task_open:
            raise ValueError(f"task {len(self.state.tasks) - 1} is still open: call end_task() first")
        declared, known = class_ids(classes), self.classes
        again = sorted(set(declared) & set(known), key=declared.index)
        if again and not revisit:
            raise ValueError(
                f"classes {short_repr(again)} were declared in an earlier task: leave them out, or pass revisit=True if "
                "they come back (new domain, recurring classes)"
            )
        names = {str(int(c)): str(name) for c, name in (class_names or {}).items()}
        self._check_names(names, known)
        return NextTask(declared, list(dict.fromkeys(known + declared)), names)

    def _check_names(self, names: Mapping[str, str], known: Sequence[int]) -> None:
        """Refuse another name for a known class, and warn of a name that two classes have; `names` by id as text."""
        ids = set(map(str, known))
        own = {c: name for c, name in self.state.class_names.items() if c in ids}
        by_name = {name: c for c, name in own.items()}
        for c, name in names.items():
            if own.get(c, name) != name:
                raise ValueError(
                    f"class {c} is called {short_repr(own[c])}, and would be called {short_repr(name)} now: give images of "
                    "another class another id, or rename the class first, with rename_class"
                )
            if by_name.get(name, c) != c:
                warnings.warn(
                    f"classes {by_name[name]} and {c} are both called {short_repr(name)}: answers by name cannot tell them "
                    "apart",
                    stacklevel=4,
                )

    def begin(self, task: NextTask) -> None:
        """Open a `task` that `plan_task` returned."""
        self.state.tasks.append(task.classes)
        self.state.task_open = True
        self.state.class_names.update(task.class_names)
        self._id2label = None

    def check_open(self) -> None:
        """Check that a task is open.

        Raises:
            ValueError: none is.
        """
        if not self.state.task_open:
            raise ValueError("no task is open: call begin_task(classes) first")

    def end(self) -> None:
        """Close the current task.

        Raises:
            ValueError: none is open.
        """
        self.check_open()
        self.state.task_open = False

    def check_training(self) -> None:
        """Check that a training forward may run now.

        Raises:
            ValueError: the learner learns in tasks, and none is open.
        """
        if self.num_labels is None and not self.state.task_open:
            raise ValueError("a training forward outside a task: call begin_task(classes) first, or model.eval()")

    # ---- labels ------------------------------------------------------------------------------------------------------

    def targets(self, labels: Tensor, head: IncrementalHead, *, only_current: bool) -> Tensor:
        """The index of the logit of each label's class.

        Labels on a device, and those in a compiled graph, are not read here: a step would have to wait for them. Wrong ones
        are ignored and counted, and `check_labels` reports them.

        Args:
            labels: class ids [B]; -100 for padding.
            head: knows the index of each class.
            only_current: whether classes outside the current task are wrong. Their logits are masked then, which would make
                the loss infinite.

        Returns:
            indices [B] int64; -100 for padding and for labels that are ignored.

        Raises:
            ValueError: labels on the CPU are of unknown classes, or outside the current task.
        """
        targets, unknown = head.to_targets(labels)
        outside = (targets >= 0) & ~head.current[targets.clamp_min(0)] & only_current
        if torch.compiler.is_compiling() or labels.device.type != "cpu":
            self.unknown_labels = self.unknown_labels.to(labels.device) + (unknown | outside).sum()
            return torch.where(outside, IGNORE_INDEX, targets)
        if unknown.any():
            wrong = sorted(set(labels[unknown].tolist()))
            mend = f"mark padding with {IGNORE_INDEX}" if wrong[0] < 0 else "see begin_task"
            raise ValueError(f"labels {wrong} are of no declared class; declared are {self.classes}: {mend}")
        if outside.any():
            raise ValueError(
                f"labels {sorted(set(labels[outside].tolist()))} do not belong to the current task {self.current_classes}: "
                'declare them in begin_task, or set class_mask to "none"'
            )
        return targets

    def check_labels(self) -> None:
        """Report wrong labels that `targets` has counted on a device since the last call, on any process.

        All processes must call it.

        Raises:
            ValueError: there were some. It is raised on every process.
        """
        count = int(sum_over_processes(self.unknown_labels))
        self.unknown_labels.zero_()
        if count:
            raise ValueError(
                f"{count} labels are of no declared class, or in training of none of the current task, and were ignored; "
                f"declared are {self.classes}: see begin_task"
            )


def _tasks_in(state: Tensor) -> str:
    """The tasks in a state of `TaskState.get_extra_state`, for messages."""
    if state.shape[1:] != (2,):
        return "unreadable tasks"
    tasks: dict[int, list[int]] = {}
    for number, value in state.tolist():
        tasks.setdefault(number, []).append(value)
    return f"num_labels={tasks[-1][0]}" if -1 in tasks else f"the tasks {short_repr(list(tasks.values()))}"


def class_ids(classes: Any) -> list[int]:
    """Class ids of a task as a list of ints.

    Args:
        classes: integers, in a list, an array or a tensor.

    Raises:
        TypeError: they are not integers.
        ValueError: there are none, one is there twice, negative, or too large for int64.
    """
    values = classes.tolist() if isinstance(classes, Tensor) else classes
    if not isinstance(values, Iterable):
        raise TypeError(
            f"classes must be a list of class ids, got {short_repr(classes)}: write [{short_repr(classes)}] for one class"
        )
    declared = list(values)
    wrong = [c for c in declared if not isinstance(c, Integral) or isinstance(c, bool)]
    if wrong:
        raise TypeError(f"classes must be integers as they stand in `labels`, got {wrong}")
    if not declared:
        raise ValueError("a task needs at least one class")
    ids = [int(c) for c in declared]
    twice = sorted(c for c, times in Counter(ids).items() if times > 1)
    if twice:
        raise ValueError(f"classes {short_repr(twice)} are declared twice in one call")
    if min(ids) < 0:
        raise ValueError(f"class {min(ids)} is negative: -100 marks images to ignore, so ids start at 0")
    if max(ids) >= 2**63:
        raise ValueError(f"class {max(ids)} does not fit the int64 of `labels`: number the classes from 0")
    return ids
