"""PackNet, SupSup and HAT: what earlier tasks use is not changed, and the formulas of HAT."""

from typing import Any

import pytest
import torch
from support.comparison import batch_of, comparison_trainer, small_learner
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts.baselines.supsup import packed, unpacked
from cl_prompts.evaluation.evaluate import evaluate
from cl_prompts.evaluation.report import Result, comparison_table, headline


def learn(learner: Any, classes: list[int], seed: int, *, revisit: bool = False) -> None:
    """A task with an optimizer that moves what has no gradient: momentum and weight decay."""
    learner.begin_task(classes, revisit=revisit)
    optimizer = torch.optim.AdamW(learner.parameter_groups(0.02), weight_decay=0.1)
    learner.attach_optimizer(optimizer)
    batch = batch_of(classes * 3, seed=seed)
    learner.train()
    for _ in range(4):
        learner(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learner.eval()
    learner.consolidate([batch])
    learner.end_task()


@torch.no_grad()
def features_by(learner: Any, images: Tensor, task: int) -> Tensor:
    with learner.network(task):
        return learner.features(images)


@pytest.mark.parametrize("name", ["packnet", "supsup", "hat"])
def test_later_tasks_do_not_change_the_answers_for_earlier_ones(name: str) -> None:
    learner = small_learner(name)
    images, features, rows = batch_of([4, 1, 0, 3, 2, 5])["pixel_values"], [], []
    for number, classes in enumerate(([4, 1], [0, 3], [2, 5])):
        learn(learner, classes, number)
        features.append([features_by(learner, images, task) for task in range(number + 1)])
        rows.append(learner.head.weight.detach().clone())
    tolerance = 1e-3 if name == "hat" else 0  # its masks are not quite 0 and 1
    for task in range(2):
        assert_close(features[-1][task], features[task][task], atol=tolerance, rtol=0)
        assert not torch.allclose(features[-1][task], features[-1][-1], atol=1e-2)
        assert torch.equal(rows[task], rows[-1][: len(rows[task])])
    found = learner(images).logits
    assert_close(torch.cat([learner(image[None]).logits for image in images]), found, atol=1e-5, rtol=1e-4)
    for task in range(3):  # an answer for each class by its task's network
        columns = slice(2 * task, 2 * task + 2)
        own = F.linear(features[-1][task], learner.head.weight, learner.head.bias)[:, columns]
        pair = (found[:, columns], own) if name != "supsup" else (found[:, columns].softmax(1), own.softmax(1))
        assert_close(*pair)


@pytest.mark.parametrize("name", ["packnet", "supsup", "hat"])
def test_each_domain_has_its_own_network_and_head(name: str) -> None:
    """Also in a learner that was loaded; `evaluate` tells the domain to those that need it."""
    learner, classes = small_learner(name), [4, 1]
    images, known = batch_of(classes * 3, seed=8), []
    for domain in range(3):
        learn(learner, classes, domain, revisit=domain > 0)
        with torch.no_grad():
            known.append(learner.network_logits(images["pixel_values"], domain))
    loaded = small_learner(name)
    loaded.load_training_state_dict(learner.training_state_dict())
    loaded.eval()
    tolerance = 1e-3 if name == "hat" else 0
    with torch.no_grad():
        for domain, own in enumerate(known):
            assert_close(loaded.network_logits(images["pixel_values"], domain), own, atol=tolerance, rtol=0)
        assert not torch.allclose(known[0], known[2], atol=1e-2)
        if name == "supsup":
            scores = torch.stack([own.log_softmax(1) for own in known], 1)
            inferred = loaded.infer_tasks(images["pixel_values"])
            wanted = scores[torch.arange(len(inferred)), inferred]
            assert_close(loaded(images["pixel_values"]).logits, wanted, atol=1e-6, rtol=0)
            return
        assert_close(loaded(images["pixel_values"]).logits, known[2], atol=tolerance, rtol=0)
        for domain in range(3):
            answer = loaded(images["pixel_values"], task=domain).logits
            assert_close(answer, known[domain], atol=tolerance, rtol=0)
            right = (answer.argmax(1) == loaded.head.to_targets(images["labels"])[0]).sum() / 6
            evaluation = evaluate(loaded, [images], classes, "cpu", task=domain, tasks=[classes] * 3)
            assert evaluation.task_incremental == pytest.approx(100 * float(right))
        with pytest.raises(ValueError, match="task=3 must be one of the 3 tasks so far"):
            loaded(images["pixel_values"], task=3)


def test_supsup_infers_the_task_from_the_entropys_gradient() -> None:
    """The gradient by the weights of the superposition, against differences, image by image."""
    learner = small_learner("supsup", keep=0.6)
    for number, classes in enumerate(([4, 1], [0, 3], [2, 5])):
        learn(learner, classes, number)
    base, head = learner.get_base_model(), learner.head
    weights = {name: layer.weight.detach().double() for name, layer in learner.layers.items()}
    images = batch_of([4, 0, 2])["pixel_values"]

    def entropy(image: Any, alpha: list[float]) -> float:
        mixed = {
            f"{name}.weight": weight * sum(a * m for a, m in zip(alpha, learner.masks[name], strict=True))
            for name, weight in weights.items()
        }
        hidden = torch.func.functional_call(base.double(), mixed, (image[None].double(),)).last_hidden_state[:, 0]
        p = F.linear(hidden, head.weight.double(), head.bias.double()).softmax(1)
        return float(-(p * p.log()).sum())

    with torch.no_grad():
        slopes = []
        for image in images:
            moved = [[1 / 3 + 1e-4 * (i == j) for j in range(3)] for i in range(3)]
            slopes.append([entropy(image, alpha) - entropy(image, [1 / 3] * 3) for alpha in moved])
    base.float()
    assert learner.infer_tasks(images).tolist() == torch.tensor(slopes).argmin(1).tolist()
    masks = torch.rand(3, 5, 7) > 0.5
    assert torch.equal(unpacked(packed(masks), masks.shape[1:]), masks)


def test_hat_scales_steps_and_gradients_by_the_masks() -> None:
    learner = small_learner("hat", s_max=50.0)
    learn(learner, [4, 1], 0)
    learner.begin_task([0, 3])
    hidden, outputs = (mask[0] for mask in learner.masks[:2])
    first, second = next(iter(learner.mlps.items()))
    factors = learner.update_factors()
    assert_close(factors[f"features.base.{first}.weight"][:, 0], 1 - hidden)
    wanted = 1 - torch.minimum(outputs[:, None], hidden[None])
    assert_close(factors[f"features.base.{second}.weight"], wanted)
    learner.steps = 1  # of three: s is in the middle
    s, embedding = (50 + 1 / 50) / 2, learner.embeddings[0]
    assert learner.scale == pytest.approx(s)
    optimizer = torch.optim.SGD(learner.parameter_groups(1.0))
    learner.attach_optimizer(optimizer)
    before, weight = embedding.detach().clone(), learner.get_parameter(f"features.base.{second}.weight")
    place = weight.detach().clone()
    embedding.grad, weight.grad = torch.full_like(embedding, 0.001), torch.ones_like(weight)
    optimizer.step()
    e = before.double()
    grown = 0.001 * 50 / s * ((s * e).clamp(-50, 50).cosh() + 1) / (e.cosh() + 1)
    assert_close(embedding.detach().double(), (e - grown).clamp(-6, 6), atol=1e-5, rtol=1e-4)
    assert_close(weight.detach(), place - wanted)


def test_tables_say_which_learner_needs_the_task() -> None:
    trainer = comparison_trainer("hat")
    matrix = trainer.train()
    result = Result("hat", matrix, 0)
    assert comparison_table([result]).count("needs the task") == 4
    assert f"{matrix.summary()['faa_task_incremental']:.1f}" in comparison_table([result])
    assert headline([result]).endswith("if it is told which task each is from.")
    assert type(matrix).from_dict(matrix.to_dict()) == matrix
