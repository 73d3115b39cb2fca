"""The mathematics of the baselines against plain torch and numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import after_a_task, batch_of, parts_of, plain_logits, small_learner, train_steps
from support.families import BARE, CLASSIFIERS, build, inputs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts.baselines import get_baseline


pytestmark = pytest.mark.by_turns(3)


# ---- what all share --------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_answer(base: Any, images: dict[str, Tensor]) -> Tensor:
    """What the base itself answers."""
    torch.manual_seed(0)  # of ViT-MAE's mask
    return base.eval()(**images)[0]


@pytest.mark.parametrize("make", [BARE, CLASSIFIERS], ids=["bare", "classifier"])
@pytest.mark.parametrize("family", sorted({*BARE, *CLASSIFIERS}))
def test_every_parameter_that_is_trained_takes_part(family: str, make: dict[str, Callable[[], Any]]) -> None:
    """What takes no part would stop DistributedDataParallel; what the feature does not depend on must not move."""
    if family not in make:
        pytest.skip("the family has no such class")
    base = build(family, classifier=make is CLASSIFIERS)
    images = inputs(family)
    before = plain_answer(base, images)
    learner = get_baseline("finetune", base)
    learner.begin_task([7, 2])
    learner.train()(**images, labels=torch.tensor([7, 2, 7])).loss.backward()
    assert [name for name, p in learner.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    assert sum(p.numel() for p in learner.trained().values()) > 0.5 * sum(p.numel() for p in base.parameters())
    assert_close(plain_answer(base, images), before, atol=0, rtol=0)  # its hooks act in a learner's pass only


def test_the_loss_sees_the_tasks_classes() -> None:
    learner = small_learner("finetune")
    learner.begin_task([4, 1])
    learner.end_task()
    learner.begin_task([0, 3])
    batch = batch_of([0, 3, 3, -100])
    learner.train()
    output = learner(**batch)
    logits = plain_logits(learner, batch["pixel_values"][:3])[:, 2:]
    wanted = F.cross_entropy(logits, torch.tensor([0, 1, 1]))
    assert_close(output.loss, wanted)
    own, plain = (torch.autograd.grad(loss, list(learner.trained().values())) for loss in (output.loss, wanted))
    assert_close(own, plain)
    assert_close(learner.eval()(batch["pixel_values"][:3]).logits[:, 2:], logits)


def test_several_classes_of_a_rehearsing_learner_compete() -> None:
    learner = after_a_task("er")
    batch = batch_of([0, 3, 4, 1])
    logits = plain_logits(learner, batch["pixel_values"])
    assert_close(parts_of(learner, batch)["cross_entropy"], F.cross_entropy(logits, torch.tensor([2, 3, 0, 1])))


def test_a_frozen_backbone_reads_cached_features_and_stays() -> None:
    learner = small_learner("frozen")
    before = {name: p.clone() for name, p in learner.get_base_model().named_parameters()}
    learner.begin_task([4, 1])
    batch = batch_of([4, 1, 1])
    train_steps(learner, batch)
    assert all(torch.equal(before[name], p) for name, p in learner.get_base_model().named_parameters())
    query = learner.extract_features(batch["pixel_values"])
    assert torch.equal(learner(batch["pixel_values"], query=query).logits, learner(batch["pixel_values"]).logits)
    assert_close(learner(batch["pixel_values"] * 0, query=query).logits, plain_logits(learner, batch["pixel_values"]))


def test_lora_adds_a_product_to_each_linear_layer_of_a_block() -> None:
    plain = build("vit").eval()
    linear = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and ".0." in name]
    chosen = [name.split(".")[-1] for name in (linear[0], linear[-1])]  # names differ between versions of transformers
    learner = small_learner("lora", rank=2, alpha=6.0, layers=chosen)
    frozen = {name: p.clone() for name, p in learner.get_base_model().named_parameters() if not p.requires_grad}
    learner.begin_task([4, 1])
    train_steps(learner, batch_of([4, 1, 1]))
    base = learner.get_base_model()
    assert all(torch.equal(p, frozen[name]) for name, p in base.named_parameters() if name in frozen)
    updated = {name.removesuffix(".lora_A.default.weight") for name, _ in base.named_parameters() if ".lora_A." in name}
    assert {name.split(".")[-1] for name in updated} == set(chosen)
    with torch.no_grad():
        for name in updated:
            down, up = (base.get_submodule(f"{name}.{part}.default").weight for part in ("lora_A", "lora_B"))
            plain.get_submodule(name).weight += 6.0 / 2 * up @ down
    images = batch_of([4, 1, 0])["pixel_values"]
    wanted = plain(pixel_values=images).last_hidden_state[:, 0]
    assert not torch.allclose(wanted, build("vit").eval()(pixel_values=images).last_hidden_state[:, 0], atol=1e-3)
    assert_close(learner.extract_features(images), wanted)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch says so of every pass
def test_lora_refuses_a_checkpointing_through_which_it_gets_no_gradient() -> None:
    learner = small_learner("lora", rank=2)
    learner.begin_task([4, 1])
    base = learner.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="no gradient reaches the LoRA"):
        learner.train()(**batch_of([4, 1]))
    base.gradient_checkpointing_enable({"use_reentrant": False})
    learner(**batch_of([4, 1])).loss.backward()
    assert all(p.grad is not None for p in learner.trained().values())


def test_nearest_class_mean_in_numpy() -> None:
    learner = small_learner("ncm").eval()
    images = {0: batch_of([4, 1, 4, 1, -100], seed=1), 1: batch_of([0, 4, 0], seed=2)}
    learner.begin_task([4, 1])
    learner.consolidate([images[0]])
    learner.end_task()
    learner.begin_task([0, 4], revisit=True)
    assert learner(images[1]["pixel_values"]).logits[:, 2].isneginf().all()  # class 0 has no mean yet
    learner.consolidate([images[1]])
    base = learner.get_base_model()
    features = [base(b["pixel_values"]).last_hidden_state[:, 0].detach().double().numpy() for b in images.values()]
    rows, labels = np.concatenate(features), np.array([4, 1, 4, 1, -100, 0, 4, 0])
    test = batch_of([0, 1, 4], seed=8)["pixel_values"]
    shown = base(test).last_hidden_state[:, 0].detach().double().numpy()
    means = np.stack([rows[labels == c].mean(0) for c in (4, 1, 0)])
    cosine = (shown @ means.T) / np.linalg.norm(shown, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    assert_close(learner(test).logits.double(), torch.tensor(cosine), atol=1e-5, rtol=0)


# ---- EWC and SI ------------------------------------------------------------------------------------------------------


def plain_fisher(learner: Any, images: Tensor, columns: list[int], seen: list[int]) -> dict[str, Tensor]:
    """Mean squared gradient of log p(label), softmax over the columns `seen`."""
    total = {name: torch.zeros_like(p) for name, p in learner.trained().items()}
    for image, column in zip(images, columns, strict=True):
        learner.zero_grad()
        logits = plain_logits(learner, image[None])[0, seen]
        (logits[seen.index(column)] - logits.exp().sum().log()).backward()
        for name, p in learner.trained().items():
            total[name] += p.grad**2 / len(columns)
    learner.zero_grad()
    return total


def ewc_over_two_tasks(name: str) -> tuple[Any, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A learner in its third task, Fisher information and parameters after each of the first two."""
    learner = small_learner(name, strength=3.0)
    fisher, places = [], []
    for classes, columns in (([4, 1], [0, 1, 0]), ([0, 3], [2, 2, 3])):
        learner.begin_task(classes)
        batch = batch_of([learner.classes[c] for c in columns] + [-100])
        train_steps(learner, batch)
        fisher.append(plain_fisher(learner, batch["pixel_values"][:3], columns, sorted(set(columns))))
        places.append({name: p.detach().clone() for name, p in learner.trained().items()})
        learner.consolidate([batch])
        learner.end_task()
    learner.begin_task([2, 5])
    train_steps(learner, batch_of([2, 5]), steps=1)
    return learner, fisher, places


def padded(values: Tensor, like: Tensor) -> Tensor:
    return values if values.shape == like.shape else torch.cat([values, torch.zeros_like(like[len(values) :])])


def test_ewc_pulls_towards_every_earlier_task() -> None:
    learner, fisher, places = ewc_over_two_tasks("ewc")
    parameters = learner.trained()
    found = torch.autograd.grad(learner.penalty.value(parameters), list(parameters.values()))
    moved = 0
    for (name, p), gradient in zip(parameters.items(), found, strict=True):
        wanted = sum(
            3.0 * padded(f[name], p) * (p.detach() - padded(place[name], p))
            for f, place in zip(fisher, places, strict=True)
        )
        assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)
        moved += int((gradient != 0).sum())
    assert moved > 1000
    batch = batch_of([2, 5])
    assert_close(parts_of(learner, batch)["penalty"], learner.penalty.value(parameters))


def test_online_ewc_fades_and_moves_its_centre() -> None:
    learner, fisher, places = ewc_over_two_tasks("ewc_online")
    for name, importance in learner.penalty.importance.items():
        first, second = fisher[0][name], fisher[1][name]
        assert_close(importance, 0.7 * padded(first, second) + second, atol=1e-9, rtol=1e-4)
        assert torch.equal(learner.penalty.center[name], places[1][name])
    parameters = learner.trained()
    value = sum(
        (1.5 * learner.penalty.importance[n] * (p[: len(places[1][n])] - places[1][n]) ** 2).sum()
        for n, p in parameters.items()
    )
    assert_close(learner.penalty.value(parameters), value)


def test_si_on_a_quadratic() -> None:
    """Gradient descent on a/2 (theta - t)^2: the path integral is a geometric series."""
    learner = small_learner("si", damping=0.01)
    learner.begin_task([4, 1])
    rate, curvature, steps = 0.1, 2.0, 5
    start = {name: p.detach().clone() for name, p in learner.trained().items()}
    optimizer = torch.optim.SGD(learner.parameter_groups(rate))
    learner.attach_optimizer(optimizer)
    for _ in range(steps):
        for p in learner.trained().values():
            p.grad = curvature * (p.detach() - 1)  # towards t = 1
        optimizer.step()
    shrink = 1 - rate * curvature
    learner.end_task()
    for name, place in start.items():
        way = place - 1
        omega = rate * curvature**2 * way**2 * (1 - shrink ** (2 * steps)) / (1 - shrink**2)
        wanted = omega / (((shrink**steps - 1) * way) ** 2 + 0.01)
        assert_close(learner.penalty.importance[name], wanted, atol=1e-5, rtol=1e-4)
        assert_close(learner.penalty.center[name], 1 + shrink**steps * way, atol=1e-5, rtol=1e-5)


def test_si_leaves_the_penalty_out_of_the_path() -> None:
    learner = after_a_task("si")
    learner.end_task()
    learner.begin_task([2, 5])
    optimizer = torch.optim.Adam(learner.parameter_groups(0.01))
    learner.attach_optimizer(optimizer)
    learner.train()
    batch = batch_of([2, 5, 2])
    wanted = {name: torch.zeros_like(p) for name, p in learner.trained().items()}
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in learner.trained().items()}
        output = learner(**batch)
        parameters = learner.trained()
        task = torch.autograd.grad(output.losses["cross_entropy"], list(parameters.values()), retain_graph=True)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        for (name, p), gradient in zip(parameters.items(), task, strict=True):
            wanted[name] -= gradient * (p.detach() - before[name])
    assert float(output.losses["penalty"].detach()) > 1e-4
    for name, path in learner.path.items():
        assert_close(path, wanted[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["der++", "ewc", "bic", "icarl", "ncm"])
def test_consolidation_under_autocast_stays_in_float32(name: str) -> None:
    learner = small_learner(name, **({"held_out": 0.5} if name == "bic" else {})).eval()
    for classes in ([4, 1], [0, 3]):
        learner.begin_task(classes)
        batch = batch_of(learner.classes * 3)
        with torch.autocast("cpu", torch.bfloat16):
            learner.consolidate([batch], [batch])
            answer = learner(batch["pixel_values"])
        learner.end_task()
    kept = {n: t for n, t in learner.extra_tensors().items() if t.is_floating_point()}
    assert kept
    assert all(t.dtype in (torch.float32, torch.float64) and t.isfinite().all() for t in kept.values())
    assert answer.logits.dtype == torch.float32
