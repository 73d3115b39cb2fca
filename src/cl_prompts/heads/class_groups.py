"""Which old classes each class is made of after classes were forgotten or merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassGroups:
    """Old logit indices of each new class. Old classes in no group are forgotten, those of one group are merged.

    Args:
        members: old logit indices of each new class [new classes][members], in the order of the new logits.
        tasks: old logit indices of the classes of each task.
    """

    members: Sequence[Sequence[int]]
    tasks: Sequence[Sequence[int]]

    @property
    def new_index(self) -> dict[int, int]:
        """New logit index by old one; without forgotten classes."""
        return {old: new for new, group in enumerate(self.members) for old in group}

    @property
    def merges(self) -> bool:
        """Whether a class is made of several."""
        return any(len(group) > 1 for group in self.members)

    def of_rows(self, rows: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
        """Groups of rows of a tensor that has one for each class of each task. Rows of one task are merged.

        Args:
            rows: number of the task and old logit index of each row.

        Returns:
            numbers of the old rows, by the task and the new logit index of each new row, in the order of the new rows.
        """
        index = self.new_index
        groups: dict[tuple[int, int], list[int]] = {}
        for number, (task, old) in enumerate(rows):
            if old in index:
                groups.setdefault((task, index[old]), []).append(number)
        return groups

    def reduce(self, tensor: Tensor, dim: int, how: Callable[[Tensor, int], Tensor] = torch.sum) -> Tensor:
        """A tensor with an entry for each old class along `dim`, with one for each new class. Single ones stay bit-equal.

        Args:
            tensor: of any shape.
            dim: its axis of classes.
            how: merges the entries of one class, like `torch.sum`.
        """
        first = tensor.index_select(dim, torch.tensor([group[0] for group in self.members], device=tensor.device))
        for new, group in enumerate(self.members):
            if len(group) > 1:
                several = tensor.index_select(dim, torch.tensor(list(group), device=tensor.device))
                first.select(dim, new).copy_(how(several, dim))
        return first
