"""A class-balanced memory of training images, kept as row numbers of the training set.

L2P uses one as L2P-R (Wang et al., CVPR 2022, section 5.1: 10 or 50 images per class).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


Rows = NDArray[np.int64]


class RehearsalMemory:
    """Class-balanced row numbers of images, with a budget in total or per class.

    With tasks, `add` draws images of each class at the end of its task and, under a total budget, removes images of old
    classes. Without tasks, `observe` is a class-balancing reservoir (Chrysakis & Moens, "Online Continual Learning from
    Imbalanced Data", ICML 2020): an image of a class that was never the largest replaces an image of the largest class; a
    class that was once the largest uses reservoir sampling, in which all its images have the same probability.

    Args:
        size: number of images in total; None: see `per_class`.
        per_class: number of images per class; None: see `size`.
        seed: seed of the draws.

    Raises:
        ValueError: not exactly one budget is given, or it is not positive.
    """

    def __init__(self, size: int | None = None, per_class: int | None = None, *, seed: int = 0) -> None:
        if (size is None) == (per_class is None) or (size or per_class or 0) < 1:
            raise ValueError(f"size={size}, per_class={per_class}: give one of them, a positive number of images")
        self.size, self.per_class, self.seed = size, per_class, seed
        self.by_class: dict[int, list[int]] = {}
        self._passed: dict[int, int] = {}  # number of images of each class that `observe` got
        self._full: set[int] = set()  # classes that were once the largest in a full memory
        self._draws = 0

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.by_class.values())

    @property
    def rows(self) -> Rows:
        """Row numbers of all images [n], ordered by class."""
        return np.array([row for rows in self.by_class.values() for row in rows], dtype=np.int64)

    @property
    def labels(self) -> Rows:
        """Class ids of `rows` [n]."""
        return np.array([label for label, rows in self.by_class.items() for _ in rows], dtype=np.int64)

    def add(self, rows: Iterable[int], labels: Iterable[int], ranking: Iterable[float] | None = None) -> None:
        """Add images of a task: random ones of each class, or those with the smallest `ranking`.

        For a class that is in the memory already (another domain), old and new images are drawn from together.

        Args:
            rows: row numbers of the task's images [n].
            labels: their class ids [n].
            ranking: rank of each image [n]; the smallest are kept longest (herding order). None: random.

        Raises:
            ValueError: the lists differ in length, or a rank is NaN.
        """
        rows, labels = _pairs(rows, labels)
        if ranking is None:
            order = self._order(len(rows))
        else:
            ranks = np.asarray(list(ranking), dtype=np.float64)
            if ranks.shape != rows.shape or np.isnan(ranks).any():
                raise ValueError(f"ranking must be a number for each of {len(rows)} rows, got {ranks.tolist()}")
            order = np.argsort(ranks, kind="stable")
        for label in np.unique(labels):
            new = [int(row) for row in rows[order][labels[order] == label]]
            old = self.by_class.get(int(label), [])
            pooled = old + new
            if old:
                pooled = [pooled[i] for i in self._order(len(pooled))]
            self.by_class[int(label)] = pooled
        for label, quota in self._quotas().items():
            self.by_class[label] = self.by_class[label][:quota]

    def _quotas(self) -> dict[int, int]:
        if self.per_class is not None:
            return dict.fromkeys(self.by_class, self.per_class)
        assert self.size is not None
        # The remainder goes to the first classes, one image each.
        quota, left = divmod(self.size, len(self.by_class))
        return {label: quota + (number < left) for number, label in enumerate(self.by_class)}

    def observe(self, rows: Iterable[int], labels: Iterable[int]) -> None:
        """Offer images to the reservoir, one after another.

        Args:
            rows: row numbers of the images [n].
            labels: their class ids [n].

        Raises:
            ValueError: the lists differ in length.
        """
        for row, label in zip(*_pairs(rows, labels), strict=True):
            self._observe(int(row), int(label))

    def _observe(self, row: int, label: int) -> None:
        own = self.by_class.setdefault(label, [])
        self._passed[label] = self._passed.get(label, 0) + 1
        if len(own) < self.per_class if self.per_class is not None else len(self) < (self.size or 0):
            own.append(row)
            return
        if self.per_class is None:
            largest = max(self.by_class.values(), key=len)
            self._full |= {c for c, kept in self.by_class.items() if len(kept) == len(largest)}
            if label not in self._full:
                largest.pop(int(self._random().integers(len(largest))))
                own.append(row)
                return
        place = int(self._random().integers(self._passed[label]))
        if place < len(own):
            own[place] = row

    def _random(self) -> np.random.Generator:
        """A generator for one draw, seeded by the number of the draw, which is the only random state."""
        self._draws += 1
        return np.random.default_rng([self.seed, self._draws])

    def _order(self, length: int) -> Rows:
        return self._random().permutation(length)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint."""
        return {
            "by_class": [[label, rows] for label, rows in self.by_class.items()],
            "passed": [[label, count] for label, count in self._passed.items()],
            "full": sorted(self._full),
            "draws": self._draws,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.by_class = {int(label): [int(row) for row in rows] for label, rows in state["by_class"]}
        self._passed = {int(label): int(count) for label, count in state["passed"]}
        self._full = {int(label) for label in state["full"]}
        self._draws = int(state["draws"])


def _pairs(rows: Iterable[int], labels: Iterable[int]) -> tuple[Rows, Rows]:
    pairs = np.asarray(list(rows), dtype=np.int64), np.asarray(list(labels), dtype=np.int64)
    if len(pairs[0]) != len(pairs[1]):
        raise ValueError(f"{len(pairs[0])} rows and {len(pairs[1])} labels: give a label for each row")
    return pairs
