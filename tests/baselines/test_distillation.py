"""Baselines that distil or rehearse (LwF, BiC, iCaRL, DER++) against plain torch and numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import after_a_task, batch_of, parts_of, plain_logits, small_learner, train_steps
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts.baselines.bic import fit_correction, is_held_out
from cl_prompts.baselines.icarl import herding
from cl_prompts.baselines.views import second_view


# ---- distillation ----------------------------------------------------------------------------------------------------


def softened(logits: Tensor, temperature: float) -> np.ndarray[Any, Any]:
    values = np.exp(logits.detach().double().numpy() / temperature)
    return values / values.sum(1, keepdims=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_lwf_distils_what_it_answered_before_the_task(frozen: bool) -> None:
    learner = small_learner("lwf", strength=0.7, temperature=2.0, freeze_backbone=frozen)
    learner.begin_task([4, 1])
    train_steps(learner, batch_of([4, 1, 1]))
    learner.end_task()
    batch = batch_of([0, 3, 3])
    old = plain_logits(learner, batch["pixel_values"])
    learner.begin_task([0, 3])
    train_steps(learner, batch)
    new = plain_logits(learner, batch["pixel_values"])
    assert not torch.allclose(old, new[:, :2]) or frozen
    by_hand = -(softened(old, 2) * np.log(softened(new[:, :2], 2))).sum(1).mean()
    parts = parts_of(learner, batch)
    assert float(parts["distillation"]) == pytest.approx(0.7 * by_hand, rel=1e-5)
    assert_close(parts["cross_entropy"], F.cross_entropy(new[:, 2:], torch.tensor([0, 1, 1])))


def test_bic_weighs_its_terms_by_old_and_new_classes() -> None:
    learner = after_a_task("bic", held_out=0.4)
    batch = batch_of([0, 3, 4, 1, 3, 0], ids=range(10, 16))
    held = is_held_out(torch.arange(10, 16), 0.4)
    assert 0 < held.sum() < 6
    assert learner.teacher is not None
    logits = plain_logits(learner, batch["pixel_values"])
    old = learner.teacher(batch["pixel_values"], None)
    each = -torch.tensor(softened(old, 2) * np.log(softened(logits[:, :2], 2))).sum(1)
    entropy = F.cross_entropy(logits, torch.tensor([2, 3, 0, 1, 3, 2]), reduction="none")
    parts = parts_of(learner, batch)
    assert_close(parts["distillation"].double(), (0.5 * each * ~held).mean(), atol=1e-6, rtol=1e-5)
    assert_close(parts["cross_entropy"], (0.5 * entropy * ~held).mean())


def test_bic_recovers_a_known_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    right = 2 * torch.randn(20000, 5, generator=generator)
    labels = torch.multinomial(right.softmax(1), 1, generator=generator).flatten()
    seen = torch.cat([right[:, :3], (right[:, 3:] + 1.2) / 0.6], dim=1)  # of the new classes: 0.6 * seen - 1.2 is right
    alpha, beta = fit_correction(seen, labels, 3).tolist()
    assert alpha == pytest.approx(0.6, abs=0.03)
    assert beta == pytest.approx(-1.2, abs=0.08)


def test_bic_corrects_new_classes_and_teaches_what_it_answered() -> None:
    learner = after_a_task("bic", held_out=0.5)
    memory = batch_of([4, 1, 0, 3] * 8, ids=range(32))
    held = is_held_out(torch.arange(32), 0.5)
    learner.consolidate([batch_of([0, 3])], [memory])
    alpha, beta = learner.correction.double().requires_grad_()
    raw = plain_logits(learner, memory["pixel_values"]).detach()
    answer = learner(memory["pixel_values"]).logits
    assert_close(answer, torch.cat([raw[:, :2], learner.correction[0] * raw[:, 2:] + learner.correction[1]], 1))
    columns = torch.tensor([0, 1, 2, 3] * 8)
    shown = torch.cat([raw[:, :2].double(), alpha * raw[:, 2:].double() + beta], 1)[held]
    loss = F.cross_entropy(shown, columns[held]) + 1e-3 * ((alpha - 1) ** 2 + beta**2)
    slope = torch.stack(torch.autograd.grad(loss, [alpha, beta]))
    assert slope.abs().max() < 1e-5  # nothing that it was trained on has a say
    learner.end_task()
    learner.begin_task([2])
    assert_close(learner.teacher(memory["pixel_values"], None), answer, atol=1e-5, rtol=1e-5)
    assert learner.correction.tolist() == [1, 0]


def test_bic_holds_out_the_same_share_of_any_run() -> None:
    for start in (0, 12345, 2**40):
        assert int(is_held_out(torch.arange(start, start + 1000), 0.1).sum()) in range(98, 103)


def test_bic_without_held_out_images_says_so() -> None:
    learner = after_a_task("bic", held_out=0.001)
    with pytest.warns(UserWarning, match="nothing is corrected after this task"):
        learner.consolidate([batch_of([0])], [batch_of([0, 4], ids=[1, 2])])


# ---- iCaRL -----------------------------------------------------------------------------------------------------------


def test_herding_keeps_the_mean() -> None:
    features = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double(), dim=1).numpy()
    chosen: list[int] = []
    while len(chosen) < 9:
        means = {i: features[[*chosen, i]].mean(0) for i in range(9) if i not in chosen}
        chosen.append(min(means, key=lambda i: float(np.linalg.norm(features.mean(0) - means[i]))))
    assert herding(torch.tensor(features)).tolist() == chosen


def test_icarl_ranks_images_within_their_class() -> None:
    learner = after_a_task("icarl")
    batch = batch_of([0, 3, 0, 3, 0, -100], ids=[20, 10, 5, 11, 7, -1])
    ranking = learner.rank_images([5, 7, 10, 11, 20, 99], [batch])
    features = F.normalize(learner.extract_features(batch["pixel_values"]).double(), dim=1)
    order = herding(features[[2, 4, 0]]).tolist()  # class 0 by number: 5, 7, 20
    assert [ranking[[0, 1, 4][i]] for i in order] == [0, 1, 2]
    assert sorted(ranking[2:4]) == [0, 1]
    assert ranking[5] == np.inf


def test_icarl_answers_by_the_nearest_exemplar_mean() -> None:
    learner = small_learner("icarl")
    learner.begin_task([4, 1])
    memory = batch_of([1, 4, 4, 1, 4])
    test = batch_of([1, 4, 4, 1], seed=9)["pixel_values"]
    assert_close(learner.eval()(test).logits, plain_logits(learner, test))  # there are no exemplars yet
    learner.consolidate([], [memory])
    rows, shown = (F.normalize(learner.extract_features(x), dim=1).double().numpy() for x in (memory["pixel_values"], test))
    labels = memory["labels"].numpy()
    means = np.stack([rows[labels == c].mean(0) for c in (4, 1)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    distances = ((shown[:, None] - means) ** 2).sum(2)
    logits = learner(test).logits
    assert_close(logits.double(), torch.tensor(1 - distances / 2), atol=1e-5, rtol=0)


def test_icarl_learns_labels_of_new_and_answers_of_old_classes() -> None:
    learner = after_a_task("icarl")
    batch = batch_of([0, 3, 4, -100])
    logits = plain_logits(learner, batch["pixel_values"])[:3].detach().double().numpy()
    old = learner.teacher(batch["pixel_values"], None)[:3].double().numpy()
    targets = np.concatenate([1 / (1 + np.exp(-old)), [[1, 0], [0, 1], [0, 0]]], axis=1)
    probabilities = 1 / (1 + np.exp(-logits))
    each = -(targets * np.log(probabilities) + (1 - targets) * np.log(1 - probabilities)).sum(1)
    assert float(parts_of(learner, batch)["binary_cross_entropy"]) == pytest.approx(each.mean(), rel=1e-5)


# ---- DER++ -----------------------------------------------------------------------------------------------------------


def test_derpp_binds_the_logits_of_remembered_images() -> None:
    learner = small_learner("der++", alpha=0.3, beta=0.6)
    learner.begin_task([4, 1])
    train_steps(learner, batch_of([4, 1]))
    first = batch_of([4, 1, 4], ids=[9, 2, 5])
    stored = plain_logits(learner, first["pixel_values"]).detach()
    learner.consolidate([], [first])
    learner.end_task()
    learner.begin_task([0, 3])
    batch = batch_of([0, 4, 1, -100], ids=[3, 9, 2, -1])
    batch["pixel_values"][1:3] = first["pixel_values"][:2]
    train_steps(learner, batch)
    logits = plain_logits(learner, batch["pixel_values"])[:3]
    parts = parts_of(learner, batch)
    entropy = F.cross_entropy(logits, torch.tensor([2, 0, 1]), reduction="none")
    assert_close(parts["cross_entropy"], (entropy * torch.tensor([1, 0.6, 0.6])).mean())
    distance = ((logits[1:, :2] - stored[:2]) ** 2).mean(1)
    assert_close(parts["logits"], 0.3 * distance.sum() / 3)
    # An image that stays keeps its logits, one that goes is forgotten, a new one is bound in all four classes.
    learner.eval()
    second = batch_of([4, 3], ids=[9, 3])
    second["pixel_values"][0] = first["pixel_values"][0]
    learner.consolidate([], [second])
    assert learner.stored_numbers.tolist() == [3, 9]
    assert learner.stored_classes.tolist() == [4, 2]
    assert_close(learner.stored_logits[0], plain_logits(learner, second["pixel_values"])[1].detach())
    assert_close(learner.stored_logits[1], torch.cat([stored[0], torch.zeros(2)]))
    learner.end_task()
    learner.begin_task([2])
    wide, narrow = learner.stored_logits[0], stored[0]
    train_steps(learner, batch_of([2, 3, 4], ids=[8, 3, 9]))
    batch = batch_of([2, 3, 4], ids=[8, 3, 9])
    new = plain_logits(learner, batch["pixel_values"])
    distances = ((new[1, :4] - wide) ** 2).mean() + ((new[2, :2] - narrow) ** 2).mean()
    assert_close(parts_of(learner, batch)["logits"], 0.3 * distances / 3)


# ---- Co2L and DualNet ------------------------------------------------------------------------------------------------


def projected(learner: Any, features: Tensor) -> np.ndarray[Any, Any]:
    rows = learner.projector(features).detach().double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def relations(views: np.ndarray[Any, Any], temperature: float) -> np.ndarray[Any, Any]:
    """Softmax of each view's similarities to the others."""
    powers = np.exp(views @ views.T / temperature)
    np.fill_diagonal(powers, 0)
    return powers / powers.sum(1, keepdims=True)


def test_co2l_in_numpy() -> None:
    learner = after_a_task("co2l")
    batch = batch_of([0, 3, 0, 4, 3, -100], ids=[1, 2, 3, 50, 51, -1])
    other = second_view(batch["pixel_values"], torch.tensor(batch["sample_ids"]), learner.steps)
    both = [batch["pixel_values"][:5], other[:5]]
    assert not torch.allclose(*both, atol=0.1)
    views = np.concatenate([projected(learner, learner.extract_features(images)) for images in both])
    before = np.concatenate([learner.snapshot(images).double().numpy() for images in both])
    labels = np.array([0, 3, 0, 4, 3] * 2)
    p, each = relations(views, 0.5), []
    for i in range(10):
        positives = [j for j in np.flatnonzero(labels == labels[i]) if j != i]
        each.append(-np.log(p[i, positives]).mean())
    taught, own = relations(before, 0.01), relations(views, 0.2)
    distilled = -(taught * np.log(own + np.eye(10))).sum(1).mean()
    parts = parts_of(learner, batch)
    total = np.mean([each[i] for i in (0, 1, 2, 5, 6, 7)])  # images 50 and 51 are no anchors, whatever their class
    assert float(parts["contrastive"]) == pytest.approx(total, rel=1e-4)
    assert float(parts["distillation"]) == pytest.approx(distilled, rel=1e-4)
    learner.stored_numbers = torch.arange(60)  # a task of images that are all remembered
    assert float(parts_of(learner, batch)["contrastive"]) == pytest.approx(np.mean(each), rel=1e-4)


def test_dualnet_learns_from_two_views_and_stored_answers() -> None:
    learner = after_a_task("dualnet")
    batch = batch_of([0, 3, 4, 1], ids=[1, 2, 50, 51])
    assert any(p.abs().sum() > 0 for p in learner.modulators[0].up.parameters())
    logits = learner.train()(**batch).logits.detach().double()[:, :2]
    stored = learner.stored_logits[:2].double()
    taught, own = (values.numpy() for values in ((stored / 2).softmax(1), (logits[2:] / 2).softmax(1)))
    parts = parts_of(learner, batch)
    assert float(parts["logits"]) == pytest.approx((taught * np.log(taught / own)).sum() / 4, rel=1e-4)
    other = second_view(batch["pixel_values"], torch.tensor(batch["sample_ids"]), learner.steps)
    pairs = [learner.projector(learner.extract_features(images)) for images in (batch["pixel_values"], other)]
    a, b = (rows.detach().double().numpy() for rows in pairs)
    c = ((a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)).T @ ((b - b.mean(0)) / np.sqrt(b.var(0) + 1e-5)) / 4
    loss = ((1 - np.diag(c)) ** 2).sum() + 5e-3 * (c**2 - np.diag(np.diag(c) ** 2)).sum()
    assert float(parts["self_supervised"]) == pytest.approx(0.1 * loss / 128, rel=1e-4)
