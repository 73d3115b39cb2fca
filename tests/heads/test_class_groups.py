"""Classifiers that forget or merge classes are as those whose labels had always been the new ones."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.class_features import TASKS, WIDTH, affine, images, trained_head
from torch.testing import assert_close

from cl_prompts.heads import ClassGaussians, DiscriminantClassifier, FeatureClassifier, RidgeClassifier
from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.running_gaussians import RunningGaussians
from cl_prompts.methods.shared.prototypes import ClassPrototypes


MERGED = [[0], [2, 3], [4], [1, 5]]  # 2 and 3 are of one task, 1 and 5 of two


def taught(make: Callable[[], Any], labels: dict[int, int | None] | None = None) -> Any:
    """All tasks, with classes left out (None) or under other labels. Features drift from task to task."""
    labels = labels or {}
    one, (matrix, shift) = make(), affine()
    for number, task in enumerate(TASKS):
        features, targets = images(task)
        new = [labels.get(c, c) for c in task]
        taken = torch.tensor([labels.get(int(c), int(c)) is not None for c in targets])
        features = features[taken]
        targets = torch.tensor([labels.get(int(c), int(c)) for c in targets[taken]])
        one.begin_task(list(dict.fromkeys(c for c in new if c is not None)))
        before = (features.double() @ matrix + shift).float() if number else None
        if isinstance(one, FeatureClassifier):
            one.fit(features, targets, before if one.needs_before else None)
        elif len(targets):
            one.add(features, targets)
    return one


EXACT = {
    "full": lambda: DiscriminantClassifier(WIDTH, kind="full"),
    "full without drift": lambda: DiscriminantClassifier(WIDTH, kind="full", drift="none"),
    "diagonal": lambda: DiscriminantClassifier(WIDTH, kind="diagonal"),
    "ridge with drift": lambda: RidgeClassifier(WIDTH, projection_size=20, kind="full"),
}


def grouped(one: Any, members: Sequence[Sequence[int]]) -> Any:
    one.group_classes(ClassGroups(members, TASKS), trained_head())
    return one


@pytest.mark.parametrize("name", EXACT)
def test_a_forgotten_class_was_never_there(name: str) -> None:
    """Class 0 is of the first task: the later ones' images, which the drift is seen on, are the same."""
    relabeled = {0: None, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
    never, forgot = taught(EXACT[name], relabeled), grouped(taught(EXACT[name]), [[1], [2], [3], [4], [5]])
    features = images([1, 2, 3, 4, 5], 8, seed=3)[0]
    assert torch.equal(forgot(features), never(features))


@pytest.mark.parametrize("name", ["full", "diagonal", "shared", "ridge with drift"])
def test_merged_classes_were_always_one(name: str) -> None:
    others = {
        "shared": lambda: DiscriminantClassifier(WIDTH, kind="shared"),
        # Variances follow a map without the covariances between dimensions, so what lies between means must not drift.
        "diagonal": lambda: DiscriminantClassifier(WIDTH, kind="diagonal", drift="none"),
    }
    make = {**EXACT, **others}[name]
    always, merged = taught(make, {1: 3, 2: 1, 3: 1, 4: 2, 5: 3}), taught(make)
    # The order of new logits is that of the first task in which each class stands: 0, then (1, 5), then (2, 3), 4.
    merged = grouped(merged, MERGED)
    features = images([0, 1, 2, 3, 4, 5], 8, seed=3)[0]
    assert_close(merged(features), always(features), atol=2e-3, rtol=2e-3)
    assert merged(features).argmax(1).tolist() == always(features).argmax(1).tolist()


def test_ridge_sums_are_linear_in_the_labels() -> None:
    def make() -> RidgeClassifier:
        return RidgeClassifier(WIDTH, projection_size=20, drift="none", ridge=1.0)

    features = images([0, 1, 2, 3, 4, 5], 8, seed=3)[0]
    whole = taught(make)
    logits = whole(features)
    always = taught(make, {1: 3, 2: 1, 3: 1, 4: 2, 5: 3})
    assert_close(grouped(taught(make), MERGED)(features), always(features), atol=1e-5, rtol=1e-4)
    forgot = grouped(whole, [[1], [3]])
    assert_close(forgot(features), logits[:, [1, 3]])  # G keeps the images: the logits of other classes stay
    assert forgot.sums.shape == (20, 2)


def pooled_error(found: ClassGaussians, wanted: ClassGaussians) -> float:
    return float((found.spread - wanted.spread).norm() / wanted.spread.norm())


@pytest.mark.parametrize("forgotten", range(6))
def test_the_pooled_covariance_loses_the_directions_of_a_forgotten_class(forgotten: int) -> None:
    def make() -> DiscriminantClassifier:
        return DiscriminantClassifier(WIDTH, rank=4, drift="none")

    kept = [c for c in range(6) if c != forgotten]
    never = taught(make, {c: (None if c == forgotten else kept.index(c)) for c in range(6)}) if forgotten != 5 else None
    found, untouched = grouped(taught(make), [[c] for c in kept]).gaussians, taught(make).gaussians
    assert float(torch.linalg.eigvalsh(found.spread.double()).min()) > 0
    if never is not None:
        assert pooled_error(found, never.gaussians) < 0.5 * pooled_error(untouched, never.gaussians)
        assert_close(found.mean, never.gaussians.mean)


def test_low_rank_classes_are_merged_up_to_what_their_factors_left_out() -> None:
    def make() -> DiscriminantClassifier:
        return DiscriminantClassifier(WIDTH, rank=WIDTH, drift="none")

    always, merged = taught(make, {1: 3, 2: 1, 3: 1, 4: 2, 5: 3}), grouped(taught(make), MERGED)
    assert_close(merged.gaussians.spread, always.gaussians.spread, atol=1e-5, rtol=1e-4)
    assert_close(merged.gaussians.count, always.gaussians.count)
    mine, theirs = (list(one.gaussians.covariances(1.0, 0.0)) for one in (merged, always))
    for a, b in zip(mine, theirs, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1


def test_clusters_cannot_be_merged_but_forgotten() -> None:
    gaussians = ClassGaussians(WIDTH, "diagonal")
    gaussians.kind = "centroids"
    from cl_prompts.heads.grouped_gaussians import group_gaussians

    gaussians.begin_task([0, 1])
    with pytest.raises(ValueError, match='"centroids" keeps clusters, which cannot be merged: use'):
        group_gaussians(gaussians, ClassGroups([[0, 1]], [[0, 1]]))
    group_gaussians(gaussians, ClassGroups([[1]], [[0, 1]]))
    assert gaussians.class_indices == [0]


@pytest.mark.parametrize("statistics", ["mean", "covariance"])
def test_prototypes(statistics: str) -> None:
    def of(labels: dict[int, int | None]) -> ClassPrototypes:
        prototypes = ClassPrototypes(WIDTH, statistics)
        for number, task in enumerate(TASKS):
            features, targets = images(task)
            new = [labels[c] for c in task if labels[c] is not None]
            prototypes.begin_task(list(dict.fromkeys(new)), number)  # type: ignore[arg-type]
            if new:
                mapped = torch.tensor([-100 if labels[int(c)] is None else labels[int(c)] for c in targets])
                prototypes.add(features, mapped, mapped >= 0)
        return prototypes

    same = {c: c for c in range(6)}
    merged, always = of(same), of({0: 0, 1: 3, 2: 1, 3: 1, 4: 2, 5: 3})  # type: ignore[arg-type]
    merged.group_classes(ClassGroups(MERGED, TASKS))
    features = images([0, 1, 2, 3, 4, 5], 8, seed=3)[0]
    assert merged.rows == always.rows
    assert_close(merged.class_scores(features), always.class_scores(features), atol=1e-4, rtol=1e-4)
    forgot, never = of(same), of({0: 0, 1: 1, 2: None, 3: 2, 4: 3, 5: 4})  # type: ignore[arg-type]
    if statistics == "covariance":
        before = forgot.covariance()
    forgot.group_classes(ClassGroups([[0], [1], [3], [4], [5]], TASKS))
    assert_close(forgot.sum, never.sum)
    if statistics == "covariance":  # the average over all images so far, up to its shrinkage
        assert float((forgot.covariance() - before).norm() / before.norm()) < 0.05
    else:
        assert torch.equal(forgot.class_scores(features), never.class_scores(features))
    last = forgot.rows[-1]
    forgot.group_classes(ClassGroups([[last[1]]], [[] for _ in TASKS[:-1]] + [[last[1]]]))  # of the last task alone
    assert forgot.nearest_tasks(features, 2)[0].tolist() == [[last[0]]] * len(features)
    forgot.group_classes(ClassGroups([], [[] for _ in TASKS]))
    assert forgot.task_scores(features).shape == (len(features), len(TASKS))


def test_head_and_running_gaussians() -> None:
    head, running = trained_head(3), RunningGaussians(WIDTH, save=True)
    running.expand(3, [0, 1, 2])
    features, targets = images([0, 1, 2])
    running.update(head, features, targets)
    groups = ClassGroups([[0, 2], [1]], [[0, 1, 2]])
    weight, mean = head.weight.detach(), running.mean
    head.group_classes(groups)
    running.group_classes(groups)
    assert torch.equal(head.weight[1], weight[1])
    assert_close(head.weight[0], weight[[0, 2]].mean(0))
    assert torch.equal(running.mean[1], mean[1])
    both = features[targets != 1]
    assert_close(running.mean[0], both.mean(0), atol=1e-4, rtol=1e-4)
    assert_close(running.variance[0], both.var(0, correction=0), atol=1e-3, rtol=1e-3)
