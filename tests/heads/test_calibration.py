"""The temperature of the scores: chosen on held-out images, saved, carried on; the predicted class stays."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from support.class_features import TASKS, images
from support.closed_form_models import SEEN, answers, features, learn_task, new_model, task_images
from support.families import build
from support.methods import METHODS
from support.small_runs import CLASSES
from torch.nn import functional as F

from cl_prompts import PromptPoolModel, PromptPoolPipeline
from cl_prompts.heads import AlignedClassifier, DiscriminantClassifier, FeatureClassifier, RidgeClassifier
from cl_prompts.heads.calibration import TaskTemperatures, fit_temperature, folds, information, log_scores
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.novelty import energy, threshold_of
from cl_prompts.heads.refit import held_out_logits, trained_as_far
from cl_prompts.storage.adapter_state import AdapterState


pytestmark = pytest.mark.by_turns(3)


NEW = {
    "discriminant": lambda drift: DiscriminantClassifier(6, drift=drift),
    "ridge": lambda drift: RidgeClassifier(6, projection_size=30, drift=drift),
    "aligned": lambda drift: AlignedClassifier(6, drift=drift, epochs=3),
}
HEADS: dict[str, dict[str, Any]] = {
    "trained": {},
    "cosine": {"head": "cosine"},
    "aligned": {"alignment": "covariance"},
    "ridge": {"head": "ridge", "projection_size": 20},
    "discriminant": {"head": "discriminant"},
}


def drawn(scale: float, number: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `scale` times too large, and targets drawn from the right probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(number, 5, generator=generator)
    return scale * logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_the_temperature_is_found(scale: float) -> None:
    logits, targets = drawn(scale)
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(scale, rel=0.1)

    def loss(log: float) -> float:
        scaled = logits.double() / np.exp(log)
        wrong = scaled.topk(2, 1).values[:, 1] - scaled.logsumexp(1)
        return float(F.cross_entropy(scaled, targets, reduction="sum") - wrong.mean())

    assert found == pytest.approx(np.exp(minimize_scalar(loss, bracket=(-4, 4)).x), rel=1e-4)


def test_few_images_and_odd_logits_give_a_sensible_temperature() -> None:
    right = torch.eye(4)
    one = fit_temperature(right[:1], torch.tensor([0]))
    four = fit_temperature(right, torch.arange(4))
    assert one is not None
    assert four is not None
    assert 0.1 < four < one
    assert fit_temperature(right[:0], torch.arange(0)) is None
    assert fit_temperature(right[:, :1], torch.zeros(4, dtype=torch.int64)) is None  # one class
    hidden = F.pad(5 * right, (0, 2), value=float("-inf"))  # classes without images
    assert fit_temperature(hidden, torch.arange(4)) == pytest.approx(fit_temperature(5 * right, torch.arange(4)))
    assert fit_temperature(hidden, torch.full((4,), 5)) is None
    assert fit_temperature(torch.zeros(3, 2), torch.tensor([0, 1, 0])) is None  # any would do


def test_each_image_is_held_out_once_and_never_all_of_a_class() -> None:
    targets = torch.tensor([0] * 7 + [1] * 2 + [2] + [3] * 5)
    masks = list(folds(targets))
    assert torch.equal(torch.stack(masks).sum(0), (targets != 2).long())
    assert all({0, 1, 2, 3} == set(targets[~held].tolist()) for held in masks)
    assert len(list(folds(torch.zeros(2000, dtype=torch.int64)))) == 1  # a tenth of them is enough
    assert list(folds(torch.arange(9))) == []


def test_only_images_that_were_not_trained_on_are_held_out_where_there_are_some() -> None:
    targets = torch.tensor([0] * 20 + [1] * 10 + [2] * 2)
    untrained = torch.zeros(32, dtype=torch.bool)
    untrained[[3, 4, 5, 20, 21, 30, 31]] = True  # both images of class 2
    masks = list(folds(targets, untrained))
    assert torch.equal(torch.stack(masks).sum(0), untrained & (targets != 2))
    assert all(0 < int(held.sum()) <= 4 for held in masks)
    assert len(list(folds(targets, torch.zeros(32, dtype=torch.bool)))) == len(list(folds(targets)))


def test_information_is_the_curvature_of_the_cross_entropy() -> None:
    logits, targets = drawn(3.0, 400)
    found = fit_temperature(logits, targets)
    assert found is not None

    def loss(log: float) -> float:
        return float(F.cross_entropy(logits.double() / np.exp(log), targets, reduction="sum"))

    at, step = np.log(found), 1e-3
    curvature = (loss(at + step) + loss(at - step) - 2 * loss(at)) / step**2
    assert information(logits, targets, found) == pytest.approx(curvature, rel=0.05)
    hidden = F.pad(logits, (0, 2), value=float("-inf"))
    assert information(hidden, targets, found) == pytest.approx(information(logits, targets, found))
    lost = torch.cat([logits, torch.full((1, 5), float("nan"))])
    assert information(lost, F.pad(targets, (0, 1)), found) == information(logits, targets, found)
    right = logits.argmax(1)  # without a wrong answer the further image decides
    assert information(logits, right, found) == pytest.approx(0.1 * information(logits, targets, found), rel=0.02)


def test_each_task_keeps_its_temperature() -> None:
    none = TaskTemperatures([], [])
    assert none.common is None
    assert none.of_classes([[0, 1]], 2) == [1.0, 1.0]
    one = none.after(0, 2.0, 200)
    assert one.common == pytest.approx(2.0)
    two = one.after(1, 8.0, 400, growth=0.5)
    assert two.common == pytest.approx(4.0)  # 1 and twice 8
    first, second, both, neither = two.of_classes([[0, 2], [1, 2]], 4)
    assert (first, second) == (pytest.approx(4 ** (1 / 3)), pytest.approx(8 * 0.5**0.2))
    assert both == pytest.approx(neither) == pytest.approx(4.0)
    again = two.after(1, 4.0, 200)
    assert again == TaskTemperatures([1.0, 4.0], [200, 200])
    assert two.after(3, 5.0, 100) == TaskTemperatures([1.0, 8.0, 1.0, 5.0], [200, 400, 0, 100])
    assert two.after(2, None, 0).common == pytest.approx(4.0)
    assert two.after(1, None, 0) == two  # consolidated again, without images to hold out


@pytest.mark.parametrize("drift", ["none", "affine"])
@pytest.mark.parametrize("name", NEW)
def test_held_out_logits_are_of_classifiers_that_did_not_see_the_images(name: str, drift: str) -> None:
    """Beside the same classifier fitted to the other images; and nothing has changed afterwards."""
    classifier, head = NEW[name](drift), IncrementalHead(6)
    for number, task in enumerate(TASKS):
        features, targets = images(task)
        before = features + 0.1 if number else None
        head.expand(range(max(task) + 1), task)
        classifier.begin_task(task)
        classifier.make_room()
        old = {key: tensor.clone() for key, tensor in classifier.named_buffers()}
        logits, held_targets, _, _ = classifier.held_out_answers(features, targets, before, head)
        assert all(torch.equal(tensor, old[key]) for key, tensor in classifier.named_buffers())
        held = next(folds(targets))
        assert torch.equal(held_targets[: int(held.sum())], targets[held])
        alone: FeatureClassifier = NEW[name](drift)
        for earlier in TASKS[:number]:
            alone.begin_task(earlier)
            given = images(earlier)
            alone.fit(*given, given[0] + 0.1, head)
        alone.begin_task(task)
        without = trained_as_far(head, features[~held], targets[~held], True) if name == "aligned" else head
        alone.fit(features[~held], targets[~held], None if before is None else before[~held], without)
        torch.testing.assert_close(logits[: int(held.sum())], alone(features[held]).detach(), rtol=1e-4, atol=1e-4)
        classifier.fit(features, targets, features + 0.1, head)


slow = pytest.mark.slow


@pytest.mark.parametrize(("scale", "divisor"), [(None, 28.0), *(pytest.param(s, 1.0, marks=slow) for s in (None, 20.0))])
def test_a_trained_head_is_trained_as_far_without_the_held_out_images(scale: float | None, divisor: float) -> None:
    features, targets = images([0, 1, 2], 40)
    torch.manual_seed(0)
    head = IncrementalHead(6, scale)
    head.expand([0, 1, 2], [0, 1, 2])
    optimizer = torch.optim.Adam(head.parameters(), 0.05 * divisor)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(head(features) / divisor, targets).backward()
        optimizer.step()
    before = head.weight.detach().clone()
    logits, held = held_out_logits(head, features, targets, only_current=True, loss_temperature=divisor)
    assert torch.equal(head.weight, before)
    assert not logits.requires_grad
    assert len(held) == len(targets)  # all tenths
    own = F.cross_entropy(head(features).detach() / divisor, targets)
    again = F.cross_entropy(logits / divisor, held)
    assert 0.8 * own < again < 3 * own
    assert float(again) != pytest.approx(float(own), rel=1e-3)  # the head itself saw the held-out images


@pytest.mark.parametrize("drift", [0.0, 1.0])
@pytest.mark.parametrize("only_current", [True, pytest.param(False, marks=slow)])
def test_a_head_of_a_large_learning_rate_needs_the_temperature_of_held_out_images(only_current: bool, drift: float) -> None:
    """Also if the features move while it is trained. By its loss alone, 0.5 and 8 were chosen instead of 13 and 16."""
    generator = torch.Generator().manual_seed(0)
    means, targets = torch.randn(12, 30, generator=generator), torch.arange(10).repeat(30) + 2
    moved = drift * torch.randn(12, 30, generator=generator)
    features, new = means[targets] + 2 * torch.randn(2, 300, 30, generator=generator)
    head = IncrementalHead(30)
    head.expand(range(12), range(2, 12))
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.Adam(head.parameters(), 0.5)
    for step in range(20):
        rows = torch.randperm(300, generator=generator)[:60]
        seen = features + (1 - step / 19) * moved[targets]
        optimizer.zero_grad()
        F.cross_entropy(head(seen[rows])[:, 2:], targets[rows] - 2).backward()
        optimizer.step()
    found = fit_temperature(*held_out_logits(head, features, targets, only_current))
    wanted = fit_temperature(head(new).detach(), targets)
    assert found is not None
    assert wanted is not None
    assert abs(np.log(found / wanted)) < np.log(1.6), (found, wanted)


@pytest.mark.parametrize("size", [1.0, 10.0])
@pytest.mark.parametrize(("scale", "layer_norm"), [(None, False), (20.0, False), (1.0, True)])
def test_energies_of_held_out_images_are_those_of_new_images(scale: float | None, layer_norm: bool, size: float) -> None:
    """Features have a common mean, as those of real backbones. Of cosine heads every known image exceeded the threshold."""
    generator = torch.Generator().manual_seed(0)
    means, targets = (
        torch.randn(4, 48, generator=generator) + 2 * torch.randn(48, generator=generator),
        torch.arange(80) % 4,
    )
    features = size * (means[targets] + 1.5 * torch.randn(80, 48, generator=generator))
    new = size * (means[targets.repeat(10)] + 1.5 * torch.randn(800, 48, generator=generator))
    head = IncrementalHead(48, scale, layer_norm=layer_norm)
    head.expand(range(4), range(4))
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(head(features), targets).backward()
        optimizer.step()
    threshold = threshold_of(energy(held_out_logits(head, features, targets, only_current=True)[0], 1.0), 0.05)
    assert float((energy(head(new), 1.0) > threshold).float().mean()) < 0.15


@pytest.mark.parametrize("name", HEADS)
def test_scores_are_divided_and_answers_stay(name: str, tmp_path: Path) -> None:
    model = new_model("l2p", **HEADS[name])
    for task in CLASSES[:2]:
        learn_task(model, task)
        if model.adapter.classifier is None:  # with images of the newest task, also after it
            model.consolidate([task_images(task)])
    state = model.adapter.config.state
    fields = ("temperature", "task_temperatures", "temperature_information", "score_width", "image_scale")
    chosen = [getattr(state, name) for name in fields]
    temperature, values, images, width, by_image = chosen
    assert temperature != 1.0
    assert values[0] != pytest.approx(values[1])
    calibrated = answers(model)
    set_state(model, fields, [None, [], [], None, False])
    assert not PromptPoolPipeline(model, processor()).calibrated
    plain = answers(model)
    assert (width is not None) == (name == "ridge")  # whose scores are estimates of probabilities
    scores = plain if width is None else F.softplus(plain.double() / width).log().float()
    assert by_image == (name in ("discriminant", "aligned"))
    scale = model.adapter.classifier.scale(features(model))[:, None] if by_image else 1.0
    answered = plain.argmax(1) >= len(CLASSES[0])  # number of the task, by the class that is answered
    logs = np.log([*values, temperature])
    of_tasks = [np.exp(np.average(logs[[task, 2]], weights=[images[task], 100])) for task in (0, 1)]
    divisors = torch.tensor(of_tasks, dtype=torch.float32)[answered.long(), None]
    torch.testing.assert_close(calibrated, scores / divisors / scale)
    assert torch.equal(calibrated.argmax(1), plain.argmax(1))
    set_state(model, fields, chosen)
    model.save_pretrained(tmp_path)
    assert f"({min(values):.3g} to {max(values):.3g} by task)" in (tmp_path / "README.md").read_text()
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    assert torch.equal(answers(loaded), calibrated)
    assert PromptPoolPipeline(loaded, processor()).calibrated
    twin = new_model("l2p", **HEADS[name])
    twin.load_training_state_dict(model.training_state_dict())
    assert torch.equal(answers(twin), calibrated)


def test_without_tasks_each_part_of_a_stream_counts() -> None:
    model = new_model("l2p", num_labels=4, class_mask="none")
    state = model.adapter.config.state
    state.temperature = 5.0  # of an earlier version, which has a weight of 100
    found = []
    for classes, per_class in (([0, 1], 6), ([2, 3], 6), ([1], 1)):
        plain = answers(model) * model.adapter.calibration.divisors(answers(model))
        model.consolidate([task_images(classes, per_class)])
        found.append(state.temperature)
    known, values = state.temperature_information, state.task_temperatures
    assert [bool(one) for one in known] == [True, True, True, False]
    assert known[0] == 100
    assert found[-1] == found[-2] == pytest.approx(np.exp(np.average(np.log(values), weights=known)))
    assert found[0] != found[1]
    torch.testing.assert_close(answers(model), plain / found[-1])


def test_scores_may_be_on_another_device_than_the_temperatures() -> None:
    """Accelerate's `dispatch_model` and `DataParallel` place parameters and buffers, and no other tensors."""
    model = new_model("l2p")
    learn_task(model, CLASSES[0])
    assert model.adapter.calibration.divisors(torch.zeros(3, 2, device="meta")).is_meta


def set_state(model: PromptPoolModel, names: Iterable[str], values: Iterable[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        setattr(model.adapter.config.state, name, value)
    model.adapter.calibration.update(model.adapter.tasks)


def processor() -> Any:
    return lambda images, return_tensors: {"pixel_values": SEEN[:1]}


def test_logarithms_of_any_scores_are_finite_and_keep_the_order() -> None:
    scores = torch.cat([torch.linspace(-1e4, 1e4, 101), torch.linspace(-3, 3, 101)]).sort().values.requires_grad_()
    found = log_scores(scores, 0.1)
    assert (found.diff() >= 0).all()
    torch.testing.assert_close(found[51:-51], F.softplus(scores[51:-51].double() / 0.1).log().float())
    found.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert log_scores(torch.tensor([-float("inf")]), 0.1) == -float("inf")


def test_a_temperature_of_other_scores_is_not_carried_on() -> None:
    """A file of an earlier version has a temperature for the scores of its ridge head, and no width."""
    old = new_model("l2p", **HEADS["ridge"])
    learn_task(old, CLASSES[0])
    state = old.adapter.config.state
    before, new = answers(old), old.adapter.calibration.temperature
    set_state(old, ("temperature", "score_width", "novelty_threshold"), (0.04, None, 100.0))
    set_state(old, ("task_temperatures", "temperature_information"), ([], []))
    torch.testing.assert_close(log_scores(0.04 * answers(old), 0.1) / new, before)
    learn_task(old, CLASSES[1])
    state = old.adapter.config.state
    assert state.score_width == 0.1
    assert state.temperature is not None
    assert state.temperature > 0.1
    assert state.novelty_threshold is not None
    assert state.novelty_threshold < 50  # without the earlier 100


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), "3", True, 1e9])
def test_a_foreign_temperature_is_refused(wrong: Any) -> None:
    for name in ("temperature", "score_width"):
        with pytest.raises(ValueError, match=rf"`state.{name}` must be from 1e-6 to 1e6 or null"):
            AdapterState.from_dict({name: wrong})
    with pytest.raises(ValueError, match=r"`state.task_temperatures` must be numbers from 1e-6 to 1e6"):
        AdapterState.from_dict({"task_temperatures": [1.0, wrong], "temperature_information": [5, 5]})


@pytest.mark.parametrize("wrong", [[], [1, 2, 3], [1, -1], [1, float("nan")], [1, float("inf")], [1, True], "12", None])
def test_foreign_information_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"`state.temperature_information` must have a number from 0 on for each of the 2"):
        AdapterState.from_dict({"task_temperatures": [1.0, 2.0], "temperature_information": wrong})


@pytest.mark.parametrize("kind", ["low_rank", "shared", "full", "diagonal"])
def test_tasks_of_different_spread_are_calibrated_alike(kind: str) -> None:
    """Of the second task's features everything is four times as wide: one temperature makes one of them unsure."""
    generator = torch.Generator().manual_seed(0)
    classifier = DiscriminantClassifier(20, kind=kind, drift="none")
    temperatures, seen = TaskTemperatures([], []), []
    for number, width in enumerate((1.0, 4.0)):
        means = width * torch.randn(5, 20, generator=generator)
        targets = torch.arange(5).repeat(60)
        x = means[targets] + 2 * width * torch.randn(300, 20, generator=generator)
        classifier.begin_task(range(5 * number, 5 * number + 5))
        targets = targets + 5 * number
        held = classifier.held_out_answers(x[:200], targets[:200])
        assert held.scale is not None
        chosen = fit_temperature(held.logits / held.scale[:, None], held.targets)
        assert chosen is not None
        temperatures = temperatures.after(
            number, chosen, information(held.logits / held.scale[:, None], held.targets, chosen)
        )
        classifier.fit(x[:200], targets[:200])
        seen.append((x[200:], targets[200:]))
    for x, targets in seen:
        scores = (classifier(x) / classifier.scale(x)[:, None] / temperatures.common).softmax(1)
        accuracy = (scores.argmax(1) == targets).float().mean()
        assert abs(float(scores.amax(1).mean() - accuracy)) < 0.15, (float(scores.amax(1).mean()), float(accuracy))


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_every_method_is_calibrated_after_a_task(method: str) -> None:
    model = new_model(method)
    learn_task(model, CLASSES[0])
    if not model.needs_consolidation:  # otherwise it was done
        model.consolidate([task_images(CLASSES[0])])
    assert model.adapter.config.state.temperature is not None
    assert answers(model).isfinite().all()


def test_answers_while_held_out_keep_a_fit_of_the_same_task() -> None:
    classifier = DiscriminantClassifier(6, drift="none")
    for task in TASKS[:2]:
        classifier.begin_task(task)
    features, targets = images(TASKS[1])
    classifier.fit(features, targets)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    classifier.held_out_answers(features, targets)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
