"""GEM and A-GEM against the conditions and closed forms of their papers."""

from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import batch_of, plain_logits, small_learner, train_steps
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts.baselines.gem import nonnegative_minimum


def over_active_sets(matrix: np.ndarray[Any, Any], vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The smallest value over all sets of free variables whose solution is not negative."""
    number, best = len(vector), (0.0, np.zeros(len(vector)))
    for free in chain.from_iterable(combinations(range(number), k) for k in range(1, number + 1)):
        v = np.zeros(number)
        v[list(free)] = np.linalg.solve(matrix[np.ix_(free, free)], -vector[list(free)])
        if (v >= 0).all():
            best = min(best, (v @ matrix @ v / 2 + vector @ v, v), key=lambda pair: pair[0])
    return best[1]


def test_the_quadratic_programme_is_solved_exactly() -> None:
    generator = np.random.default_rng(0)
    for number in (1, 2, 5, 7) * 10:
        rows = generator.normal(size=(number, number + 3))
        matrix, vector = rows @ rows.T, generator.normal(size=number) * 3
        found = nonnegative_minimum(torch.tensor(matrix), torch.tensor(vector))
        np.testing.assert_allclose(found, over_active_sets(matrix, vector), atol=1e-9)


@pytest.mark.parametrize("name", ["gem", "a_gem"])
def test_a_step_does_not_raise_the_loss_of_remembered_images(name: str) -> None:
    learner = small_learner(name, **({"margin": 0.1} if name == "gem" else {}))
    memories = [batch_of([4, 1, 4], ids=[10, 11, 12]), batch_of([0, 3], ids=[13, 14], seed=6)]
    for number, classes in enumerate(([4, 1], [0, 3])):
        learner.begin_task(classes)
        train_steps(learner, batch_of([*classes, *classes], seed=number), steps=5)
        learner.consolidate([], memories[: number + 1])
        learner.end_task()
    assert learner.stored_tasks.tolist() == [0, 0, 0, 1, 1]
    learner.begin_task([2, 5])
    new = batch_of([2, 5, 2, 5], ids=[20, 21, 22, 23])
    parts = [new, *memories]
    parameters = list(learner.trained().values())

    def gradient_of(images: Tensor, labels: Tensor) -> Tensor:
        targets, _ = learner.head.to_targets(labels)
        loss = F.cross_entropy(plain_logits(learner, images), targets)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()

    g, *references = (gradient_of(part["pixel_values"], part["labels"]) for part in parts)
    share = 4 / 9  # the loss of the new images is divided by all images of the batch
    if name == "a_gem":
        both = {key: torch.cat([memory[key] for memory in memories]) for key in ("pixel_values", "labels")}
        reference = gradient_of(both["pixel_values"], both["labels"])
        assert g @ reference < 0
        wanted = g - (g @ reference) / (reference @ reference) * reference
    else:
        rows = torch.stack(references)
        assert (rows @ g).min() < 0
        gram, margin = (rows @ rows.T).numpy(), np.full(2, 0.1)
        v = margin + over_active_sets(gram, (rows @ g).numpy() + gram @ margin)
        wanted = torch.tensor(v) @ rows + g
        assert (rows @ wanted).min() > -1e-6
    before = torch.cat([p.detach().flatten() for p in parameters]).double()
    joined = {key: torch.cat([part[key] for part in parts]) for key in ("pixel_values", "labels")}
    train_steps(learner, {**joined, "sample_ids": list(chain(*(part["sample_ids"] for part in parts)))}, steps=1, lr=1.0)
    step = torch.cat([p.detach().flatten() for p in parameters]).double() - before
    assert_close(step, -share * wanted, atol=1e-5, rtol=1e-3)
