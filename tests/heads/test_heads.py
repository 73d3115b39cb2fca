"""The mathematics of the classifiers made from features, against oracles: numpy, scipy and scikit-learn in float64."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from support.class_features import TASKS, WIDTH, everything, gaussians_of, images, learnt, trained_head
from torch import Tensor
from torch.testing import assert_close

from cl_prompts.heads import AlignedClassifier, DiscriminantClassifier, RidgeClassifier, align
from cl_prompts.heads.ridge import HELD_OUT_EVERY, RELATIVE_RIDGES


def ridge_oracle(classifier: RidgeClassifier, ridge: float) -> np.ndarray:
    """W of ridge regression on all images at once: least squares with sqrt(ridge) * I as further rows."""
    features, targets = everything()
    hidden = np.maximum(features @ classifier.projection.double().numpy(), 0)
    rows = np.vstack([hidden, math.sqrt(ridge) * np.eye(hidden.shape[1])])
    target = np.vstack([np.eye(6)[targets], np.zeros((hidden.shape[1], 6))])
    return np.asarray(np.linalg.lstsq(rows, target, rcond=None)[0])


# ---- ridge regression ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1.0, 300.0])
def test_ridge_equals_the_regression_on_all_images_at_once(ridge: float) -> None:
    classifier = learnt(RidgeClassifier(WIDTH, projection_size=50, ridge=ridge, drift="none"))
    solution = classifier._solve(ridge).numpy()
    np.testing.assert_allclose(solution, ridge_oracle(classifier, ridge), atol=1e-9)
    assert torch.equal(classifier.solution, torch.from_numpy(solution).float())
    seen = images(TASKS[1], seed=5)[0]
    hidden = np.maximum(seen.numpy() @ classifier.projection.numpy(), 0)
    assert_close(classifier(seen).numpy(), hidden @ solution.astype(np.float32), atol=1e-4, rtol=1e-4)


def test_without_a_projection_it_is_linear_regression_with_a_constant() -> None:
    classifier = learnt(RidgeClassifier(WIDTH, projection_size=0, ridge=2.0, drift="none"))
    features, targets = everything()
    x = np.hstack([features, np.ones((len(features), 1))])
    wanted = np.linalg.inv(x.T @ x + 2.0 * np.eye(WIDTH + 1)) @ x.T @ np.eye(6)[targets]
    np.testing.assert_allclose(classifier.solution.numpy(), wanted, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 2**31))
def test_neither_the_order_of_tasks_nor_of_images_matters(order: list[int], seed: int) -> None:
    """Same targets, other order: to 1e-6 in float64, although a task's images are cut into other parts."""
    generator = torch.Generator().manual_seed(seed)
    first = learnt(RidgeClassifier(WIDTH, projection_size=40, ridge=10.0, drift="none"))
    other = RidgeClassifier(WIDTH, projection_size=40, ridge=10.0, drift="none")
    for number in order:
        features, targets = images(TASKS[number])
        shuffled = torch.randperm(len(features), generator=generator)
        other.begin_task(TASKS[number])
        other.fit(features[shuffled], targets[shuffled])
    assert_close(other._solve(10.0), first._solve(10.0), atol=1e-6, rtol=0)


def test_the_ridge_is_chosen_on_held_out_images_and_all_are_then_used() -> None:
    classifier = learnt(RidgeClassifier(WIDTH, projection_size=50, drift="none"), TASKS[:2])
    features, targets = images(TASKS[2])
    held = np.arange(len(features)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    classifier.begin_task(TASKS[2])
    classifier.fit(features, targets)

    def sums(tasks: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
        hidden = [np.maximum(f.double().numpy() @ classifier.projection.double().numpy(), 0) for f, _ in tasks]
        return sum(h.T @ h for h in hidden), sum(
            h.T @ np.eye(6)[c.numpy()] for h, (_, c) in zip(hidden, tasks, strict=True)
        )

    gram, total = sums([images(TASKS[0]), images(TASKS[1]), (features[~held], targets[~held])])
    scored = np.maximum(features[held].double().numpy() @ classifier.projection.double().numpy(), 0)
    errors = {}
    for relative in RELATIVE_RIDGES:
        ridge = relative * np.diag(gram).mean()
        weight = np.linalg.solve(gram + ridge * np.eye(50), total)
        errors[ridge] = ((scored @ weight - np.eye(6)[targets[held].numpy()]) ** 2).mean()
    chosen = min(errors, key=errors.__getitem__)
    assert float(classifier.chosen_ridge) == pytest.approx(chosen, rel=1e-9)
    np.testing.assert_allclose(classifier._solve(chosen).numpy(), ridge_oracle(classifier, chosen), atol=1e-6)


def test_the_chosen_ridge_follows_the_noise() -> None:
    """Labels that the features do not tell call for the largest ridge, labels that they tell exactly for the smallest."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 30, generator=generator)
    features[:, 0] = features[:, 0].sign()
    found = []
    for targets in (torch.randint(2, (50,), generator=generator), (features[:, 0] > 0).long()):
        classifier = RidgeClassifier(30, projection_size=0, drift="none")
        classifier.begin_task([0, 1])
        classifier.fit(features, targets)
        found.append(float(classifier.chosen_ridge / classifier.gram.diagonal().mean()))
    assert found[0] > 100 * found[1]


def test_few_images_get_the_largest_ridge() -> None:
    classifier = RidgeClassifier(WIDTH, projection_size=20, drift="none")
    classifier.begin_task([0, 1])
    classifier.fit(torch.eye(4, WIDTH), torch.tensor([0, 0, 1, 1]))
    assert float(classifier.chosen_ridge) == pytest.approx(RELATIVE_RIDGES[-1] * float(classifier.gram.diagonal().mean()))
    assert classifier(torch.eye(4, WIDTH)).argmax(1).tolist() == [0, 0, 1, 1]


def test_projection_is_a_function_of_the_seed_and_of_nothing_else() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = (RidgeClassifier(WIDTH, projection_size=500, seed=7).projection for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, RidgeClassifier(WIDTH, projection_size=500, seed=8).projection)
    assert one.mean().abs() < 0.05
    assert (one.std() - 1).abs() < 0.05
    assert torch.equal(torch.get_rng_state(), before)


def test_with_drift_the_regression_is_on_what_the_gaussians_draw() -> None:
    classifier = learnt(RidgeClassifier(WIDTH, projection_size=30, ridge=5.0, drift="affine", seed=3, samples=40))
    drawn = classifier._drawn(classifier.gaussians.sampler(own=0.5, spherical=1e-4), 0)
    features, targets = map(torch.cat, zip(*drawn, strict=True))
    assert targets.bincount().tolist() == [40] * 6
    x = np.maximum(features.double().numpy() @ classifier.projection.double().numpy(), 0)
    wanted = np.linalg.solve(x.T @ x + 5 * np.eye(30), x.T @ np.eye(6)[targets.numpy()])
    np.testing.assert_allclose(classifier.solution.numpy(), wanted, atol=1e-5)
    assert classifier.gram.numel() == 0


def test_a_class_without_images_is_never_answered() -> None:
    features, targets = images([0])
    for classifier in (RidgeClassifier(WIDTH, projection_size=20, drift="none"), DiscriminantClassifier(WIDTH)):
        classifier.begin_task([0, 1])
        classifier.fit(features, targets)
        answer = classifier(features)
        assert answer[:, 0].isfinite().all()
        assert (answer[:, 1] == -math.inf).all()


def test_sums_stay_in_float64_when_a_model_is_cast() -> None:
    classifier = learnt(RidgeClassifier(WIDTH, projection_size=20, ridge=1.0, drift="none")).float()
    assert {classifier.gram.dtype, classifier.sums.dtype, classifier.chosen_ridge.dtype} == {torch.float64}
    assert classifier.solution.dtype == torch.float32


# ---- discriminant analysis -------------------------------------------------------------------------------------------


def relative_to_the_first(logits: Any) -> np.ndarray:
    values = np.asarray(logits, dtype=np.float64)
    return values - values[:, :1]


def test_discriminant_equals_quadratic_discriminant_analysis() -> None:
    classifier = learnt(DiscriminantClassifier(WIDTH, kind="full", own=1.0, spherical=0.0))
    classifier.gaussians.spread *= 29 / 30  # scikit-learn divides by n
    oracle = QuadraticDiscriminantAnalysis(priors=np.full(6, 1 / 6)).fit(*everything())
    seen = images(range(6), 5, seed=9)[0]
    wanted = relative_to_the_first(oracle.decision_function(seen.double().numpy()))
    np.testing.assert_allclose(relative_to_the_first(classifier(seen)), wanted, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_shared_discriminant_equals_linear_discriminant_analysis(shrinkage: float) -> None:
    classifier = learnt(DiscriminantClassifier(WIDTH, kind="shared", spherical=shrinkage))
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None).fit(*everything())
    seen = images(range(6), 5, seed=9)[0]
    wanted = relative_to_the_first(oracle.decision_function(seen.double().numpy()))
    np.testing.assert_allclose(relative_to_the_first(classifier(seen)), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["low_rank", "full", "diagonal"])
def test_regularised_discriminant_is_the_density_of_scipy(kind: str) -> None:
    classifier = learnt(DiscriminantClassifier(WIDTH, kind=kind, own=0.4, spherical=0.1, rank=2))
    covariances, means = (
        torch.stack(list(classifier.gaussians.covariances(0.4, 0.1))).numpy(),
        classifier.gaussians.mean[:, 0].double().numpy(),
    )
    seen = images(range(6), 5, seed=9)[0]
    wanted = np.stack([multivariate_normal.logpdf(seen, m, c) for m, c in zip(means, covariances, strict=True)], 1)
    np.testing.assert_allclose(relative_to_the_first(classifier(seen)), relative_to_the_first(wanted), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["low_rank", "full", "shared", "diagonal"])
def test_normalized_features_are_those_of_a_layer_norm(kind: str) -> None:
    """Every answer is that of the plain head for normalized features, along tasks with drift; lengths do not matter."""
    normalized, plain = (DiscriminantClassifier(WIDTH, kind=kind, normalize=flag) for flag in (True, False))

    def norm(features: Tensor) -> Tensor:
        centered = features - features.mean(1, keepdim=True)
        return centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()

    for task in TASKS:
        features, targets = images(task)
        before = features + 0.1 * features.roll(1, 1)
        for classifier, read in ((normalized, Tensor.clone), (plain, norm)):
            classifier.begin_task(task)
            classifier.fit(read(features), targets, read(before))
    seen = images(range(6), 5, seed=9)[0]
    answers = (
        lambda c, x: c(x),
        lambda c, x: c.novelty(x),
        lambda c, x: c.scale(x),
        lambda c, x: c._answers_once(x)[0],
    )
    for answer in answers:
        assert_close(answer(normalized, seen), answer(plain, norm(seen)), atol=2e-3, rtol=2e-4)
        assert_close(answer(normalized, 7 * seen + 3), answer(normalized, seen), atol=5e-3, rtol=1e-3)


def test_features_far_from_the_origin_lose_no_digits() -> None:
    near, far = (DiscriminantClassifier(WIDTH) for _ in range(2))
    features, targets = images([0, 1, 2])
    for classifier, shift in ((near, 0.0), (far, 1000.0)):
        classifier.begin_task([0, 1, 2])
        classifier.fit(features + shift, targets)
    answers = [relative_to_the_first(c(features + shift)) for c, shift in ((near, 0.0), (far, 1000.0))]
    np.testing.assert_allclose(answers[1], answers[0], atol=0.05, rtol=1e-2)


@pytest.mark.parametrize("kind", ["low_rank", "full", "shared"])
def test_a_class_that_comes_back_is_as_likely_as_its_likeliest_visit(kind: str) -> None:
    classifier = DiscriminantClassifier(WIDTH, kind=kind, drift="none")
    first, second = images([0, 1]), images([2, 3])  # the second visit looks like other classes
    for features, targets in (first, (second[0], second[1] - 2)):
        classifier.begin_task([0, 1])
        classifier.fit(features, targets)
    apart = DiscriminantClassifier(WIDTH, kind=kind, drift="none")
    for task, (features, targets) in (([0, 1], first), ([2, 3], second)):
        apart.begin_task(task)
        apart.fit(features, targets)
    seen = torch.cat([first[0], second[0]])
    scores = apart(seen)
    assert_close(classifier(seen), torch.maximum(scores[:, :2], scores[:, 2:]))
    assert len(classifier.gaussians.seen) == 4


def test_what_is_made_of_the_gaussians_follows_them() -> None:
    """Two tasks between two answers, and numbers that are loaded over others."""
    classifier, again = DiscriminantClassifier(WIDTH, drift="none"), DiscriminantClassifier(WIDTH, drift="none")
    seen = images([0], 3, seed=8)[0]
    for number, task in enumerate(([0, 1], [2, 3], [4, 5])):  # of one size, so that as much is written into each
        features, targets = images(task)
        for one in (classifier, again):
            one.begin_task(task)
            one.fit(features, targets)
        if number != 1:
            classifier(seen)
    assert torch.equal(classifier(seen), again(seen))
    other = copy.deepcopy(classifier)
    other.load_state_dict({k: v * 2 if k == "gaussians.mean" else v for k, v in classifier.state_dict().items()})
    assert not torch.equal(other(seen), classifier(seen))
    other.load_state_dict(classifier.state_dict())
    assert torch.equal(other(seen), classifier(seen))


def test_one_image_a_class_is_nearest_class_mean() -> None:
    for classifier in (DiscriminantClassifier(40), RidgeClassifier(40, projection_size=0, drift="affine")):
        features, targets = images([0, 1, 2], 1, width=40)
        classifier.begin_task([0, 1, 2])
        classifier.fit(features, targets)
        assert torch.equal(classifier(features).argmax(1), targets)


def test_more_dimensions_than_images() -> None:
    features, targets = images([0, 1], 5, width=60)
    classifier = DiscriminantClassifier(60)
    classifier.begin_task([0, 1])
    classifier.fit(features, targets)
    assert torch.equal(classifier(features).argmax(1), targets)


@pytest.mark.parametrize("kind", ["low_rank", "full", "shared"])
def test_too_few_images_for_a_covariance_are_told_at_the_fit(kind: str) -> None:
    """The second task moves old statistics and fails; what was known before is unchanged, and more images mend it."""
    classifier = DiscriminantClassifier(8, kind=kind, own=1.0, spherical=0.0)
    first, few, many = images([0, 1], 20, width=8), images([2], 2, width=8), images([2], 20, width=8)
    classifier.begin_task([0, 1])
    if kind != "full":  # the pooled covariance of the first task alone cannot be inverted
        with pytest.raises(ValueError, match=r"own=1.0, spherical=0.0, .*: choose a larger spherical_covariance$"):
            classifier.fit(first[0][:3], first[1][:3])
        assert int(classifier.fitted) == 0
        classifier.fit(*first)
        return
    classifier.fit(*first)
    before = copy.deepcopy(classifier.state_dict())
    answers = classifier(first[0])
    classifier.begin_task([2])
    with pytest.raises(ValueError, match=r"own=1.0, spherical=0.0, .* or a smaller own_covariance$"):
        classifier.fit(*few, few[0] * 1.1)
    after = classifier.state_dict()
    assert all(
        torch.equal(after[name][: len(value)] if value.dim() else after[name], value) for name, value in before.items()
    )
    assert torch.equal(classifier(first[0])[:, :2], answers)
    classifier.fit(*many, many[0])
    assert classifier(first[0]).isfinite().all()


# ---- alignment -------------------------------------------------------------------------------------------------------


def test_alignment_is_sgd_on_drawn_features() -> None:
    """Against a loop of its own: a fresh draw every epoch, all classes competing, momentum, decay, cosine schedule."""
    features, targets = images([0, 1, 2])
    gaussians = gaussians_of("full", features, targets, [0, 1, 2])
    head, own = trained_head(3), trained_head(3)
    align(head, gaussians, epochs=4, samples=10, batch_size=16, lr=0.02, seed=5)
    weight, bias = own.weight.detach().clone(), own.bias.detach().clone() if own.bias is not None else torch.zeros(3)
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    generator = torch.Generator().manual_seed(5)
    for epoch in range(4):
        rate = 0.02 * 0.5 * (1 + math.cos(math.pi * epoch / 4))
        x, y = gaussians.sample(10, generator, own=0.5, spherical=1e-4)
        order = torch.randperm(30, generator=generator)
        for start in range(0, 30, 16):
            rows = order[start : start + 16]
            error = ((x[rows] @ weight.T + bias).softmax(1) - torch.eye(3)[y[rows]]) / len(rows)
            for i, (value, gradient) in enumerate(((weight, error.T @ x[rows]), (bias, error.sum(0)))):
                speed[i] = 0.9 * speed[i] + gradient + 5e-4 * value
                value -= rate * speed[i]
    assert_close(head.weight.detach(), weight, atol=1e-5, rtol=0)
    assert head.bias is not None
    assert_close(head.bias.detach(), bias, atol=1e-5, rtol=0)


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("kind", ["full", "diagonal", "centroids"])
@pytest.mark.parametrize("scale", [None, 20.0])
def test_an_aligned_head_knows_all_classes(kind: str, scale: float | None) -> None:
    """Trained on the last task alone it has forgotten the others; nothing random but the seed, the given head untouched."""
    head = trained_head(scale=scale)
    features, _ = images(TASKS[2])
    with torch.no_grad():
        head.weight[5] += 3 * features.mean(0)
    given = copy.deepcopy(head.state_dict())
    before = torch.get_rng_state()
    one, two, other = (
        learnt(AlignedClassifier(WIDTH, kind=kind, seed=seed, lr=0.05, epochs=30), head=head) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, given[name]) for name, value in head.state_dict().items())
    assert torch.equal(one(features), two(features))
    assert not torch.equal(one(features), other(features))
    everyone, truth = everything()
    x, y = torch.from_numpy(everyone).float(), torch.from_numpy(truth)
    assert (head(x).argmax(1) == y).float().mean() < 0.4
    assert (one(x).argmax(1) == y).float().mean() > 0.5


def test_alignment_leaves_a_frozen_head_frozen() -> None:
    head = trained_head(3).requires_grad_(False)
    before = head.weight.clone()
    align(head, gaussians_of("full", *images([0, 1, 2]), [0, 1, 2]), epochs=1)
    assert not head.weight.requires_grad
    assert head.weight.grad is None
    assert not torch.equal(head.weight, before)
