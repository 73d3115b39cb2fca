"""Fields that change a method's formula, against oracles in plain torch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.drawn_models import model_of
from support.families import build, inputs
from support.methods import METHODS, VARIANTS
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import (
    CodaPromptConfig,
    DualPromptConfig,
    L2PConfig,
    L2PPrefixConfig,
    PromptPoolModel,
    get_prompt_pool_model,
)
from cl_prompts.sharing.inspect import describe_adapter


IMAGES = inputs("vit", 4, seed=7)["pixel_values"]
LABELS = torch.tensor([0, 1, 1, 0])


def prompted(model: Any, tokens: Tensor, at: int = 1, feature: slice | None = None) -> Tensor:
    """Logits of the base with `tokens` [B, P, D] in front of position `at`; `feature`: positions that the head reads."""
    base = model.get_base_model()
    x = base.embeddings(IMAGES)
    x = torch.cat([x[:, :at], tokens, x[:, at:]], 1)
    for block in base.layers:
        x = block(x)
    x = base.layernorm(x)[:, feature or slice(at, at + tokens.shape[1])].mean(1)
    return model.adapter.head(x)


def tokens_of(model: Any, ids: Tensor) -> Tensor:
    """L2P's tokens for the prompts `ids` [B, K], with CLS's position embedding."""
    position = model.get_base_model().embeddings.position_embeddings[:, :1]
    return model.adapter.pool.prompts[ids].flatten(1, 2) + position


def mean_answer(logits: list[Tensor]) -> Tensor:
    return torch.stack([one.softmax(1) for one in logits]).mean(0).log()


@pytest.mark.parametrize("key_loss", ["similarity", "squared_distance"])
def test_l2p_projects_the_query_and_pulls(key_loss: str) -> None:
    model = model_of(L2PConfig(pool_size=6, top_k=2, key_width=5, key_loss=key_loss, pull_coefficient=0.3))
    pool, raw = model.adapter.pool, model.base_model.extract_features(IMAGES)
    output = model.train()(IMAGES, labels=LABELS)
    query = raw @ pool.query_projection
    best, ids = F.cosine_similarity(query[:, None], pool.keys[None], dim=2).topk(2)
    assert torch.equal(output.prompt_ids, ids)
    if key_loss == "similarity":
        wanted = -0.3 * best.sum(1).mean()
    else:
        wanted = 0.3 * sum((query - pool.keys[ids[:, j]]).square().sum(1) for j in range(2)).mean()
    assert_close(output.losses["pull"], wanted, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(wanted, [pool.query_projection, pool.keys])
    output.loss.backward()  # the pull alone trains them
    for parameter, gradient in zip((pool.query_projection, pool.keys), expected, strict=True):
        assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_l2p_averages_the_answers_of_ranks() -> None:
    model = model_of(L2PConfig(pool_size=6, top_k=1, ensemble=3))
    query = model.base_model.extract_features(IMAGES)
    ids = F.cosine_similarity(query[:, None], model.adapter.pool.keys[None], dim=2).topk(3).indices
    output = model(IMAGES)
    assert torch.equal(output.prompt_ids, ids)
    assert_close(output.logits, mean_answer([prompted(model, tokens_of(model, ids[:, [j]])) for j in range(3)]))
    alone = torch.cat([model(image[None]).logits for image in IMAGES])
    assert_close(output.logits, alone, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("average", ["answers", "prompts"])
def test_l2p_averages_pools(average: str) -> None:
    model = model_of(L2PConfig(pool_size=4, top_k=2, num_pools=3, pool_average=average))
    pool, query = model.adapter.pool, model.base_model.extract_features(IMAGES)
    scores = F.cosine_similarity(query[:, None], pool.keys[None], dim=2)
    ids = [scores[:, 4 * p : 4 * p + 4].topk(2).indices + 4 * p for p in range(3)]
    tokens = [tokens_of(model, own) for own in ids]
    wanted = (
        mean_answer([prompted(model, own) for own in tokens])
        if average == "answers"
        else prompted(model, torch.stack(tokens).mean(0))
    )
    output = model(IMAGES)
    assert_close(output.logits, wanted, atol=1e-5, rtol=0)
    assert torch.equal(output.prompt_ids, torch.cat(ids, 1))


def test_l2p_grows_by_itself_until_its_largest_size() -> None:
    torch.manual_seed(0)
    model = get_prompt_pool_model(build("vit"), L2PConfig(pool_size=4, top_k=2, grow_by=3, max_size=9))
    sizes, kept = [], None
    for task in range(4):
        model.begin_task([task, task + 10])
        pool = model.adapter.pool
        if kept is not None:
            assert torch.equal(pool.prompts[: len(kept)], kept), "the old ones stay"
        kept = pool.prompts.detach().clone()
        assert len(pool.keys) == len(kept) == pool.history.counts.shape[1]
        sizes.append(len(kept))
        model.end_task()
    assert sizes == [4, 7, 9, 9]


@pytest.mark.parametrize(("readout", "read"), [("auto", slice(5, 6)), ("prompt", slice(0, 5))])
def test_dualprompt_as_tokens_in_front_with_its_separation(readout: str, read: slice) -> None:
    """[P_G; P_E; x], the E-prompt of the nearest key, the covariance of G and E rows, and G of the first task only."""
    config = DualPromptConfig(
        prompt_form="tokens", g_length=2, e_length=3, separation_weight=0.7, freeze_g=True, readout=readout
    )
    model = model_of(config, tasks=2)
    pool = model.adapter.pool
    assert "g_prompts" in dict(pool.named_buffers())
    assert pool.g_prompts.shape == (1, 2, 32)
    with torch.no_grad():
        output, query = model(IMAGES), model.base_model.extract_features(IMAGES)
        tasks = F.cosine_similarity(query[:, None], pool.keys.all()[:, 0], dim=2).argmax(1)
        assert torch.equal(output.prompt_ids[:, 0], tasks)
        tokens = torch.cat([pool.g_prompts.expand(4, -1, -1)[:, :2], pool.e_prompts.all()[tasks, 0]], 1)
        assert_close(output.logits, prompted(model, tokens, at=0, feature=read), atol=1e-5, rtol=0)
    learning = model.train()(IMAGES, labels=LABELS + 2)
    rows = torch.cat([pool.g_prompts[0], pool.e_prompts.current[0]])
    covariance = torch.cov(rows, correction=0)[:2, 2:]
    assert_close(learning.losses["separation"], 0.7 * covariance.square().mean())


def test_dualprompt_with_one_kind_of_prompts() -> None:
    """Only G needs no query; equal rows as G or as the one E-prompt give equal answers."""
    only_g = model_of(DualPromptConfig(g_layers=[0, 1], e_layers=[]))
    only_e = model_of(DualPromptConfig(g_layers=[], e_layers=[0, 1]))
    with torch.no_grad():
        only_e.adapter.pool.e_prompts.current.copy_(only_g.adapter.pool.g_prompts)
        only_e.adapter.head.load_state_dict(only_g.adapter.head.state_dict())
        ours, theirs = only_g(IMAGES), only_e(IMAGES)
    assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=0)
    assert ours.prompt_ids is None
    assert "query" not in ours
    assert theirs.prompt_ids is not None
    assert set(only_g.train()(IMAGES, labels=LABELS).losses) == {"cross_entropy"}


def test_coda_spares_similar_tasks() -> None:
    """mean((1 - s) * (X X^T - I)^2) with the cosine s of the tasks' mean queries."""
    config = CodaPromptConfig(components_per_task=2, layers=[1], orthogonality_weight=0.5, adaptive_orthogonality=True)
    model = model_of(config).train()
    model(IMAGES, labels=LABELS, sample_ids=range(4))
    model.end_task()
    model.begin_task([2, 3])
    other = inputs("vit", 4, seed=8)["pixel_values"]
    model(other, labels=LABELS + 2, sample_ids=range(4))
    model(other, labels=LABELS + 2, sample_ids=range(4))  # counted once
    loss = model(other, labels=LABELS + 2, sample_ids=range(4)).losses["orthogonality"]
    means = [model.base_model.extract_features(images).mean(0) for images in (IMAGES, other)]
    similar = F.cosine_similarity(*means, dim=0).clamp(0)
    assert 0 < similar < 1
    weights = torch.ones(4, 4)
    weights[:2, 2:] = weights[2:, :2] = 1 - similar
    wanted = 0.0
    for tensor in (model.adapter.pool.keys, model.adapter.pool.attention, model.adapter.pool.components):
        x = tensor.all()[:, 0].flatten(0, 1).flatten(1)
        wanted = wanted + (weights * (x @ x.T - torch.eye(4)).square()).mean()
    assert_close(loss, 0.5 * wanted)


@torch.no_grad()
def test_pools_of_layers_with_the_averaged_query_as_tokens() -> None:
    """Each block gets the nearest prompts of its own pool as further tokens, whose outputs are dropped."""
    model = model_of(
        L2PPrefixConfig(
            pool_size=5, prompt_length=3, top_k=2, layers=[0, 2], one_stage=True, layer_query="mean", as_tokens=True
        )
    )
    base, pool = model.get_base_model(), model.adapter.pool
    x = base.embeddings(IMAGES)
    for number, block in enumerate(base.layers):
        if number in (0, 2):
            row = (0, 2).index(number)
            near = F.cosine_similarity(x.mean(1)[:, None], pool.keys[row], dim=2).topk(2).indices
            x = block(torch.cat([x, pool.prompts[row][near].flatten(1, 2)], 1))[:, : x.shape[1]]
        else:
            x = block(x)
    assert_close(model(IMAGES).logits, model.adapter.head(base.layernorm(x)[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["l2p", "coda", "hash", "dualprompt tokens", "apt"])
def test_prompts_in_half_precision(method: str, tmp_path: Path) -> None:
    """Smaller files, float32 again after loading; all else is stored in full, and the card tells."""
    model: Any = model_of({**METHODS, **VARIANTS}[method](), tasks=2)
    model.end_task()
    for name, dtype in (("full", None), ("half", torch.float16)):
        model.save_pretrained(tmp_path / name, dtype=dtype)
    kinds = {}
    with safe_open(tmp_path / "half" / "adapter_model.safetensors", framework="pt") as file:
        kinds = {name.split(".pool.")[-1]: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {name for name, kind in kinds.items() if kind == "F16"} == model.adapter.pool.prompt_names
    sizes = [describe_adapter(tmp_path / name)["bytes"] for name in ("full", "half")]
    numbers = sum(t.numel() for n, t in model.adapter.pool.state_dict().items() if n in model.adapter.pool.prompt_names)
    assert sizes[0] - sizes[1] == 2 * numbers
    assert "**Prompts are stored in**: float16; loading" in (tmp_path / "half" / "README.md").read_text()
    assert "float16" not in (tmp_path / "full" / "README.md").read_text()
    for low_cpu_mem_usage in (False, True):
        loaded = PromptPoolModel.from_pretrained(
            build("vit"), tmp_path / "half", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
        )
        for (name, ours), theirs in zip(
            loaded.adapter.state_dict().items(), model.adapter.state_dict().values(), strict=True
        ):
            if isinstance(ours, Tensor) and name != "tasks._extra_state":
                rounded = (
                    theirs.half().float() if name.removeprefix("pool.") in loaded.adapter.pool.prompt_names else theirs
                )
                assert ours.dtype == theirs.dtype, name
                assert torch.equal(ours, rounded), name
    with torch.no_grad():
        assert (model(IMAGES).logits - loaded.eval()(IMAGES).logits).abs().max() < 0.05


def test_prompts_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    model = model_of(L2PConfig(top_k=3))
    with pytest.raises(ValueError, match=r"dtype=torch.int8: prompts are saved in one of \['torch.float16'"):
        model.save_pretrained(tmp_path, dtype=torch.int8)
    with torch.no_grad():
        model.adapter.pool.prompts[0, 0, 0] = 7e4
    with pytest.raises(ValueError, match=r"prompts holds 7e\+04, more than 6.55e\+04, .* save with dtype=torch.bfloat16"):
        model.save_pretrained(tmp_path, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert math.isclose(
        PromptPoolModel.from_pretrained(build("vit"), tmp_path).adapter.pool.prompts[0, 0, 0], 7e4, rel_tol=1e-2
    )
