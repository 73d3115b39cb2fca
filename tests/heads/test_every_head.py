"""What every classifier made from features promises: drift, batches, seeds, bad input, files."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.class_features import TASKS, WIDTH, affine, images, learnt, trained_head
from torch import Tensor
from torch.testing import assert_close

from cl_prompts.heads import CLASSIFIERS, RidgeClassifier


pytestmark = pytest.mark.by_turns(3)


SMALL: dict[str, dict[str, Any]] = {
    "ridge": {"projection_size": 30},
    "aligned": {"epochs": 2},
    "discriminant": {},
    "normalized discriminant": {"normalize": True},
}


def make(name: str, **more: Any) -> Any:
    return CLASSIFIERS[name.removeprefix("normalized ")](WIDTH, **SMALL[name], **more)


@pytest.mark.parametrize("name", CLASSIFIERS)  # of normalized features the map is not affine
def test_drift_is_compensated(name: str) -> None:
    """Features go through a known affine map at every task: answers are those of images that were there from the start."""
    matrix, shift = affine()

    def space(x: Tensor, task: int) -> Tensor:
        x = x.double()
        for _ in range(task):
            x = x @ matrix + shift
        return x.float()

    moving, still = make(name, drift="affine"), make(name, drift="affine")
    for number, task in enumerate(TASKS):
        features, targets = images(task, 200)
        for classifier, before, after in (
            (moving, space(features, number - 1), space(features, number)),
            (still, space(features, 2), space(features, 2)),
        ):
            classifier.begin_task(task)
            classifier.fit(after, targets, before if number else None, trained_head())
    seen = torch.cat([space(images(task, 20, seed=7)[0], 2) for task in TASKS])
    truth = torch.cat([images(task, 20, seed=7)[1] for task in TASKS])
    right = [(c(seen).argmax(1) == truth).float().mean() for c in (moving, still)]
    assert right[0] > right[1] - 0.07
    if name == "aligned":
        return
    left = make(name, drift="none")
    for number, task in enumerate(TASKS):
        features, targets = images(task, 200)
        left.begin_task(task)
        left.fit(space(features, number), targets)
    assert right[0] > (left(seen).argmax(1) == truth).float().mean() + 0.1


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("drift", ["none", "affine"])
def test_an_answer_does_not_depend_on_its_batch(name: str, drift: str) -> None:
    classifier = learnt(make(name, drift=drift), head=trained_head())
    seen = images(range(6), 4, seed=3)[0]
    alone = torch.cat([classifier(row[None]) for row in seen])
    assert_close(classifier(seen), alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_a_run_does_not_depend_on_the_global_generators(name: str) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        found.append(learnt(make(name, drift="affine"), head=trained_head())(images([0])[0]))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", SMALL)
def test_mixed_precision_leaves_the_statistics_exact(name: str) -> None:
    """The trainer consolidates under autocast, answers are computed without."""
    plain, mixed = make(name, drift="affine"), make(name, drift="affine")
    for task in TASKS:
        features, targets = images(task)
        for classifier, enabled in ((plain, False), (mixed, True)):
            classifier.begin_task(task)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                classifier.fit(features, targets, features * 1.1, trained_head())
    seen = images(range(6), 4, seed=3)[0]
    assert torch.equal(mixed(seen), plain(seen))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(name: str, value: float) -> None:
    classifier = make(name, drift="none")
    features, targets = images([0, 1])
    features[3, 2] = value
    classifier.begin_task([0, 1])
    with pytest.raises(ValueError, match="NaN or Inf"):
        classifier.fit(features, targets, head=trained_head())
    assert int(classifier.fitted) == 0


@pytest.mark.parametrize("name", SMALL)
def test_calls_out_of_order_are_refused(name: str) -> None:
    classifier = make(name, drift="affine")
    features, targets = images([0, 1])
    head = trained_head()
    with pytest.raises(ValueError, match="all 0 tasks begun are fitted already"):
        classifier.fit(features, targets, head=head)
    classifier.begin_task([0, 1])
    with pytest.raises(ValueError, match="has seen no task yet"):
        classifier(features)
    other = make(name, drift="none")
    other.begin_task([1])
    with pytest.raises(ValueError, match=r"targets \[0\] are not in the newest task, whose class indices are \[1\]"):
        other.fit(features, targets, head=head)
    classifier.fit(features, targets, head=head)
    with pytest.raises(ValueError, match="all 1 tasks begun are fitted already"):
        classifier.fit(features, targets, features, head)
    classifier.begin_task([2])
    with pytest.raises(ValueError, match="needs the features of the task's images before the task"):
        classifier.fit(*images([2]), head=head)
    with pytest.raises(ValueError, match="do not fit"):
        classifier.fit(torch.ones(3, WIDTH), torch.tensor([2, 2]), torch.ones(3, WIDTH), head)
    with pytest.raises(ValueError, match="do not fit"):
        classifier.fit(torch.ones(0, WIDTH), torch.tensor([], dtype=torch.int64), torch.ones(0, WIDTH), head)


def test_a_ridge_too_small_says_so() -> None:
    classifier = RidgeClassifier(WIDTH, projection_size=200, ridge=1e-300, drift="none")
    classifier.begin_task([0])
    with pytest.raises(ValueError, match="ridge=1e-300 is too small to solve for 200 random features"):
        classifier.fit(*images([0], 10))


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(SMALL)),
    drift=st.sampled_from(["none", "shift", "affine"]),
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 10_000),
)
def test_whatever_was_seen_answers_are_numbers(name: str, drift: str, sizes: list[int], scale: float, seed: int) -> None:
    """Few images, features of any size, constant ones among them: an answer is finite for every class seen."""
    generator = torch.Generator().manual_seed(seed)
    classifier = make(name, drift=drift)
    for start in range(0, len(sizes), 2):
        task = list(range(start, min(start + 2, len(sizes))))
        targets = torch.cat([torch.full((sizes[c],), c) for c in task])
        features = scale * torch.randn(len(targets), WIDTH, generator=generator)
        features[:, 0] = scale  # the same in all images
        classifier.begin_task(task)
        classifier.fit(features, targets, features + 0.1 * scale, trained_head(len(sizes)))
    answer = classifier(scale * torch.randn(5, WIDTH, generator=generator))
    assert answer.shape == (5, len(sizes))
    assert answer.isfinite().all()


def bytes_of(classifier: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in classifier.buffers())


@pytest.mark.parametrize("kind", ["low_rank", "full", "diagonal"])
@pytest.mark.parametrize("drift", ["none", "affine"])
@pytest.mark.parametrize("name", SMALL)
def test_the_bytes_of_statistics_are_counted(name: str, drift: str, kind: str) -> None:
    """What learning allocates beside the file's tensors, and what a further class takes."""
    for saves in (True,) if "discriminant" in name else (True, False):
        classifier = make(name, drift=drift, kind=kind, **({} if "discriminant" in name else {"save_statistics": saves}))
        classifier.begin_task([0, 1, 2])
        told, before = classifier.bytes_to_learn, bytes_of(classifier)
        classifier.make_room()
        if name == "ridge":
            if drift != "none":  # made for each fit
                classifier._new_sums()
            told -= 2 * 8 * classifier.size**2  # a second G, and a Cholesky factor
        assert told == bytes_of(classifier) - before
        before = bytes_of(classifier)
        classifier.begin_task([3, 4])
        classifier.make_room()
        further = 2 * 8 * classifier.size if name == "ridge" and drift != "none" else 0  # of those sums
        assert 2 * classifier.bytes_per_class == bytes_of(classifier) - before - further


@pytest.mark.parametrize("name", ["aligned", "ridge"])
@pytest.mark.parametrize("drift", ["none", "affine"])
def test_statistics_lie_in_memory_only_to_learn(name: str, drift: str) -> None:
    """A new object made for answering holds none of the numbers that its file does not hold either."""
    classifier = learnt(make(name, drift=drift), head=trained_head())
    answering = make(name, drift=drift)
    for task in TASKS:
        answering.begin_task(task)
    missing = set(dict(classifier.named_buffers())) - set(classifier.state_dict())
    assert sum(b.numel() for n, b in answering.named_buffers() if n in missing and n != "counted") <= WIDTH * 6
    classifier.head = None
    answering.load_state_dict(classifier.state_dict())
    if name == "ridge":
        assert torch.equal(answering(images([0])[0]), classifier(images([0])[0]))
    with pytest.raises(ValueError, match=r"saved without the .* save_statistics=True"):
        answering.begin_task([6])
    with pytest.raises(ValueError, match=r"saved without the"):
        answering.fit(*images([5]), head=trained_head())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("drift", ["none", "affine"])
def test_saved_statistics_go_on_as_if_never_saved(name: str, drift: str, tmp_path: Path) -> None:
    saves = {} if "discriminant" in name else {"save_statistics": True}
    whole = learnt(make(name, drift=drift, **saves), TASKS[:2], head=trained_head())
    whole.head = None
    save_file(whole.state_dict(), tmp_path / "x.safetensors")
    loaded = make(name, drift=drift, **saves)
    for task in TASKS[:2]:
        loaded.begin_task(task)
    loaded.load_state_dict(load_file(tmp_path / "x.safetensors"))
    features, targets = images(TASKS[2])
    for classifier in (whole, loaded):
        classifier.begin_task(TASKS[2])
        classifier.fit(features, targets, features * 1.1 if drift != "none" else None, trained_head())
    seen = images(range(6), 4, seed=3)[0]
    assert torch.equal(whole(seen), loaded(seen))
    for (key, value), (_, other) in zip(whole.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(value, other) or key == "counted", key


@pytest.mark.parametrize("name", ["discriminant", "ridge"])
def test_threads_that_ask_a_loaded_head_at_once_get_what_one_gets(name: str) -> None:
    """The factors of a discriminant are computed by the first answer."""
    saved = learnt(make(name, drift="none"), head=trained_head())
    seen = images(range(6), 40, seed=3)[0]
    wanted, state = saved(seen), saved.state_dict()
    for _ in range(20):
        loaded = make(name, drift="none")
        for task in TASKS:
            loaded.begin_task(task)
        loaded.load_state_dict(state)
        start = threading.Barrier(4)

        def ask(_: int, loaded: Any = loaded, start: threading.Barrier = start) -> list[Tensor]:
            start.wait()
            return [loaded(seen) for _ in range(3)]

        with ThreadPoolExecutor(4) as threads:
            found = [answer for each in threads.map(ask, range(4)) for answer in each]
        assert all(torch.equal(answer, wanted) for answer in found)
