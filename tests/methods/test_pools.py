"""Choosing, counting, adding up, and L2P, against oracles written from the papers' formulas."""

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.methods import METHODS
from support.tensors import draw, integers
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.backbones.structure import cls_position_embedding
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.losses import add_up
from cl_prompts.methods.l2p.majority_vote import majority_vote
from cl_prompts.methods.shared.history import (
    ActivationHistory,
    ScaleGradient,
    most_activated,
    routing_penalty,
    update_factor,
)
from cl_prompts.methods.shared.selection import diversified_top_k, histogram, normalized


# ---- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_diversified_selection(seed: int) -> None:
    """Eq. 4 by sorting; eighths make products exact and ties many."""
    scores, frequency = integers(9, 20, 7, seed=seed) / 8, integers(4, 7, seed=seed + 50) / 8
    chosen = diversified_top_k(scores, frequency, 3)
    for row, ids in zip(scores.tolist(), chosen.tolist(), strict=True):
        rank = {m: ((1 - s) * h, 1 - s, m) for m, (s, h) in enumerate(zip(row, frequency.tolist(), strict=True))}
        assert ids == sorted(rank, key=rank.__getitem__)[:3]


@pytest.mark.parametrize("seed", range(4))
def test_majority_vote(seed: int) -> None:
    ids = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(seed + i))[:3] for i in range(5)])
    for counted in (None, torch.tensor([True, False, True, True, False])):
        votes = Counter(dict.fromkeys(range(8), 0))
        votes.update(m for i, row in enumerate(ids.tolist()) for m in row if counted is None or counted[i])
        elected = sorted(votes, key=lambda m: (-votes[m], m))[:3]
        assert majority_vote(ids, 8, counted, over_processes=True).tolist() == [elected] * 5


def test_histogram() -> None:
    ids, counted = integers(6, 9, 2, 3), integers(2, 9, seed=1).bool()
    for layer in range(2):
        assert torch.equal(histogram(ids, 6)[layer], torch.bincount(ids[:, layer].flatten(), minlength=6))
        expected = torch.bincount(ids[counted, layer].flatten(), minlength=6)
        assert torch.equal(histogram(ids, 6, counted)[layer], expected)


def test_normalized_has_the_released_floor() -> None:
    vectors = torch.stack([torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor([1e-8, 0.0])])
    assert_close(normalized(vectors), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1e-2, 0.0]]))


# ---- history -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_history(decay: float) -> None:
    history, total = ActivationHistory((2,), 5), []
    for task in range(4):
        history.begin_task()
        ids, counted = integers(5, 6, 2, 3, seed=task), integers(2, 6, seed=task + 9).bool()
        history.add(ids[:2], counted[:2])
        history.add(ids[2:], counted[2:])
        total.append(histogram(ids[counted], 5).double())
        assert torch.equal(history.counts[task], total[task].long())
    each = history.before_each(decay)
    for task in range(5):
        expected = torch.zeros(2, 5, dtype=torch.float64)
        for past in range(task):
            expected += decay ** (task - 1 - past) * total[past]
        assert torch.equal(history.before(task, decay), expected)
        if task < 4:
            assert torch.equal(each[task], expected)


def test_most_activated() -> None:
    history = torch.tensor([[3.0, 5, 5, 0, 3, 1], [0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    members = [[m for m, member in enumerate(row) if member] for row in most_activated(history, 3).tolist()]
    assert members == [[0, 1, 2], [2], []], "ties go to the lower number; who was never used is not among the busy"


H = torch.tensor([[4.0, 0, 9, 1], [0, 0, 0, 2.5]], dtype=torch.float64)
TOP2 = [[1, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("form", "phi"),
    [
        ("constant", None),
        ("log", lambda h: 0.3 * math.log(1 + h)),
        ("power", lambda h: 0.3 * h**0.7 if h else 0.0),
        ("none", lambda h: 0.0),
    ],
)
def test_routing_penalty(form: str, phi: Any) -> None:
    config = HashPromptConfig(hdr=form, delta=0.3, alpha=0.7, history_top=2)
    expected = 0.3 * torch.tensor(TOP2) if phi is None else torch.tensor([[phi(h) for h in row] for row in H.tolist()])
    assert_close(routing_penalty(H, config), expected, atol=1e-6, rtol=0)


def test_power_penalty_spares_unused_prompts() -> None:
    assert routing_penalty(H, HashPromptConfig(hdr="power", alpha=0.0, delta=1.0)).tolist() == (H > 0).float().tolist()


@pytest.mark.parametrize(
    ("form", "psi"),
    [
        ("constant", None),
        ("reciprocal", lambda h: 1 / (1 + 0.2 * h)),
        ("exponential", lambda h: math.exp(-0.2 * h)),
        ("none", lambda h: 1.0),
    ],
)
def test_update_factor(form: str, psi: Any) -> None:
    config = HashPromptConfig(hgm=form, beta=0.25, zeta=0.2, history_top=2)
    if psi is None:
        expected = torch.tensor([[0.25 if top else 1.0 for top in row] for row in TOP2])
    else:
        expected = torch.tensor([[psi(h) for h in row] for row in H.tolist()])
    assert_close(update_factor(H, config), expected, atol=1e-6, rtol=0)


def test_scale_gradient() -> None:
    values, factor = draw(3, 4).requires_grad_(), torch.tensor([0.0, 0.5, 1.0])[:, None]
    scaled = ScaleGradient.apply(values, factor)
    assert torch.equal(scaled, values)
    (scaled**3).sum().backward()
    assert_close(values.grad, factor * 3 * values.detach() ** 2)


# ---- losses --------------------------------------------------------------------------------------------------------


def test_losses_add_up_over_micro_batches() -> None:
    """Parts of an accumulated batch, of unequal size and with padding, sum to what the whole batch gives."""
    images, padded = draw(6), torch.tensor([True, True, True, True, True, False])
    term = torch.tensor(0.7)

    def parts(some: slice) -> dict[str, LossPart]:
        return {"m": LossPart(images[some], "mean"), "s": LossPart(images[some], "sum"), "b": LossPart(term, "batch")}

    loss, losses = add_up(parts(slice(6)), padded, None, over_processes=True)
    expected = {"m": images[:5].mean(), "s": images[:5].sum(), "b": term}
    for name, value in expected.items():
        assert_close(losses[name], value)
    assert_close(loss, torch.stack(list(expected.values())).sum())

    micro = [add_up(parts(s), padded[s], torch.tensor(5), over_processes=True) for s in (slice(2), slice(2, 6))]
    assert_close(micro[0][0] + micro[1][0], loss)
    for name in expected:
        assert_close(micro[0][1][name] + micro[1][1][name], losses[name])


@pytest.mark.parametrize("rubbish", [math.inf, math.nan])
def test_padding_may_hold_anything(rubbish: float) -> None:
    values = torch.tensor([1.0, rubbish], requires_grad=True)
    loss, _ = add_up({"m": LossPart(values, "mean")}, torch.tensor([True, False]), None, over_processes=False)
    loss.backward()
    assert loss == 1
    assert values.grad.tolist() == [1, 0]
    nothing, _ = add_up({"m": LossPart(values, "mean")}, torch.tensor([False, False]), None, over_processes=False)
    assert nothing == 0


# ---- L2P -----------------------------------------------------------------------------------------------------------


def l2p(family: str = "vit", **fields: Any) -> PromptPoolModel:
    base = build(family)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="batchwise_selection")
        config = L2PConfig(**{"pool_size": 6, "prompt_length": 2, "top_k": 3, **fields})
    model = get_prompt_pool_model(base, config)
    model.begin_task([0, 1])
    return model


def first_block_inputs(model: PromptPoolModel) -> list[Tensor]:
    """Grows by the sequence that enters block 0, with every pass of the base model."""
    seen: list[Tensor] = []
    block = model.base_model.model.get_submodule(model.base_model.structure.blocks[0])
    block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    return seen


@pytest.mark.parametrize("key_type", ["learned", "prompt_mean"])
def test_l2p_chooses_and_pulls(key_type: str) -> None:
    model, images = l2p(key_type=key_type, pull_coefficient=0.3).train(), inputs("vit", 4)["pixel_values"]
    pool, query = model.adapter.pool, model.base_model.extract_features(images)
    seen = first_block_inputs(model)
    output = model(images, labels=torch.tensor([0, 1, 1, 0]))
    keys = pool.prompts.mean(1) if key_type == "prompt_mean" else pool.keys
    cosine = F.cosine_similarity(query[:, None], keys[None], dim=2)
    best, ids = cosine.topk(3, dim=1)
    assert torch.equal(output.prompt_ids, ids)
    assert_close(output.prompt_weights, best.detach(), atol=1e-6, rtol=0)
    assert_close(output.losses["pull"], -0.3 * best.sum(1).mean(), atol=1e-6, rtol=0)
    assert_close(output.loss, output.losses["cross_entropy"] + output.losses["pull"])
    position = cls_position_embedding(model.base_model.model, model.base_model.structure)
    tokens = torch.cat([pool.prompts[ids[:, j]] for j in range(3)], 1) + position
    assert_close(seen[-1][:, 1:7], tokens)

    (expected,) = torch.autograd.grad(-0.3 * best.sum(1).mean(), [keys])
    output.loss.backward()
    if key_type == "learned":  # keys learn from the pull alone; prompts that were not chosen do not learn
        assert_close(pool.keys.grad, expected, atol=1e-6, rtol=0)
        chosen = torch.zeros(6, dtype=torch.bool).scatter(0, ids.flatten(), True)
        assert torch.equal(pool.prompts.grad.abs().sum((1, 2)) > 0, chosen)
    else:
        assert pool.keys is None


def test_passes_of_the_base_model() -> None:
    images = inputs("vit")["pixel_values"]
    for fields, given, passes in (
        ({}, False, 2),
        ({}, True, 1),
        ({"key_type": "none", "top_k": 6}, False, 1),
        ({"key_type": "none", "pool_size": 1, "top_k": 1}, False, 1),
    ):
        model = l2p(**fields).eval()
        query = model.base_model.extract_features(images) if given else None
        seen = first_block_inputs(model)
        with torch.no_grad():
            output = model(images, query=query)
        assert len(seen) == passes
        if "key_type" in fields:
            assert seen[0].shape[1] == 17 + 2 * fields["pool_size" if "pool_size" in fields else "top_k"]
            assert output.prompt_ids is None
            assert "query" not in output
        else:
            assert_close(output.query, model.base_model.extract_features(images))


@pytest.mark.parametrize("position", ["after_cls", "front"])
@pytest.mark.parametrize(
    ("family", "add", "added"),
    [("vit", None, True), ("vit", True, True), ("vit", False, False), ("beit", None, False), ("dinov2", None, True)],
)
def test_where_prompts_stand(family: str, add: bool | None, added: bool, position: str) -> None:
    model, images = l2p(family, position=position, add_cls_position_embedding=add).eval(), inputs(family)
    pool, seen = model.adapter.pool, first_block_inputs(model)
    with torch.no_grad():
        ids = model(**images).prompt_ids
        plain, prompted = seen
        tokens = pool.prompts[ids].flatten(1, 2)
        if added:
            tokens = tokens + model.base_model.model.embeddings.position_embeddings[:, :1]
        at = int(position == "after_cls")
        assert_close(prompted, torch.cat([plain[:, :at], tokens, plain[:, at:]], 1))


def test_diversified_selection_in_training_after_the_first_task() -> None:
    model, images = l2p(diversified_selection=True).train(), inputs("vit", 4)["pixel_values"]
    labels = torch.tensor([0, 1, 1, 0])
    keys = model.adapter.pool.keys
    cosine = F.cosine_similarity(model.base_model.extract_features(images)[:, None], keys[None], dim=2).detach()
    nearest = cosine.topk(3, dim=1).indices
    assert torch.equal(model(images, labels=labels).prompt_ids, nearest)
    model.end_task()
    model.begin_task([2, 3])
    counts = torch.bincount(nearest.flatten(), minlength=6)
    assert model.adapter.pool.history.counts.tolist() == [counts.tolist(), [0] * 6]
    frequency = counts / counts.sum()
    output = model(images, labels=labels + 2)
    product = (1 - cosine) * frequency
    assert torch.equal(output.prompt_ids.sort(1).values, product.topk(3, largest=False).indices.sort(1).values)
    assert not torch.equal(output.prompt_ids, nearest)
    with torch.no_grad():
        assert torch.equal(model.eval()(images).prompt_ids, nearest)


def test_batchwise_selection() -> None:
    with pytest.warns(UserWarning, match="depends on what else is in its batch"):
        L2PConfig(batchwise_selection=True)
    model, images = l2p(batchwise_selection=True).eval(), inputs("vit", 5)["pixel_values"]
    with torch.no_grad():
        ids = model(images).prompt_ids
        single = torch.cat([model(image[None]).prompt_ids for image in images])
    assert torch.equal(ids, majority_vote(single, 6, None, over_processes=False))
    assert (single != ids).any()


@pytest.mark.parametrize(
    ("mask", "visible"), [("task", [False, False, True, True]), ("batch", [True, False, True, False]), ("none", [True] * 4)]
)
def test_class_mask(mask: str, visible: list[bool]) -> None:
    model, images = l2p(class_mask=mask).train(), inputs("vit", 4)["pixel_values"]
    model.end_task()
    model.begin_task([5, 4])
    labels = torch.tensor([5, 5, 5 if mask == "task" else 0, -100])
    output = model(images, labels=labels)
    assert output.logits.isfinite().tolist() == [visible] * 4
    columns = torch.tensor([2, 2, 2 if mask == "task" else 0])
    with torch.no_grad():
        free = model.eval()(images).logits
        expected = F.cross_entropy(free[:3, torch.tensor(visible)], (torch.tensor(visible).cumsum(0) - 1)[columns])
    assert_close(output.losses["cross_entropy"], expected, atol=1e-6, rtol=0)
    assert free.isfinite().all()


def test_logit_temperature_divides_at_test_only() -> None:
    plain, calibrated, images = l2p(), l2p(logit_temperature=4.0), inputs("vit", 8)["pixel_values"]
    labels = torch.tensor([0, 1] * 4)
    learning = [model.train()(images, labels=labels) for model in (plain, calibrated)]
    assert torch.equal(learning[0].logits, learning[1].logits)
    assert torch.equal(learning[0].loss, learning[1].loss)
    with torch.no_grad():
        sure, doubtful = (model.eval()(images, labels=labels) for model in (plain, calibrated))
    assert_close(doubtful.logits, sure.logits / 4)
    assert torch.equal(doubtful.logits.argmax(1), sure.logits.argmax(1))
    assert (doubtful.logits.softmax(1).amax(1) < sure.logits.softmax(1).amax(1)).all()
    assert_close(doubtful.loss, F.cross_entropy(sure.logits / 4, labels))
    plain.adapter.config.logit_temperature = 4.0  # it may be changed later
    with torch.no_grad():
        assert torch.equal(plain(images).logits, doubtful.logits)


@pytest.mark.parametrize("method", ["l2p", "hash", "l2p_prefix", "vq_prompt"])
def test_images_are_counted_once_a_task(method: str, tmp_path: Path) -> None:
    """Over epochs, duplicates in a batch, padding and evaluation; without sample_ids every training forward counts."""
    config: Any = METHODS[method](**({"modulate": "gradient"} if method == "hash" else {}))
    model, images = get_prompt_pool_model(build("vit"), config), inputs("vit", 4)["pixel_values"]
    pool, size = model.adapter.pool, config.pool_size
    expected = []
    for labels, ids in (([0, 1, 1, -100], [10, 11, 10, 12]), ([2, 3, -100, 2], [10, 11, -1, 10])):
        if expected:
            model.end_task()
        model.begin_task(sorted(set(labels) - {-100}))
        model.train()
        output = model(images, labels=torch.tensor(labels), sample_ids=ids)
        expected.append(histogram(output.prompt_ids[:2], size))
        model(images, labels=torch.tensor(labels), sample_ids=torch.tensor(ids))
        with torch.no_grad():
            model.eval()(images, labels=torch.tensor(labels))
        assert torch.equal(pool.history.counts, torch.stack(expected))
    output = model.train()(images, labels=torch.tensor([2, 2, 3, -100]))
    expected[1] += histogram(output.prompt_ids[:3], size)
    assert torch.equal(pool.history.counts, torch.stack(expected))

    model.save_pretrained(tmp_path / "adapter")
    again = PromptPoolModel.from_pretrained(build("vit"), tmp_path / "adapter").adapter.pool.history.counts
    assert again.dtype == torch.int64
    assert torch.equal(again, torch.stack(expected))
