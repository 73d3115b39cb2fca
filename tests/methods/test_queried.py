"""DualPrompt, CODA-Prompt and L2P with prefixes beyond the golden numbers: one-stage queries, growth, ensembles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.drawn_models import model_of
from support.families import inputs
from support.methods import METHODS
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import CodaPromptConfig, DualPromptConfig, L2PPrefixConfig, PromptPoolConfig
from cl_prompts.methods.l2p_prefix import pool as l2p_prefix


IMAGES = inputs("vit", 4, seed=7)["pixel_values"]


def attend(block: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A ViT block with prefix rows [B, P, D] in front of its keys and values, in plain torch."""
    a, h = block.attention, block.layernorm_before(x)

    def heads(rows: Tensor) -> Tensor:
        return rows.view(len(rows), -1, 4, 8).transpose(1, 2)

    q = heads(a.q_proj(h))
    k, v = heads(torch.cat([keys, a.k_proj(h)], 1)), heads(torch.cat([values, a.v_proj(h)], 1))
    mixed = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + a.o_proj(mixed)
    return x + block.mlp(block.layernorm_after(x))


def coda_rows(pool: Any, row: int, query: Tensor) -> Tensor:
    parts = [torch.cat([*t.earlier[:, row], t.current[row]]) for t in (pool.components, pool.keys, pool.attention)]
    weights = F.cosine_similarity(query[:, None] * parts[2], parts[1], dim=2)
    return torch.einsum("bm,mpd->bpd", weights, parts[0])


def argmax_rows(pool: Any, row: int, query: Tensor) -> Tensor:
    parts = [torch.cat([*t.earlier[:, row], t.current[row]]) for t in (pool.components, pool.keys, pool.attention)]
    return parts[0][F.cosine_similarity(query[:, None] * parts[2], parts[1], dim=2).argmax(1)]


def l2p_rows(pool: Any, row: int, query: Tensor) -> Tensor:
    nearest = F.cosine_similarity(query[:, None], pool.keys[row], dim=2).argsort(1, descending=True)[:, :2]
    chosen = pool.prompts[row][nearest]  # [B, 2, 4, D]
    return torch.cat([*chosen[:, :, :2].unbind(1), *chosen[:, :, 2:].unbind(1)], 1)


def dualprompt_rows(pool: Any, row: int, query: Tensor) -> Tensor:
    keys = torch.stack([*pool.keys.earlier[:, 0], pool.keys.current[0]])
    prompts = torch.stack([*pool.e_prompts.earlier[:, row], pool.e_prompts.current[row]])
    return prompts[F.cosine_similarity(query[:, None], keys, dim=2).argmax(1)]


ONE_STAGE: dict[str, tuple[Callable[[], Any], Callable[..., Tensor], list[int]]] = {
    "coda": (lambda: CodaPromptConfig(components_per_task=2, layers=[0, 2], one_stage=True), coda_rows, [0, 2]),
    "coda_layer_argmax": (METHODS["coda_layer_argmax"], argmax_rows, [0, 1]),
    "l2p_prefix": (METHODS["l2p_prefix one-stage"], l2p_rows, [0, 1]),
    "dualprompt": (
        lambda: DualPromptConfig(g_layers=[0], e_layers=[1, 2], one_stage=True),
        dualprompt_rows,
        [1, 2],
    ),
}


@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_asks_with_the_layers_own_cls(name: str) -> None:
    config, rows_of, layers = ONE_STAGE[name]
    model = model_of(config(), tasks=3)
    base, pool = model.get_base_model(), model.adapter.pool
    with torch.no_grad():
        x = base.embeddings(IMAGES)
        for number, block in enumerate(base.layers):
            if number in layers:
                rows = rows_of(pool, layers.index(number), x[:, 0])
            elif name == "dualprompt":
                rows = pool.g_prompts[0].expand(len(x), -1, -1)
            else:
                rows = x.new_zeros(len(x), 0, 32)
            x = attend(block, x, *rows.chunk(2, 1))
        wanted = model.adapter.head(base.layernorm(x)[:, 0])
        assert_close(model(IMAGES).logits, wanted, atol=1e-5, rtol=0)


def passes(model: Any, **arguments: Any) -> int:
    """How often a call runs the backbone."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.get_base_model().embeddings.register_forward_hook(counted)
    model(IMAGES, **arguments)
    handle.remove()
    return count


@pytest.mark.parametrize("method", ["dualprompt", "coda", "l2p_prefix"])
def test_one_stage_costs_one_pass(method: str) -> None:
    labels = torch.tensor([4, 5, 4, 5])
    for one_stage, weight, training, testing in ((False, 0.0, 2, 2), (True, 0.0, 1, 1), (True, 0.1, 2, 1)):
        more = {"one_stage": one_stage, "query_regularization": weight}
        model = model_of(METHODS[method](**more), tasks=3)
        assert passes(model.train(), labels=labels) == training, more
        assert passes(model.eval()) == testing, more


@pytest.mark.parametrize("method", ["dualprompt one-stage", "coda one-stage", "l2p_prefix one-stage"])
def test_query_regularisation(method: str) -> None:
    """lambda * sum over layers of the squared distance between the selections of q_l and of the un-prompted CLS."""
    model = model_of(
        METHODS[method](**({} if "coda" in method or "dual" in method else {"query_regularization": 1e-2})), tasks=3
    )
    model.train()
    pool, base, seen = model.adapter.pool, model.get_base_model(), {}
    layers = pool.config.e_layers if "dual" in method else pool.config.layers
    for layer in layers:
        base.layers[layer].register_forward_pre_hook(lambda _, args, at=layer: seen.update({at: args[0][:, 0]}))
    output = model(IMAGES, labels=torch.tensor([4, 5, 4, 5]))
    keys = pool.key_table().detach()
    wanted = 0.0
    for row, layer in enumerate(layers):
        k = keys[min(row, len(keys) - 1)]
        attention = torch.cat([*pool.attention.earlier[:, row], pool.attention.current[row]]) if "coda" in method else 1
        p, r = (F.cosine_similarity(q[:, None] * attention, k, dim=2).softmax(1) for q in (seen[layer], output.query))
        wanted += 1e-2 * (p - r).pow(2).sum(1).mean()
    assert wanted > 1e-5
    assert output.losses["query"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_layers_query_carries_no_gradient_below() -> None:
    """Keys of layer 1 learn from layer 1's query; prompts of layer 0 do not learn through it."""
    model = model_of(L2PPrefixConfig(pool_size=3, prompt_length=2, top_k=3, layers=[0, 1], one_stage=True), tasks=3).train()
    model(IMAGES, labels=torch.tensor([4, 5, 4, 5])).losses["pull"].backward()
    pool = model.adapter.pool
    assert pool.keys.grad.abs().sum() > 0
    assert pool.prompts.grad is None or pool.prompts.grad.abs().sum() == 0


@pytest.mark.parametrize("one_stage", [False, True])
def test_a_large_pool_of_prefixes(one_stage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More prompts than are compared at once: same choices, losses and gradients."""
    found = []
    for chunk in (10**6, 7):
        monkeypatch.setattr(l2p_prefix, "CHUNK", chunk)
        model = model_of(forty(one_stage), tasks=3).train()
        output = model(IMAGES, labels=torch.tensor([4, 5, 4, 5]))
        output.loss.backward()
        found.append((output, model.adapter.pool))
    (whole, its_pool), (chunked, other_pool) = found
    assert chunked.scores is None
    assert whole.scores.shape == (4, 2, 40)
    assert torch.equal(whole.prompt_ids, chunked.prompt_ids)
    assert_close(whole.losses, chunked.losses, atol=1e-6, rtol=1e-6)
    assert_close(its_pool.keys.grad, other_pool.keys.grad, atol=1e-6, rtol=1e-5)
    assert_close(its_pool.prompts.grad, other_pool.prompts.grad, atol=1e-6, rtol=1e-5)


def forty(one_stage: bool) -> PromptPoolConfig:
    return L2PPrefixConfig(pool_size=40, prompt_length=4, top_k=2, layers=[0, 1], one_stage=one_stage)


def test_dualprompt_grows_and_copies() -> None:
    model = model_of(METHODS["dualprompt"](), tasks=1)
    pool = model.adapter.pool
    first = pool.e_prompts.current.detach().clone()
    for task in range(1, 12):
        model.end_task()
        model.begin_task([2 * task, 2 * task + 1])
        assert len(pool.e_prompts.all()) == len(pool.keys.all()) == task + 1
    assert torch.equal(pool.e_prompts.earlier[0], first)
    assert torch.equal(pool.e_prompts.current, first)  # copied on and on, untrained
    assert not torch.equal(pool.keys.current, pool.keys.earlier[0])
    fresh = model_of(METHODS["dualprompt"](task_init="fresh"), tasks=2).adapter.pool.e_prompts
    assert not torch.equal(fresh.current, fresh.earlier[0])


def test_dualprompt_trains_the_tasks_prompt_and_tests_the_nearest() -> None:
    model = model_of(METHODS["dualprompt"](), tasks=3)
    ids = model.train()(IMAGES, labels=torch.tensor([4, 5, 4, 5])).prompt_ids
    assert ids.flatten().tolist() == [2, 2, 2, 2]
    with torch.no_grad():
        query = model.eval()(IMAGES).query
        model.adapter.pool.keys.earlier[1, 0] = query[1]
        output = model(IMAGES)
    assert output.prompt_ids[1].item() == 1
    assert output.prompt_weights[1].item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("one_stage", [False, True])
@pytest.mark.parametrize("keys_per_layer", [False, True])
def test_an_ensemble_is_the_mean_of_its_members(one_stage: bool, keys_per_layer: bool) -> None:
    """With every task in the ensemble, each member is the answer of a model that knows no other prompt."""
    config = DualPromptConfig(g_layers=[0], e_layers=[1], ensemble=5, one_stage=one_stage, keys_per_layer=keys_per_layer)
    model = model_of(config, tasks=3)
    prompts = model.adapter.pool.e_prompts
    with torch.no_grad():
        output = model(IMAGES)
        everyone = torch.stack([*prompts.earlier, prompts.current])
        members = []
        for task in range(3):
            prompts.earlier[:] = everyone[task]
            prompts.current.copy_(everyone[task])
            members.append(model(IMAGES).logits.softmax(1))
    assert output.prompt_ids.flatten(1).sort(1).values.tolist() == [[0, 1, 2]] * 4
    assert (members[0] - members[1]).abs().max() > 1e-3
    assert_close(output.logits, torch.stack(members).mean(0).log(), atol=1e-5, rtol=0)


def test_coda_adds_orthogonal_components() -> None:
    model = model_of(CodaPromptConfig(components_per_task=2, layers=[0, 1]), tasks=1)
    pool = model.adapter.pool
    model.end_task()
    model.begin_task([8, 9])
    for tensor in (pool.components, pool.keys, pool.attention):
        new, old = tensor.current.detach().flatten(2), tensor.earlier[0].flatten(2)
        # one pass of projections on rows that are not orthogonal to each other leaves a little
        assert_close(new.norm(dim=2), torch.ones(2, 2), atol=1e-5, rtol=0)
        assert (new[:, 0] * new[:, 1]).sum(1).abs().max() < 0.02
        assert F.cosine_similarity(new[:, :, None], old[:, None], dim=3).abs().max() < 0.3
    assert pool.prompt_table().shape == (2, 4, 8, 32)
