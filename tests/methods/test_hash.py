"""Hash against oracles written from its formulas: how prompts are chosen and mixed, and which router answers at test."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.families import build
from support.hash_models import IMAGES, SMALL, TASKS, labels_of, learn, new_model
from support.tensors import draw
from torch import Tensor, nn
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.methods.hash.pool import TokenRouter
from cl_prompts.methods.shared.history import routing_penalty


@contextmanager
def block_inputs(model: PromptPoolModel) -> Iterator[dict[int, Tensor]]:
    """What enters each block in the newest pass."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            seen[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    blocks = model.base_model.structure.blocks
    handles = [
        model.base_model.model.get_submodule(name).register_forward_pre_hook(keep(i), with_kwargs=True)
        for i, name in enumerate(blocks)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def literal_choice(tokens: Tensor, router: Tensor, penalty: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One image, as the formula reads: the full token matrix is scored, the mean taken afterwards."""
    scores = (tokens @ router.T / tokens.shape[1] ** 0.5).mean(0) - penalty
    ids = scores.argsort(descending=True)[:k]
    return ids, scores[ids].exp() / scores[ids].exp().sum()


# ---- routing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [4, None])
@pytest.mark.parametrize("which", [None, [2, 0, 0, 1, 2]])
def test_token_router(heads: int | None, which: list[int] | None) -> None:
    """Prefixes and their gradients against a loop over images, prompts and heads."""
    prompts, tokens = draw(7, 6, 16).requires_grad_(), draw(5, 9, 16, seed=1)
    routers, penalties = draw(3, 7, 16, seed=2).requires_grad_(), draw(3, 7, seed=3).abs()
    if which is None:
        routers, penalties = routers.detach()[:1].requires_grad_(), penalties[:1]
    chosen = None if which is None else torch.tensor(which)
    prefix = TokenRouter(prompts, routers, penalties, chosen, 3, heads)(tokens, tokens)

    keys, values = [], []
    for b, image in enumerate(tokens):
        r = 0 if which is None else which[b]
        ids, weights = literal_choice(image, routers[r], penalties[r], 3)
        assert torch.equal(prefix.ids[b], ids)
        assert_close(prefix.weights[b], weights.detach(), atol=1e-6, rtol=0)
        mixed = sum(w * prompts[i] for i, w in zip(ids, weights, strict=True))
        parts = []
        for rows in (mixed[:3], mixed[3:]):
            parts.append(rows if heads is None else torch.stack([rows[:, 4 * h : 4 * h + 4] for h in range(4)]))
        keys.append(parts[0])
        values.append(parts[1])
    assert_close(prefix.k, torch.stack(keys), atol=1e-5, rtol=0)
    assert_close(prefix.v, torch.stack(values), atol=1e-5, rtol=0)

    noise = draw(*prefix.k.shape, seed=4), draw(*prefix.v.shape, seed=5)
    got = torch.autograd.grad((prefix.k * noise[0] + prefix.v * noise[1]).sum(), [prompts, routers])
    wanted = torch.autograd.grad((torch.stack(keys) * noise[0] + torch.stack(values) * noise[1]).sum(), [prompts, routers])
    for actual, expected in zip(got, wanted, strict=True):
        assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_training_routes_with_the_newest_router_and_all_earlier_tasks(decay: float) -> None:
    model = learn(new_model(hdr="log", history_decay=decay), 3, end=False)
    pool = model.adapter.pool
    counts = pool.history.counts.double()
    penalty = 0.4 * (decay * counts[0] + counts[1]).log1p().float()
    router = pool.router.detach()
    with block_inputs(model) as seen:
        output = model(IMAGES, labels=labels_of(2), sample_ids=range(8))
    for row, layer in enumerate(SMALL["layers"]):
        for b in range(8):
            ids, weights = literal_choice(seen[layer][b], router[row], penalty[row], 2)
            assert torch.equal(output.prompt_ids[b, row], ids)
            assert_close(output.prompt_weights[b, row], weights, atol=1e-5, rtol=0)


def test_share_layers() -> None:
    """One pool for all layers: its gradient is the sum over layers, its history too; routing penalties stay by layer."""
    fields = {"layers": [0, 1, 2], "modulate": "gradient", "hgm": "none", "prefix_space": "projected"}
    shared, apart = new_model(**fields, share_layers=True), new_model(**fields)
    assert shared.adapter.pool.prompts.shape == (1, 6, 4, 32)
    for model in (shared, apart):
        model.begin_task(TASKS[0])
        model.train()
    with torch.no_grad():
        apart.adapter.pool.prompts.copy_(shared.adapter.pool.prompts.expand(3, -1, -1, -1))
        apart.adapter.pool.router.copy_(shared.adapter.pool.router)
        apart.adapter.head.load_state_dict(shared.adapter.head.state_dict())
    losses = [model(IMAGES, labels=labels_of(0)).loss for model in (shared, apart)]
    assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    gradient = apart.adapter.pool.prompts.grad.sum(0, keepdim=True)
    assert_close(shared.adapter.pool.prompts.grad, gradient, atol=1e-6, rtol=1e-4)

    model = learn(new_model(layers=[0, 1, 2], share_layers=True, hgm="reciprocal", zeta=0.1), 2, end=False)
    counts = model.adapter.pool.history.counts
    assert counts.shape == (2, 3, 6)
    factor = model.adapter.pool.update_factors()["prompts"]
    assert_close(factor, 1 / (1 + 0.1 * counts[0].sum(0).float())[None, :, None, None])


@pytest.mark.parametrize("init", ["previous", "normal"])
def test_routers_of_tasks(init: str) -> None:
    model = learn(new_model(router_init=init), 1)
    last = model.adapter.pool.router.detach().clone()
    model.begin_task(TASKS[1])
    pool = model.adapter.pool
    assert torch.equal(pool.old_routers, last[None])
    assert torch.equal(pool.router, last) == (init == "previous")
    assert init == "previous" or 0.015 < pool.router.std() < 0.025


# ---- which router answers at test ----------------------------------------------------------------------------------


def alone(model: PromptPoolModel, task: int) -> PromptPoolModel:
    """A model whose only router is that of `task`, with the penalty it was trained with."""
    pool = model.adapter.pool
    routers = [*pool.old_routers, pool.router.detach()]
    single = new_model(**{**model.peft_config["default"].to_dict(), "router_inference": "last", "state": None})
    for classes in TASKS:
        single.begin_task(classes)
        single.end_task()
    single.adapter.head.load_state_dict(model.adapter.head.state_dict())
    with torch.no_grad():
        single.adapter.pool.prompts.copy_(pool.prompts)
        single.adapter.pool.router.copy_(routers[task])
        single.adapter.pool.old_routers.fill_(float("nan"))
        single.adapter.pool.history.counts.zero_()[0] = pool.history.counts[:task].sum(0)
    return single.eval()


@pytest.fixture(scope="module")
def learned() -> PromptPoolModel:
    return learn(new_model(router_inference="prototype"), 3).eval()


def with_rule(model: PromptPoolModel, rule: str) -> PromptPoolModel:
    model = copy.deepcopy(model)
    model.adapter.config.router_inference = rule
    return model


def test_last_and_confident_router(learned: PromptPoolModel) -> None:
    with torch.no_grad():
        each = [alone(learned, task)(IMAGES) for task in range(3)]
        assert_close(with_rule(learned, "last")(IMAGES).logits, each[2].logits, atol=1e-5, rtol=0)
        output = with_rule(learned, "confidence")(IMAGES)
    best = torch.stack([e.logits.softmax(1).amax(1) for e in each]).argmax(0)
    assert len(set(best.tolist())) > 1, "the images must disagree on the router"
    for b, task in enumerate(best.tolist()):
        assert_close(output.logits[b], each[task].logits[b], atol=1e-5, rtol=0)
        assert torch.equal(output.prompt_ids[b], each[task].prompt_ids[b])
        assert_close(output.prompt_weights[b], each[task].prompt_weights[b], atol=1e-5, rtol=0)
        assert_close(output.features[b], each[task].features[b], atol=1e-5, rtol=0)


def test_average_is_the_mean_score(learned: PromptPoolModel) -> None:
    model, pool = with_rule(learned, "average"), learned.adapter.pool
    with torch.no_grad(), block_inputs(model) as seen:
        output = model(IMAGES)
    routers = [*pool.old_routers, pool.router.detach()]
    history = [pool.history.counts[:task].sum(0).double() for task in range(3)]
    penalties = [routing_penalty(h, model.adapter.config) for h in history]
    for row, layer in enumerate(SMALL["layers"]):
        pairs = zip(routers, penalties, strict=True)
        mean = torch.stack([(seen[layer] @ r[row].T / 32**0.5).mean(1) - p[row] for r, p in pairs])
        best, ids = mean.mean(0).topk(2, dim=1)
        assert torch.equal(output.prompt_ids[:, row], ids)
        assert_close(output.prompt_weights[:, row], best.softmax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["average", "prototype", "confidence", "last"])
def test_each_rule_answers_image_by_image(learned: PromptPoolModel, rule: str) -> None:
    model = with_rule(learned, rule)
    with torch.no_grad():
        batch = model(IMAGES).logits
        singles = torch.cat([model(image[None]).logits for image in IMAGES])
    assert_close(batch, singles, atol=1e-5, rtol=0)


# ---- how the router reads, and how large its penalty is


@pytest.mark.parametrize(
    "fields",
    [
        {"router_input": "normed"},
        {"router_scale": 10.0, "relative_delta": False},
        {"router_scale": 3.0, "learn_router_scale": True},
        {"relative_delta": True, "delta": 0.7},
        {"history_update": "step", "delta": 0.7},
        {"history_update": "step", "router_inference": "last", "router_input": "normed", "relative_delta": True},
    ],
    ids=str,
)
def test_options_of_the_scores(fields: dict[str, Any]) -> None:
    """Scores of the first layer after two tasks, by hand."""
    base = build("vit")
    torch.manual_seed(0)
    small: dict[str, Any] = {"pool_size": 6, "top_k": 2, "history_top": 2, "layers": [0, 2]}
    model = get_prompt_pool_model(base, HashPromptConfig(**small | fields))
    images, config = draw(6, 3, 32, 32), model.adapter.config
    for classes in ([4, 1], [0, 7]):
        model.begin_task(classes)
        optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=0.05))
        model.attach_optimizer(optimizer)
        model.train()(images, labels=torch.tensor(classes * 3)).loss.backward()
        optimizer.step()
        model.end_task()
    pool = model.adapter.pool
    with torch.no_grad():
        tokens = base.embeddings(images)
        if config.router_input == "normed":
            tokens = (tokens - tokens.mean(2, keepdim=True)) / (tokens.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        counts = pool.history.counts[:, 0].double()
        scales = pool.scale.all()[:, 0] if config.learn_router_scale else [config.router_scale] * 2
        scores, penalties = [], []
        for task, router in enumerate((pool.old_routers[0, 0], pool.router[0])):
            scores.append(scales[task] * (tokens @ router.T).mean(1) / 32**0.5)
            before = counts[: task + (config.history_update == "step")].sum(0)
            penalties.append(routing_penalty(before, config))
        kept = slice(1, 2) if config.router_inference == "last" else slice(0, 2)
        score, penalty = torch.stack(scores[kept]).mean(0), torch.stack(penalties[kept]).mean(0)
        if config.relative_delta:
            penalty = penalty * (score.amax(1, keepdim=True) - score.amin(1, keepdim=True))
        found = model.eval()(images).scores[:, 0]
    assert penalty.any()
    assert_close(found, score - penalty, atol=1e-5, rtol=1e-4)
    if config.learn_router_scale:
        assert not torch.equal(pool.scale.current, pool.scale.earlier[0])
