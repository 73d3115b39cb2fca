"""Gaussians of the classes' features and the maps that move them, against numpy in float64."""

import math

import numpy as np
import pytest
import torch
from support.class_features import TASKS, WIDTH, affine, gaussians_of, images
from torch.testing import assert_close

from cl_prompts.heads import ClassGaussians, ClassMeans, DiscriminantClassifier, FeatureMap, RidgeClassifier, fit_map


def test_fit_map_finds_an_affine_map() -> None:
    matrix, shift = affine()
    x = images([0, 1, 2], 50)[0].double()
    found = fit_map(x, x @ matrix + shift, ridge=1e-9)
    assert_close(found.matrix, matrix, atol=1e-6, rtol=0)
    assert_close(found.shift, shift, atol=1e-5, rtol=0)


def test_fit_map_is_ridge_regression_of_the_change() -> None:
    matrix, shift = affine()
    noise = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = images([0, 1], 30)[0].double()
    y = x @ matrix + shift + noise
    found = fit_map(x, y, ridge=0.4)
    centred, change = (x - x.mean(0)).numpy(), ((y - y.mean(0)) - (x - x.mean(0))).numpy()
    size = 0.4 * len(x) * centred.var()
    rows = np.vstack([centred, math.sqrt(size) * np.eye(WIDTH)])
    wanted = np.eye(WIDTH) + np.linalg.lstsq(rows, np.vstack([change, np.zeros((WIDTH, WIDTH))]), rcond=None)[0]
    np.testing.assert_allclose(found.matrix.numpy(), wanted, atol=1e-9)
    np.testing.assert_allclose((x.mean(0) @ found.matrix + found.shift).numpy(), y.mean(0).numpy(), atol=1e-9)


def test_a_large_ridge_leaves_the_shift() -> None:
    x = images([0, 1], 20)[0].double()
    y = x.roll(1, 1) * 1.5 + 2
    shift = fit_map(x, y, "shift")
    assert torch.equal(shift.matrix, torch.eye(WIDTH, dtype=torch.float64))
    assert_close(shift.shift, y.mean(0) - x.mean(0))
    far = fit_map(x, y, "affine", ridge=1e12)
    assert_close(far.matrix, shift.matrix, atol=1e-9, rtol=0)
    assert_close(far.shift, shift.shift, atol=1e-9, rtol=0)


def test_features_that_do_not_change_are_not_moved() -> None:
    x = images([0, 1], 2, width=50)[0]  # more dimensions than images
    found = fit_map(x, x)
    assert_close(found.matrix, torch.eye(50, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(found.shift, torch.zeros(50, dtype=torch.float64), atol=1e-9, rtol=0)
    one = fit_map(x[:1], x[:1] + 1)  # one image: its way
    assert_close(one.shift, torch.ones(50, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kind", "shapes"), [("none", (3, 3)), ("linear", (3, 3)), ("affine", (3, 4)), ("affine", (0, 0))])
def test_fit_map_refuses(kind: str, shapes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"choose one of|same images are needed"):
        fit_map(torch.ones(shapes[0], 2), torch.ones(shapes[1], 2), kind)


@pytest.mark.parametrize("kind", ["full", "shared", "diagonal"])
def test_moments_are_those_of_the_images(kind: str) -> None:
    features, targets = images([0, 1, 2])
    found = gaussians_of(kind, features, targets, [0, 1, 2])
    own = [features[targets == c].double().numpy() for c in range(3)]
    np.testing.assert_allclose(found.mean[:, 0].numpy(), [x.mean(0) for x in own], atol=1e-5)
    wanted = [np.cov(x.T) for x in own]
    if kind == "full":
        np.testing.assert_allclose(found.spread[:, 0].numpy(), wanted, atol=1e-5)
    elif kind == "diagonal":
        np.testing.assert_allclose(found.spread[:, 0].numpy(), [np.diag(c) for c in wanted], atol=1e-5)
    else:
        np.testing.assert_allclose(found.spread.numpy(), np.mean([np.cov(x.T, bias=True) for x in own], 0), atol=1e-5)


def test_the_shared_covariance_adds_up_over_tasks() -> None:
    found = ClassGaussians(WIDTH, "shared")
    for task in TASKS:
        features, targets = images(task, 10 * len(task))
        found.begin_task(task)
        found.add(features, targets)
    parts = [(images(task, 10 * len(task)), task) for task in TASKS]
    own = [f[c == column].double().numpy() for (f, c), task in parts for column in task]
    scatter = sum((x - x.mean(0)).T @ (x - x.mean(0)) for x in own)
    np.testing.assert_allclose(found.spread.numpy(), scatter / sum(map(len, own)), atol=1e-5)


@pytest.mark.parametrize("kind", ["low_rank", "full", "shared", "diagonal", "centroids"])
def test_moved_gaussians_are_those_of_moved_images(kind: str) -> None:
    """The newest task's rows, which are in the new space already, stay."""
    matrix, shift = affine()
    if kind in ("diagonal", "centroids"):
        matrix = torch.diag(matrix.diagonal())  # else variances alone do not tell
    features, targets = images([0, 1], 60)
    moved = features.double() @ matrix + shift
    found = gaussians_of(kind, features, targets, [0, 1])
    wanted = gaussians_of(kind, moved.float(), targets, [0, 1])
    if kind == "centroids":  # the same clusters, whatever k-means finds in the new space
        groups = found._clusters(features[targets == 0].double(), 0)
        wanted.mean[0] = torch.stack([(g @ matrix + shift).mean(0) for g in groups]).float()
        wanted.spread[0] = torch.stack([(g @ matrix).var(0) if len(g) > 1 else g[0] * 0 for g in groups]).float()
    newest, labels = images([2])
    found.begin_task([2])
    found.move(FeatureMap(matrix, shift))
    found.add(newest, labels)
    rows = slice(1) if kind == "centroids" else slice(2)
    assert_close(found.mean[rows], wanted.mean[rows], atol=1e-4, rtol=0)
    assert_close(found.mean[2].mean(0), newest.mean(0), atol=1.0 if kind == "centroids" else 1e-5, rtol=0)
    if found.pools:
        unbiased = int(kind == "low_rank")
        weights = 120 - 2 * unbiased, 30 - unbiased
        both = (wanted.spread * weights[0] + torch.cov(newest.T, correction=unbiased) * weights[1]) / sum(weights)
        assert_close(found.spread, both, atol=1e-4, rtol=0)
        if unbiased:
            assert_close(found.factor[rows], gaussians_of(kind, features, targets, [0, 1]).factor @ matrix.float())
    else:
        assert_close(found.spread[rows], wanted.spread[rows], atol=1e-4, rtol=0)


def test_moved_variances_are_the_diagonal_of_the_moved_covariance() -> None:
    matrix, shift = affine()
    variances = ClassGaussians(WIDTH, "diagonal")
    full = ClassGaussians(WIDTH, "full")
    features, targets = images([0, 1])
    for gaussians in (variances, full):
        gaussians.begin_task([0, 1])
        gaussians.add(features, targets)
    full.spread.copy_(torch.diag_embed(variances.spread))
    for gaussians in (variances, full):
        gaussians.begin_task([2])
        gaussians.move(FeatureMap(matrix, shift))
    assert_close(variances.spread, full.spread.diagonal(dim1=-2, dim2=-1))
    assert_close(variances.mean, full.mean)


@pytest.mark.parametrize("kind", ["low_rank", "full", "shared", "diagonal", "centroids"])
def test_drawn_features_have_the_moments(kind: str) -> None:
    features, targets = images([0, 1], 200)
    gaussians = gaussians_of(kind, features, targets, [0, 1])
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    drawn, of = gaussians.sample(40_000, torch.Generator().manual_seed(1), own=1.0, spherical=0.0)
    again, _ = gaussians.sample(40_000, torch.Generator().manual_seed(1), own=1.0, spherical=0.0)
    assert torch.equal(drawn, again)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    for column in (0, 1):
        own, real = drawn[of == column].double(), features[targets == column].double()
        assert_close(own.mean(0), real.mean(0), atol=0.05, rtol=0)
        wanted = gaussians.spread.double() if kind == "shared" else torch.cov(real.T)
        if kind == "low_rank":
            wanted = list(gaussians.covariances(1.0, 0.0))[column]
            assert_close(wanted, torch.cov(real.T), atol=0.2, rtol=0.1)
        if kind in ("low_rank", "full", "shared"):
            assert_close(torch.cov(own.T), wanted, atol=0.1, rtol=0.05)
        else:  # clusters of 20 images: a variance within is estimated with 19, one between with 9 of 10
            assert_close(own.var(0), wanted.diagonal(), atol=0.1, rtol=0.1)
    if kind == "diagonal":
        off = torch.cov(drawn[of == 0].T).fill_diagonal_(0)
        assert off.abs().max() < 0.1


def test_clusters_are_drawn_as_often_as_they_have_images() -> None:
    """Two far clusters of 90 and 10 images: k-means finds parts of each, and together they keep their shares."""
    features = torch.cat([torch.randn(90, WIDTH), 100 + torch.randn(10, WIDTH)])
    gaussians = gaussians_of("centroids", features, torch.zeros(100, dtype=torch.int64), [0])
    assert gaussians.count.sum() == 100
    drawn, _ = gaussians.sample(5000, torch.Generator().manual_seed(0), own=0.5, spherical=1e-4)
    assert ((drawn[:, 0] > 50).float().mean() - 0.1).abs() < 0.02


def test_covariances_are_regularised_as_written() -> None:
    features, targets = images([0, 1, 2], 12)
    gaussians = gaussians_of("full", features, targets, [0, 1, 2])
    each = np.stack([np.cov(features[targets == c].double().numpy().T) for c in range(3)])
    mixed = 0.3 * each + 0.7 * each.mean(0)
    wanted = [0.8 * m + 0.2 * np.trace(m) / WIDTH * np.eye(WIDTH) for m in mixed]
    np.testing.assert_allclose(torch.stack(list(gaussians.covariances(0.3, 0.2))).numpy(), wanted, atol=1e-5)


def test_a_low_rank_covariance_is_that_of_the_images_as_far_as_its_rank_goes() -> None:
    """Against numpy: the leading eigenvectors relative to the pooled covariance, the variance left in the pooled one."""
    features, targets = images([0, 1, 2], 41)
    gaussians = gaussians_of("low_rank", features, targets, [0, 1, 2], rank=2)
    own = [np.cov(features[targets == c].double().numpy().T) for c in range(3)]
    pooled = np.mean(own, 0)
    np.testing.assert_allclose(gaussians.spread.numpy(), pooled, atol=1e-5)
    root = np.linalg.cholesky(0.9 * pooled + 0.1 * np.trace(pooled) / WIDTH * np.eye(WIDTH))
    inverse = np.linalg.inv(root)
    for row, covariance in enumerate(own):
        relative = inverse @ covariance @ inverse.T
        values, vectors = np.linalg.eigh(relative)
        kept = root @ (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T @ root.T
        found = gaussians.factor[row].T @ gaussians.factor[row]
        np.testing.assert_allclose(found.numpy(), 0.8 * kept, atol=1e-4)  # 41 images: the prior has 10 of 50
        share = 0.2 + 0.8 * (np.trace(relative) - values[-2:].sum()) / WIDTH
        assert float(gaussians.rest[row]) == pytest.approx(share, rel=1e-5)
        wanted = 0.4 * 0.8 * kept + (0.6 + 0.4 * share) * (0.7 * pooled + 0.3 * np.trace(pooled) / WIDTH * np.eye(WIDTH))
        np.testing.assert_allclose(list(gaussians.covariances(0.4, 0.3))[row].numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize(("width", "rank"), [(8, 8), (64, 32), (192, 32), (384, 32), (768, 16), (1024, 12), (20_000, 1)])
def test_directions_of_a_class_take_at_most_48_kb(width: int, rank: int) -> None:
    gaussians = ClassGaussians(width, save=False)
    assert gaussians.factor.shape[1:] == (rank, width)
    assert 4 * rank * width <= 49_152 or rank == 1


@pytest.mark.parametrize("kind", ["low_rank", "full", "diagonal"])
def test_a_single_image_has_the_covariance_of_the_others(kind: str) -> None:
    features, targets = images([0, 1], 30)
    rows = (targets == 0) | (torch.arange(60) == int((targets == 1).nonzero()[0]))
    gaussians = gaussians_of(kind, features[rows], targets[rows], [0, 1])
    alone, other = (
        list(gaussians.covariances(0.5, 0.1))[1],
        gaussians_of(kind, features[targets == 0], targets[targets == 0], [0]),
    )
    assert_close(alone, next(iter(other.covariances(0.0, 0.1))), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["low_rank", "full", "shared", "diagonal"])
@pytest.mark.parametrize("per_class", [1, 2, 5])
@pytest.mark.parametrize("alike", ["identical", "constant", "wide"])
def test_few_images_are_told_apart_by_their_means(kind: str, per_class: int, alike: str) -> None:
    """More dimensions than images; identical images of a class; images that are constant; then a class that comes back."""
    width = 40
    features, targets = images([0, 1, 2], per_class, width=width)
    if alike != "wide":
        features = features[torch.stack([(targets == c).nonzero()[0, 0] for c in range(3)])][targets]
    if alike == "constant":
        features = features[:, :1].expand(-1, width).contiguous()
    classifier = DiscriminantClassifier(width, kind=kind, drift="affine")
    classifier.begin_task([0, 1, 2])
    classifier.fit(features, targets)
    answers = classifier(features)
    assert answers.isfinite().all()
    assert torch.equal(answers.argmax(1), targets)
    classifier.begin_task([1])
    one = features[targets == 1][:1]
    classifier.fit(one, torch.tensor([1]), one)
    again = classifier(features)
    assert again.isfinite().all()
    assert torch.equal(again.argmax(1), targets)


def test_the_ridge_of_the_map_follows_the_images() -> None:
    """A map that features obey gets the smallest ridge and an R^2 of 1, changes without a rule the largest and none."""
    matrix, shift = affine()
    x = images([0, 1, 2], 50)[0].double()
    rule, chance = fit_map(x, x @ matrix + shift), fit_map(x, x + torch.randn(150, WIDTH, dtype=torch.float64))
    assert rule.ridge is not None
    assert chance.ridge is not None
    assert rule.ridge < 0.1 < chance.ridge
    assert rule.explained > 0.95
    assert abs(chance.explained) < 0.1
    few = fit_map(x[:9], x[:9] @ matrix)
    assert few.ridge == 0.1
    assert math.isnan(few.explained)
    assert fit_map(x, x @ matrix + shift, "shift").ridge is None
    assert fit_map(x, x + 1, "shift").explained == pytest.approx(1)


def test_gaussians_refuse_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind='median': choose one of"):
        ClassGaussians(WIDTH, "median")
    with pytest.raises(ValueError, match="one Gaussian a class"):
        DiscriminantClassifier(WIDTH, kind="centroids")
    with pytest.raises(ValueError, match="drift='linear': choose one of"):
        RidgeClassifier(WIDTH, drift="linear")


def test_class_means_are_those_of_all_images_added() -> None:
    """In parts, with classes that come later, and with padding that may hold anything."""
    features, targets = images([0, 1, 2], 9)
    means = ClassMeans(WIDTH)
    padding = torch.full((2, WIDTH), math.nan), torch.full((2,), -100)
    for classes in (2, 3):
        rows = targets == 2 if classes == 3 else targets < 2
        for part in rows.nonzero()[:, 0].split(4):
            means.add(torch.cat([features[part], padding[0]]), torch.cat([targets[part], padding[1]]), classes)
    wanted = torch.stack([features[targets == c].double().mean(0) for c in range(3)])
    assert_close(means.sums / means.counts[:, None], wanted, atol=1e-12, rtol=0)
    assert means.counts.tolist() == [9, 9, 9]
    means.add(features[:0], targets[:0], 4)
    found = means.cosines(features)
    assert_close(
        found[:, :3].double(), torch.cosine_similarity(features[:, None].double(), wanted, dim=2), atol=1e-6, rtol=0
    )
    assert found[:, 3].unique().tolist() == [-math.inf]
