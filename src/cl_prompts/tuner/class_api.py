"""The methods of a prompt learner that change its classes between tasks: forget, rename, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl_prompts.runtime.text import short_repr
from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.class_changes import change_classes, find_classes, merged_ids, rename


class ClassAPI:
    """Forget, rename and merge classes of the active adapter. Classes are given by id, or by name where it is unique.

    The adapter is replaced as a whole: forwards that run in other threads end with the old one. After an error nothing has
    changed. Images of earlier tasks are not needed.

    Attributes:
        pools: the adapters by name.
        peft_config: configs by adapter name.
        active_adapters: names; the first one is changed.
    """

    pools: Any
    peft_config: Any
    active_adapters: Any

    def forget_classes(self, classes: Sequence[int | str]) -> None:
        """Forget classes: their logits, rows of the head, statistics and names. Prompts are not changed.

        Statistics of the other classes are then as if the forgotten ones had never been in them, up to a pooled covariance
        and a Gram matrix, which are sums over the images of all classes; docs/training.md has the list.

        Args:
            classes: ids or names, some of `model.classes` but not all.

        Raises:
            TypeError: a class is neither an integer nor a text.
            ValueError: a class is unknown or given twice, all classes are given, a task is open, or the model has no tasks.
        """
        found = self._found(classes, "forget_classes")
        if len(found) == len(self._active.classes):
            raise ValueError(f"forget_classes({short_repr(list(classes))}) leaves no class: delete the adapter instead")
        self._swap(change_classes(self._active, dict.fromkeys(found), "forget_classes"))

    def merge_classes(self, classes: Sequence[int | str], into: int | str) -> None:
        """Make one class of several. Statistics are then as if their labels had been one from the start.

        Images of these classes must be labeled `into` from now on.

        Args:
            classes: ids or names.
            into: id of the merged class: one of `classes`, another known class, which is merged with them, or a new id. Or
                the name of a known class. The merged class keeps the name of `into`, if it has one.

        Raises:
            TypeError: a class is neither an integer nor a text.
            ValueError: a class is unknown or given twice, there is only one, a task is open, the model has no tasks, or the
                head is trained without alignment: one row cannot answer for two classes.
        """
        found = self._found(classes, "merge_classes")
        self._swap(change_classes(self._active, merged_ids(self._active, found, into), "merge_classes"))

    def rename_class(self, old: int | str, new: str) -> None:
        """Give a class another name, in `id2label`, answers and saved files. Its id, the value in `labels`, stays.

        Args:
            old: id or name.
            new: the name.

        Raises:
            TypeError: `new` is no text, or `old` is neither an integer nor a text.
            ValueError: the class is unknown, or `new` is empty or the name of another class.
        """
        (found,) = find_classes(self._active, [old])
        rename(self._active, found, new)

    def name_classes(self, class_names: Mapping[int, str]) -> None:
        """Name classes of a model without tasks, which `begin_task` would name.

        Args:
            class_names: names by class id.
        """
        for class_id, name in class_names.items():
            self._active.tasks.rename(class_id, name)

    @property
    def _active(self) -> PoolAdapter:
        adapter: PoolAdapter = self.adapter  # type: ignore[attr-defined]  # of `TaskAPI`
        return adapter

    def _found(self, classes: Any, call: str) -> list[int]:
        if isinstance(classes, (str, int)):
            raise TypeError(f"{call} takes a list of classes: write {call}([{classes!r}])")
        return find_classes(self._active, classes)

    def _swap(self, adapter: PoolAdapter) -> None:
        name = self.active_adapters[0]
        self.peft_config[name] = adapter.config
        self.pools.prompt_pool[name] = adapter
