"""Classifiers made from features, in models: what they see, what moves, what stays, what they answer."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from support.closed_form_models import (
    SEEN,
    answers,
    features,
    in_batches,
    learn_task,
    learnt_model,
    new_model,
    state,
    task_images,
    train_steps,
)
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER
from support.small_runs import CLASSES, small_model, small_stream, small_trainer
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import NoPromptsConfig, PromptPoolModel, get_prompt_pool_model


pytestmark = pytest.mark.by_turns(5)


every_classifier = pytest.mark.parametrize("method", WITH_CLASSIFIER)


# ---- features that do not change ---------------------------------------------------------------------------------------


@pytest.mark.by_turns(11, always=("l2p",))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "head", [{"head": "linear"}, {"head": "analytic", "projection_size": 20}], ids=["linear", "analytic"]
)
def test_prompts_of_the_first_task_stay(method: str, head: dict[str, Any]) -> None:
    """Prompts, routers, keys, statistics of the pool: bit-equal after later tasks, and so is every image's feature."""
    model = new_model(method, trained_tasks="first", **head)
    learn_task(model, CLASSES[0])
    pool = {name: tensor for name, tensor in state(model).items() if ".pool." in name}
    before = features(model)
    for number, task in enumerate(CLASSES[1:], start=1):
        images = task_images(task)
        model.begin_task(task)
        assert {g["name"] for g in model.parameter_groups(learning_rate=0.1)} <= {"head"}
        train_steps(model, images)  # although a head in closed form has no use for it
        assert torch.equal(features(model), before)
        if model.needs_consolidation:
            model.consolidate([images])
        model.end_task()
        assert model.trains_task(number) is (head["head"] == "linear")
    assert torch.equal(features(model), before)
    now = state(model)
    assert [name for name in pool if not torch.equal(pool[name], now[name])] == []
    assert [name for name in now if ".pool." in name and name not in pool] == []


def test_a_frozen_pool_stays_frozen_whoever_switches_gradients(tmp_path: Path) -> None:
    model = learnt_model("hash", trained_tasks="first")
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    twin = new_model("hash", trained_tasks="first")
    twin.load_training_state_dict(model.training_state_dict())
    model.set_adapter("default")
    model.set_requires_grad("default", True)
    for one in (model, loaded, twin):
        assert {name for name, p in one.named_parameters() if p.requires_grad} == {
            f"base_model.pools.prompt_pool.default.head.{name}" for name in ("weight", "bias")
        }
        with pytest.raises(ValueError, match="prompts are frozen after the first task"):
            one.grow_pool(9)
        with pytest.raises(ValueError, match="prompts are frozen after the first task"):
            one.initialize_prompts(SEEN)


def test_the_first_task_and_all_tasks_differ_in_nothing_before_the_second() -> None:
    first, every = (learnt_model("l2p", CLASSES[:1], trained_tasks=which) for which in ("first", "all"))
    assert torch.equal(answers(first), answers(every))
    assert all(p.requires_grad for p in first.adapter.parameters())


# ---- what is seen ------------------------------------------------------------------------------------------------------


@pytest.mark.by_turns(11, always=("l2p",))
@pytest.mark.parametrize("method", METHODS)
def test_statistics_follow_the_features_of_every_method(method: str) -> None:
    """Against numpy: the old classes' means after a task, from features taken before begin_task and after training."""
    model = new_model(method, head="discriminant")
    learn_task(model, CLASSES[0])
    gaussians = model.adapter.classifier.gaussians
    old = features(model, task_images(CLASSES[0])["pixel_values"]).double().numpy()
    labels = task_images(CLASSES[0])["labels"].numpy()
    means = np.stack([old[labels == c].mean(0) for c in CLASSES[0]])
    np.testing.assert_allclose(gaussians.mean[:, 0].numpy(), means, atol=1e-5)

    images = task_images(CLASSES[1])
    before = features(model, images["pixel_values"]).double().numpy()
    learn_task(model, CLASSES[1])
    after = features(model, images["pixel_values"]).double().numpy()
    if method == "none":
        assert np.array_equal(before, after)
        assert not model.needs_features_before
    else:
        assert not np.allclose(before, after, atol=1e-4)
        x, y = before - before.mean(0), after - after.mean(0)
        ridge = model.adapter.classifier.newest_map.ridge
        matrix = np.linalg.solve(x.T @ x + ridge * x.size / x.shape[1] * x.var() * np.eye(x.shape[1]), x.T @ (y - x))
        means = (means - before.mean(0)) @ (np.eye(x.shape[1]) + matrix) + after.mean(0)
    np.testing.assert_allclose(gaussians.mean[:2, 0].numpy(), means, atol=1e-4)
    new = np.stack([after[images["labels"].numpy() == c].mean(0) for c in CLASSES[1]])
    np.testing.assert_allclose(gaussians.mean[2:, 0].numpy(), new, atol=1e-5)
    assert answers(model).isfinite().all()


def test_images_in_any_order_and_number_of_batches_are_the_same() -> None:
    found = []
    for size, flipped in ((12, False), (5, True), (1, False)):
        model = new_model("l2p analytic", ridge=1.0)
        for task in CLASSES:
            batches = in_batches(task_images(task), size)
            if flipped:
                batches = [{k: v[::-1] if isinstance(v, list) else v.flip(0) for k, v in b.items()} for b in batches[::-1]]
            if model.classes:
                model.record_features(batches)
            model.begin_task(task)
            model.eval().consolidate(batches)
            model.end_task()
        found.append(answers(model))
    assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    assert_close(found[2], found[0], atol=1e-3, rtol=1e-3)


def test_padding_and_repeated_images_count_once() -> None:
    found = []
    for dirty in (False, True):
        model = new_model("none analytic", ridge=1.0)
        for task in CLASSES[:2]:
            model.begin_task(task)
            batches = in_batches(task_images(task), 5)
            if dirty:
                padding = {**batches[0], "labels": torch.full((5,), -100), "sample_ids": [-1] * 5}
                padding["pixel_values"] = torch.full_like(padding["pixel_values"], 7.0)
                batches = [padding, batches[0], *batches, batches[1]]
            model.consolidate(batches)
            model.end_task()
        found.append(model.adapter.classifier.gram)
    assert_close(found[1], found[0], atol=1e-9, rtol=0)


def test_confident_routers_are_chosen_alike_for_the_statistics_and_at_test() -> None:
    """Several candidates per image: a classifier made from features sees at test those that it was made from."""
    model = learnt_model("hash discriminant", router_inference="confidence", drift_compensation="none")
    with torch.no_grad():
        output = model(pixel_values=SEEN)
    assert torch.equal(output.features, features(model))
    assert_close(output.logits, model.adapter.calibrated(model.adapter.classifier(output.features), output.features))


# ---- the head in closed form -------------------------------------------------------------------------------------------


def all_images() -> tuple[Tensor, Tensor]:
    parts = [task_images(task) for task in CLASSES]
    return torch.cat([p["pixel_values"] for p in parts]), torch.cat([p["labels"] for p in parts])


@pytest.mark.parametrize("method", ["none", "l2p"])
def test_a_model_answers_as_ridge_regression_on_all_images_at_once(method: str) -> None:
    """Un-prompted features, and prompts of the first task; by class id, so that the order of tasks does not matter."""
    logits = []
    for tasks in (CLASSES, [CLASSES[0], CLASSES[2], CLASSES[1]]):
        model = learnt_model(
            method, tasks, head="analytic", projection_size=60, ridge=3.0, trained_tasks="first", readout="auto"
        )
        state = model.adapter.config.state
        state.temperature, state.task_temperatures, state.temperature_information, state.score_width = None, [], [], None
        model.adapter.calibration.update(model.adapter.tasks)
        logits.append(answers(model)[:, [model.classes.index(c) for c in range(6)]])
        pixels, labels = all_images()
        projection = model.adapter.classifier.projection.double().numpy()
        hidden, seen = (np.maximum(features(model, x).double().numpy() @ projection, 0) for x in (pixels, SEEN))
        weight = np.linalg.solve(hidden.T @ hidden + 3 * np.eye(60), hidden.T @ np.eye(6)[labels.numpy()])
        np.testing.assert_allclose(logits[-1].numpy(), seen @ weight, atol=2e-4)
    assert_close(logits[0], logits[1], atol=2e-4, rtol=0)


def test_un_prompted_features_need_no_training() -> None:
    trainer = small_trainer("none analytic", config={"ridge": 3.0})
    matrix = trainer.train()
    assert trainer.progress.global_step == 0
    model = small_model("none analytic", ridge=3.0)
    for task in small_stream():
        model.begin_task(task.classes)
        model.eval().consolidate(small_stream().images(task.train_rows, 7))
        model.end_task()
    assert_close(answers(model), answers(trainer.model), atol=1e-4, rtol=0)
    assert len(matrix.columns) == 3
    assert model.adapter.readout == "cls_mean"
    assert model.adapter.classifier.projection.shape == (64, 40)


@pytest.mark.slow
def test_prompts_of_the_first_task_cost_its_steps_only() -> None:
    trainer = small_trainer("l2p analytic", config={"trained_tasks": "first"}, num_train_epochs=1)
    trainer.train()
    assert trainer.progress.global_step == 3
    goes_on = small_trainer("l2p", config={"trained_tasks": "first"}, num_train_epochs=1)
    goes_on.train()
    assert goes_on.progress.global_step == 9


@pytest.mark.parametrize("method", ["none analytic", "hash discriminant"])
def test_classes_come_back_in_other_domains(method: str) -> None:
    model = new_model(method)
    learn_task(model, [4, 1])
    learn_task(model, [4, 1], revisit=True, seed=5)
    learn_task(model, [1, 2], revisit=True, seed=6)
    assert model.classes == [4, 1, 2]
    assert answers(model).shape == (len(SEEN), 3)
    classifier = model.adapter.classifier
    if method == "hash discriminant":
        assert classifier.gaussians.class_indices == [0, 1, 0, 1, 1, 2]
        assert classifier.gaussians.count.flatten().tolist() == [6] * 6
        return
    parts = [task_images([4, 1]), task_images([4, 1], seed=5), task_images([1, 2], seed=6)]
    x = features(model, torch.cat([p["pixel_values"] for p in parts])).double().numpy()
    hidden = np.maximum(x @ classifier.projection.double().numpy(), 0)
    np.testing.assert_allclose(classifier.gram.numpy(), hidden.T @ hidden, rtol=1e-6, atol=1e-6)


def test_a_stream_without_tasks_has_one_look() -> None:
    """num_labels and no prompts: all classes are known from the start."""
    config = NoPromptsConfig(head="analytic", projection_size=40, num_labels=6, class_mask="none")
    model = get_prompt_pool_model(build("vit"), config)
    pixels, labels = all_images()
    with pytest.raises(ValueError, match=r"has seen no task yet: call model.consolidate"):
        answers(model)
    model.eval().consolidate([{"pixel_values": pixels, "labels": labels}])
    assert (answers(model, pixels).argmax(1) == labels).float().mean() > 0.9


def test_ridge_and_analytic_are_two_names_of_one_head(tmp_path: Path) -> None:
    """The name is saved as it was given."""
    models = {name: learnt_model("none analytic", head=name) for name in ("ridge", "analytic")}
    assert torch.equal(answers(models["ridge"]), answers(models["analytic"]))
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path / name)
        assert loaded.adapter.config.head == name
        assert torch.equal(answers(loaded), answers(model))


# ---- alignment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["covariance", "diagonal", "centroids"])
def test_alignment_changes_the_head_and_nothing_else(alignment: str) -> None:
    found = []
    for seed in (0, 0, 1):
        model = new_model("hash", alignment=alignment, classifier_seed=seed)
        learn_task(model, CLASSES[0])
        images = task_images(CLASSES[1])
        model.record_features([images])
        model.begin_task(CLASSES[1])
        train_steps(model, images)
        before, random = state(model), torch.get_rng_state()
        model.consolidate([images])
        assert torch.equal(torch.get_rng_state(), random)
        after = state(model)
        changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
        assert {n for n in changed if ".classifier." not in n and not n.startswith("recorded.")} == {
            "adapter.head.weight",
            "adapter.head.bias",
        }
        model.end_task()
        found.append(model.head.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.by_turns(11, always=("l2p",))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_aligned(method: str) -> None:
    """Head targets of the first task, which its own loss never compares with the second's, move when they meet."""
    model = new_model(method, alignment="covariance")
    learn_task(model, CLASSES[0])
    images = task_images(CLASSES[1])
    if model.needs_features_before:
        model.record_features([images])
    model.begin_task(CLASSES[1])
    train_steps(model, images, steps=1)
    before = model.head.weight.detach().clone()
    model.consolidate([images])
    model.end_task()
    assert ((model.head.weight - before).abs().amax(1) > 1e-4).all()
    assert answers(model).isfinite().all()


# ---- answers -----------------------------------------------------------------------------------------------------------


@every_classifier
def test_answers_depend_on_the_image_alone(method: str) -> None:
    model = learnt_model(method)
    whole = answers(model)
    assert_close(torch.cat([answers(model, row[None]) for row in SEEN]), whole, atol=2e-3, rtol=1e-4)
    for labels in (torch.zeros(len(SEEN), dtype=torch.int64), torch.full((len(SEEN),), 5)):
        with torch.no_grad():
            assert torch.equal(model(pixel_values=SEEN, labels=labels).logits, whole)


@every_classifier
def test_a_plain_peft_model_answers_alike(method: str, tmp_path: Path) -> None:
    ours = learnt_model(method)
    base = build("vit")
    torch.manual_seed(3)
    plain = peft.get_peft_model(base, {**METHODS, **WITH_CLASSIFIER}[method]())
    for task in CLASSES:
        learn_task(plain, task, train=plain.trains_task(0))
    assert torch.equal(answers(plain), answers(ours))
    plain.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("vit"), tmp_path)
    assert torch.equal(answers(loaded), answers(ours))
