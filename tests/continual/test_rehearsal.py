"""The rehearsal memory: quotas, balance, who is kept with which probability, and what a checkpoint takes along."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_prompts.continual import RehearsalMemory


def tasks_of(sizes: list[list[int]]) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Rows and labels of tasks with so many images of each new class; rows tell the class: 1000 * class + number."""
    found, label = [], 0
    for task in sizes:
        labels = np.repeat(np.arange(label, label + len(task)), task)
        numbers = np.concatenate([np.arange(n) for n in task])
        order = np.random.default_rng(label).permutation(len(labels))
        found.append(((1000 * labels + numbers)[order], labels[order]))
        label += len(task)
    return found


def assert_sound(memory: RehearsalMemory) -> None:
    rows, labels = memory.rows.tolist(), memory.labels.tolist()
    assert len(set(rows)) == len(rows) == len(memory)
    assert [row // 1000 for row in rows] == labels


def test_a_budget_for_all_is_shared_out_anew_with_every_task() -> None:
    memory = RehearsalMemory(size=10, seed=3)
    before: dict[int, list[int]] = {}
    for number, (rows, labels) in enumerate(tasks_of([[9, 9], [9], [9, 9]])):
        memory.add(rows, labels)
        assert_sound(memory)
        counts = [len(kept) for kept in memory.by_class.values()]
        assert counts == [[5, 5], [4, 3, 3], [2, 2, 2, 2, 2]][number]
        for label, kept in before.items():
            assert memory.by_class[label] == kept[: len(memory.by_class[label])]  # images only go
        before = {label: list(kept) for label, kept in memory.by_class.items()}


def test_a_budget_for_each_class_never_shrinks_one() -> None:
    memory = RehearsalMemory(per_class=4, seed=0)
    for rows, labels in tasks_of([[9, 2], [9]]):
        memory.add(rows, labels)
    assert {label: len(kept) for label, kept in memory.by_class.items()} == {0: 4, 1: 2, 2: 4}


def test_the_first_of_a_ranking_are_kept_in_its_order() -> None:
    memory = RehearsalMemory(size=6)
    rows, labels = np.array([1, 1001, 2, 1002, 3, 1003, 4]), np.array([0, 1, 0, 1, 0, 1, 0])
    memory.add(rows, labels, ranking=[3, 0, 0, np.inf, 2, 1, 1])
    assert memory.by_class == {0: [2, 4, 3], 1: [1001, 1003, 1002]}
    memory.add([2001, 2002], [2, 2], ranking=[1, 0])
    assert memory.by_class == {0: [2, 4], 1: [1001, 1003], 2: [2002, 2001]}


def test_images_of_a_task_are_kept_with_equal_chances() -> None:
    rows, labels = tasks_of([[8, 8]])[0]
    kept: Counter[int] = Counter()
    for seed in range(800):
        memory = RehearsalMemory(per_class=2, seed=seed)
        memory.add(rows, labels)
        kept.update(memory.rows.tolist())
    assert_even([kept[row] for row in rows.tolist()], 200, 0.75)


def test_a_class_that_comes_back_keeps_old_and_new_images_with_equal_chances() -> None:
    kept: Counter[int] = Counter()
    for seed in range(800):
        memory = RehearsalMemory(per_class=4, seed=seed)
        memory.add([0, 1, 2, 3], [0, 0, 0, 0])
        memory.add([4, 5, 6, 7], [0, 0, 0, 0])
        kept.update(memory.rows.tolist())
    assert_even([kept[row] for row in range(8)], 400, 0.5)


def assert_even(counts: list[int], expected: float, variance: float) -> None:
    """Counts of a binomial with this mean and variance / mean: none is five deviations off."""
    assert np.abs(np.array(counts) - expected).max() < 5 * np.sqrt(expected * variance), counts


# ---- without tasks ---------------------------------------------------------------------------------------------------


def test_a_reservoir_for_each_class_is_even() -> None:
    kept: Counter[int] = Counter()
    for seed in range(600):
        memory = RehearsalMemory(per_class=3, seed=seed)
        memory.observe(range(12), [0] * 12)
        kept.update(memory.rows.tolist())
    assert_even([kept[row] for row in range(12)], 150, 0.75)


@pytest.mark.parametrize("order", ["mixed", "in blocks"])
def test_a_balanced_reservoir_prefers_no_time(order: str) -> None:
    """Thirteen places, three classes: one class too many for its share must not let every new image in."""
    labels = np.tile([0, 1, 2], 12) if order == "mixed" else np.repeat([0, 1, 2], 12)
    rows = 1000 * labels + np.concatenate(
        [np.arange(12)[:, None].repeat(3, 1).flatten()] if order == "mixed" else [np.tile(range(12), 3)]
    )
    early, late = 0, 0
    for seed in range(300):
        memory = RehearsalMemory(size=13, seed=seed)
        memory.observe(rows, labels)
        assert sorted(Counter(memory.labels.tolist()).values()) == [4, 4, 5]
        numbers = memory.rows % 1000
        early, late = early + int((numbers < 6).sum()), late + int((numbers >= 6).sum())
    assert abs(early - late) < 0.06 * (early + late), (early, late)


def test_rare_classes_keep_all_they_have() -> None:
    random = np.random.default_rng(2)
    labels = random.permutation(np.repeat([0, 1, 2], [200, 6, 3]))
    rows = 1000 * labels + np.arange(len(labels))
    memory = RehearsalMemory(size=20, seed=1)
    memory.observe(rows, labels)
    assert Counter(memory.labels.tolist()) == {0: 11, 1: 6, 2: 3}
    assert_sound(memory)


streams = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@given(labels=streams, size=st.integers(1, 15), whole=st.booleans(), seed=st.integers(0, 3))
def test_a_stream_fills_the_budget_and_no_more(labels: list[int], size: int, whole: bool, seed: int) -> None:
    memory = RehearsalMemory(size, seed=seed) if whole else RehearsalMemory(per_class=size, seed=seed)
    rows = [1000 * label + number for number, label in enumerate(labels)]
    memory.observe(rows, labels)
    assert_sound(memory)
    assert set(memory.rows.tolist()) <= set(rows)
    seen, kept = Counter(labels), Counter(memory.labels.tolist())
    if whole:
        assert len(memory) == min(size, len(labels))
        share = size // len(seen)
        assert all(kept[label] >= min(count, share) for label, count in seen.items())
    else:
        assert kept == {label: min(count, size) for label, count in seen.items()}


@given(
    sizes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=4),
    size=st.integers(1, 20),
    whole=st.booleans(),
)
def test_tasks_fill_the_budget_and_no_more(sizes: list[list[int]], size: int, whole: bool) -> None:
    memory = RehearsalMemory(size) if whole else RehearsalMemory(per_class=size)
    for rows, labels in tasks_of(sizes):
        memory.add(rows, labels)
    assert_sound(memory)
    counts = [len(kept) for kept in memory.by_class.values()]
    images = [n for task in sizes for n in task]
    quotas = [size // len(images) + (i < size % len(images)) for i in range(len(images))] if whole else [size] * len(images)
    for number, count in enumerate(counts):
        # A class gives up images as classes come and gets none back: it has its quota, or all it ever had.
        assert count == min(images[number], quotas[number])


@given(labels=streams, cut=st.integers(0, 60), size=st.integers(1, 10), tasks=st.booleans())
def test_a_memory_goes_on_from_its_state(labels: list[int], cut: int, size: int, tasks: bool) -> None:
    rows = list(range(len(labels)))
    whole, first = RehearsalMemory(size, seed=4), RehearsalMemory(size, seed=4)

    def show(memory: RehearsalMemory, part: slice) -> None:
        if rows[part]:
            (memory.add if tasks else memory.observe)(rows[part], labels[part])

    for part in (slice(0, cut), slice(cut, None)):
        show(whole, part)
    show(first, slice(0, cut))
    second = RehearsalMemory(size, seed=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    show(second, slice(cut, None))
    assert second.by_class == whole.by_class
    assert list(second.by_class) == list(whole.by_class)
    assert second.state_dict() == whole.state_dict()


def test_the_same_seed_draws_the_same() -> None:
    kept = []
    for seed in (1, 1, 2):
        memory = RehearsalMemory(size=6, seed=seed)
        for rows, labels in tasks_of([[20, 20], [20]]):
            memory.add(rows, labels)
        kept.append(memory.rows.tolist())
    assert kept[0] == kept[1]
    assert kept[0] != kept[2]


@pytest.mark.parametrize("budget", [{}, {"size": 3, "per_class": 2}, {"size": 0}, {"per_class": -1}])
def test_bad_budgets(budget: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give one of them, a positive number of images"):
        RehearsalMemory(**budget)


@pytest.mark.parametrize(
    ("labels", "ranking"), [([0, 1], None), ([0, 1, 0, 1], None), ([0, 1, 0], [0.0]), ([0, 1, 0], [0.0, np.nan, 1.0])]
)
def test_lists_that_do_not_fit(labels: list[int], ranking: list[float] | None) -> None:
    memory = RehearsalMemory(size=3)
    with pytest.raises(ValueError, match=r"3 rows .* labels|ranking"):
        memory.add([5, 6, 7], labels, ranking)
    if ranking is None:
        with pytest.raises(ValueError, match="3 rows"):
            memory.observe([5, 6, 7], labels)
    assert len(memory) == 0
