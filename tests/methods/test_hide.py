"""HiDe-Prompt where the golden numbers do not reach: tasks, their mixing and inference, class means, padding."""

import copy
import math
from pathlib import Path

import pytest
import torch
from support.families import build
from support.hide_models import TASKS, answer, images_of, labels_of, learn, new_model
from support.tensors import draw
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import HiDePromptConfig, NoRGaConfig, PromptPoolModel
from cl_prompts.interfaces import BackboneShape, PoolInput
from cl_prompts.methods.hide.pool import HidePool, among, contrastive


SHAPE = BackboneShape(width=8, num_layers=3, num_heads=2, head_dim=4)


@pytest.fixture(scope="module")
def learned() -> PromptPoolModel:
    """Three tasks; what tests change they change in a copy."""
    return learn(new_model(), range(3)).eval()


# ---- prompts of tasks ----------------------------------------------------------------------------------------------


def test_a_prompt_is_mixed_once_when_its_task_ends(tmp_path: Path) -> None:
    """P_t <- (1 - tau) P_t + tau * mean of the earlier ones, worked out by hand for constant prompts, tau 0.3."""
    model = new_model(prompt_momentum=0.3)
    pool = model.adapter.pool
    values = []
    for classes, raw in zip(TASKS, (1.0, 2.0, 4.0), strict=True):
        model.begin_task(classes)
        with torch.no_grad():
            pool.prompts.current.fill_(raw)
        values.append(pool.current_prompt().mean().item())
        assert torch.equal(pool.prompts.current, torch.full((2, 2, 3, 32), raw)), "training must not mix in place"
        model.end_task()
        assert_close(pool.prompts.current, torch.full((2, 2, 3, 32), values[-1]))
        assert torch.equal(pool.current_prompt(), pool.prompts.current), "it was mixed a second time"
    assert values == pytest.approx([1.0, 0.7 * 2 + 0.3 * 1, 0.7 * 4 + 0.3 * (1 + 1.7) / 2])
    assert pool.prompts.earlier[:, 0, 0, 0, 0].tolist() == pytest.approx(values[:2])
    with pytest.raises(ValueError, match="no task is open"):
        model.end_task()
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path).adapter.pool
    assert torch.equal(loaded.current_prompt(), pool.prompts.current), "loading mixed it again"


def test_the_answer_does_not_change_when_a_task_ends_or_is_saved(tmp_path: Path) -> None:
    """With tau 0.5 the stored prompt is far from the one that is trained."""
    model = learn(new_model(prompt_momentum=0.5), range(3), end=False)
    images, last = images_of(2), [2] * 6
    before = answer(model, images, last).logits
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    assert torch.equal(answer(loaded, images, last).logits, before)
    unmixed = copy.deepcopy(model)
    unmixed.adapter.pool.pending.zero_()
    assert (answer(unmixed, images, last).logits - before).abs().max() > 1e-2
    for ended in (model, loaded):
        ended.end_task()
        assert_close(answer(ended, images, last).logits, before, atol=1e-5, rtol=0)
    trained = model.adapter.pool.prompts
    assert torch.equal(loaded.adapter.pool.prompts.current, trained.current)


def test_training_mixes_as_a_test_after_the_task_does() -> None:
    model = learn(new_model(prompt_momentum=0.5, class_mask="none"), range(2), end=False)
    images = images_of(0)  # at test they would get the first task's prompt
    trained = model.train()(images, labels=labels_of(1))
    assert trained.prompt_ids.tolist() == [[1]] * 6
    model.end_task()
    assert_close(answer(model, images, [1] * 6).logits, trained.logits.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["previous", "fresh"])
def test_how_a_task_starts(init: str) -> None:
    model = learn(new_model(task_init=init), range(1))
    last = model.adapter.pool.prompts.current.detach().clone()
    model.begin_task(TASKS[1])
    prompts = model.adapter.pool.prompts
    assert torch.equal(prompts.earlier, last[None])
    assert torch.equal(prompts.current, last) == (init == "previous")
    assert prompts.current.requires_grad
    assert prompts.current.unique().numel() > 100


# ---- whose task is this image? -------------------------------------------------------------------------------------


def test_a_class_that_comes_back_has_a_mean_in_each_task() -> None:
    """The later task's images of class 4 are near its own mean there, and get its prompt."""
    model = learn(new_model(), range(1))
    model.begin_task([4, 9], revisit=True)
    model.train()(images_of(2), labels=torch.tensor([4, 9] * 3), sample_ids=range(6))
    model.end_task()
    assert model.adapter.pool.prototypes.rows == [(0, 0), (0, 1), (1, 0), (1, 2)]
    assert model.adapter.pool.prototypes.count.tolist() == [3, 3, 3, 3]
    assert answer(model, images_of(0)).prompt_ids.unique().tolist() == [0]
    assert answer(model, images_of(2)).prompt_ids.unique().tolist() == [1]


def test_a_task_without_images_gets_none(learned: PromptPoolModel) -> None:
    model = copy.deepcopy(learned)
    model.begin_task([8, 9])
    images = torch.cat([images_of(task) for task in range(3)])
    found = answer(model, images)
    assert torch.equal(found.prompt_ids, answer(learned, images).prompt_ids)
    assert found.scores[:, 3].unique().tolist() == [-math.inf]


@pytest.mark.parametrize(("ensemble", "many"), [(2, 2), (5, 3)])
def test_an_ensemble_is_the_mean_of_single_answers(learned: PromptPoolModel, ensemble: int, many: int) -> None:
    """Mean of the class probabilities with the prompts of the nearest tasks; at most as many as there are."""
    model = copy.deepcopy(learned)
    model.adapter.config.ensemble = ensemble
    images = torch.cat([images_of(task, 3) for task in range(3)])
    nearest = answer(learned, images).scores.topk(many, dim=1).indices
    assert len(set(map(tuple, nearest.tolist()))) > 1
    found = answer(model, images)
    each = [answer(learned, images, nearest[:, i]).logits.softmax(1) for i in range(many)]
    assert_close(found.logits.softmax(1), sum(each) / many, atol=1e-6, rtol=0)
    assert torch.equal(found.prompt_ids, nearest)
    assert_close(found.prompt_weights, torch.full((9, many), 1 / many))
    assert (each[0] - each[1]).abs().max() > 1e-2, "the answers must differ"
    # a task inference that ranks tells it the same
    assert torch.equal(answer(model, images, nearest).logits, found.logits)


def test_a_task_inference_of_the_wrong_shape(learned: PromptPoolModel) -> None:
    with pytest.raises(ValueError, match=r"shape \[4\] for 6 images: expected \[images, 1\].*ensemble=1"):
        answer(learned, images_of(0), [0, 1, 2, 0])
    model = copy.deepcopy(learned)
    model.adapter.config.ensemble = 2
    with pytest.raises(ValueError, match=r"shape \[6\] for 6 images: expected \[images, 2\]"):
        answer(model, images_of(0), [0] * 6)


# ---- the contrastive term ------------------------------------------------------------------------------------------


def by_hand(rows: list[Tensor], temperature: float) -> Tensor:
    """Row by row: -log of the softmax probability of the row itself among all rows."""
    losses = []
    for i, row in enumerate(rows):
        similarity = torch.stack([(row * other).sum() / temperature for other in rows])
        losses.append(-(similarity - similarity.logsumexp(0))[i])
    return sum(losses) / len(losses)


def test_contrastive_term() -> None:
    means, rows = draw(4, 5, seed=1).double(), draw(7, 5).double().requires_grad_()
    means[2] = 0
    taken = torch.tensor([True, False, True, True, False, True, True])
    value = contrastive(means, among(means, 0.7), rows, taken, 0.7)
    wanted = by_hand([*means[[0, 1, 3]], *rows[taken]], 0.7)
    assert_close(value, wanted)
    assert_close(*(torch.autograd.grad(x, rows)[0] for x in (value, wanted)))
    for few in (means[:0], means[2:3]):
        nothing = contrastive(few, among(few, 0.7), rows, torch.zeros(7, dtype=torch.bool), 0.7)
        assert nothing.item() == 0
        assert not torch.autograd.grad(nothing, rows)[0].any()


def test_which_rows_the_contrastive_term_sees() -> None:
    """Old classes' means and real images; no padding, no class of this task, no class without a mean."""
    pool = HidePool(HiDePromptConfig(layers=[0], contrastive_weight=0.3, temperature=2.0), SHAPE)
    for columns in ([0, 1, 2], [3], [1, 4]):  # class 1 comes back in the open task
        pool.begin_task(columns)
    pool.class_means.copy_(draw(5, 8, seed=1))
    pool.class_means[2] = 0
    features, counted = draw(4, 8, seed=2), torch.tensor([True, False, True, False])
    features[1], features[3] = torch.nan, torch.inf
    features.requires_grad_()
    (part,) = pool.feature_losses(features, torch.tensor([1, -100, 4, -100]), counted).values()
    assert part.reduction == "batch"
    rows = [*pool.class_means[[0, 3]], features[0], features[2]]
    assert_close(part.value, 0.3 * by_hand(rows, 2.0))
    (gradient,) = torch.autograd.grad(part.value, features)
    assert not gradient[~counted].any()
    assert gradient[counted].abs().min() > 0


def test_without_a_weight_there_is_no_term() -> None:
    model = new_model(contrastive_weight=0.0)
    model.begin_task(TASKS[0])
    assert set(model.train()(images_of(0), labels=labels_of(0)).losses) == {"cross_entropy"}


# ---- class means ---------------------------------------------------------------------------------------------------


def test_class_means_follow_the_features() -> None:
    """The first batch's mean, then 0.9 of the old and 0.1 of the batch's, in batches with images of the class.

    An image counts each time it comes, unlike for the prototypes.
    """
    model = new_model()
    model.begin_task(TASKS[0])
    pool = model.adapter.pool
    assert not pool.class_means.any()
    batches = [[4, 4, 1], [4, -100, 4], [1, 1, 4]]
    means: dict[int, Tensor] = {}
    for number, labels in enumerate(batches):
        output = model.train()(images_of(number, 3), labels=torch.tensor(labels), sample_ids=range(3))
        for c in set(labels) - {-100}:
            batch = output.features.detach()[torch.tensor(labels) == c].mean(0)
            means[c] = 0.9 * means[c] + 0.1 * batch if c in means else batch
        assert_close(pool.class_means[0], means[4], atol=1e-5, rtol=1e-5)
        assert_close(pool.class_means[1], means[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [HiDePromptConfig, NoRGaConfig])
def test_what_parts_of_a_batch_change(config: type[HiDePromptConfig]) -> None:
    """As docs/methods/hide.md says: means move once a part; a part's term has its own images, weighed by their number."""
    whole = learn(new_model(config, contrastive_weight=1.0, temperature=20.0), range(1))
    images, labels, old = images_of(1), labels_of(1), list(whole.adapter.pool.class_means.clone())
    whole.begin_task(TASKS[1])
    cut = copy.deepcopy(whole.train())
    together = whole(images, labels=labels)
    assert_close(together.losses["contrastive"], by_hand([*old, *together.features], 20.0), atol=1e-5, rtol=1e-5)
    means: dict[int, Tensor] = {}
    for part in (slice(4), slice(4, 6)):
        output = cut(images[part], labels=labels[part], num_items_in_batch=6)
        assert_close(output.features, together.features[part], atol=1e-5, rtol=1e-5)
        term = by_hand([*old, *output.features], 20.0) * len(output.features) / 6
        assert_close(output.losses["contrastive"], term, atol=1e-5, rtol=1e-5)
        for c in TASKS[1]:
            own = output.features.detach()[labels[part] == c].mean(0)
            means[c] = 0.9 * means[c] + 0.1 * own if c in means else own
    assert_close(cut.adapter.pool.class_means[2:], torch.stack([means[c] for c in TASKS[1]]), atol=1e-5, rtol=1e-5)
    assert (cut.adapter.pool.class_means - whole.adapter.pool.class_means).abs().max() > 1e-2


def test_class_means_are_exact_under_autocast() -> None:
    model = new_model()
    model.begin_task(TASKS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(images_of(0), labels=labels_of(0))
    wanted = torch.stack([output.features.detach()[labels_of(0) == c].mean(0) for c in TASKS[0]])
    assert_close(model.adapter.pool.class_means, wanted, atol=1e-6, rtol=0)


def test_class_means_wait_for_the_next_task() -> None:
    """In the first task the term sees the batch only; then the means of its classes too, or those a caller wrote."""
    model = learn(new_model(contrastive_weight=1.0, temperature=20.0), range(1))
    pool = model.adapter.pool
    for task in (1, 2):
        if task == 2:
            model.end_task()
        model.begin_task(TASKS[task])
        if task == 2:
            pool.class_means[:4] = draw(4, 32, seed=5)
        old = list(pool.class_means[: 2 * task].clone())
        output = model.train()(images_of(task), labels=labels_of(task))
        assert_close(output.losses["contrastive"], by_hand([*old, *output.features], 20.0), atol=1e-5, rtol=1e-5)
        assert_close(pool.class_means[: 2 * task], torch.stack(old), atol=0, rtol=0)
        assert pool.class_means[2 * task :].any(1).all()


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_prompt_table_has_every_task() -> None:
    pool = learn(new_model(prompt_momentum=0.5), range(2), end=False).adapter.pool
    table = pool.prompt_table()
    assert table.shape == (2, 2, 6, 32)
    assert torch.equal(table[1, 0], pool.prompts.earlier[0, 1].flatten(0, 1))
    mixed = (pool.prompts.current + pool.prompts.earlier[0]) / 2
    assert_close(table[1, 1], mixed[1].flatten(0, 1))


def test_a_pool_asks_for_a_query_at_test_only_to_tell_tasks_apart() -> None:
    pool = HidePool(HiDePromptConfig(layers=[0]), SHAPE)
    pool.begin_task([0])
    assert pool(PoolInput(3, None, None)).ids.tolist() == [[0]] * 3
