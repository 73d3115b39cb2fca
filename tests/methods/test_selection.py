"""The nearest keys of large pools: the same ids as from all scores at once, in memory that does not grow with the pool."""

from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.tensors import draw, integers
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.interfaces import PoolInput
from cl_prompts.methods.l2p import pool as l2p
from cl_prompts.methods.shared.selection import CHUNK, nearest, top_k


MANY = 100_000
IMAGES = inputs("vit", 4)["pixel_values"]
LABELS = torch.tensor([0, 1, 1, 0])


def halves(count: int, seed: int) -> Tensor:
    """Vectors of length 1 whose products are exact and often equal: ± unit vectors, and all signs of (½, ½, ½, ½)."""
    signs = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 4)
    table = torch.cat([torch.eye(4), -torch.eye(4), signs])
    return table[integers(len(table), count, seed=seed)]


@pytest.mark.parametrize("seed", range(3))
def test_of_equal_scores_the_lower_number_comes_first(seed: int) -> None:
    scores = (integers(9, 30, 11, seed=seed) - 4) / 4
    scores[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    scores[1, 2:5] = torch.tensor([-torch.inf, 3e38, torch.inf])
    for k in (1, 4, 11):
        for row, ids in zip(scores.tolist(), top_k(scores, k).tolist(), strict=True):
            assert ids == sorted(range(11), key=lambda m, row=row: (-row[m], m))[:k]


@pytest.mark.parametrize("chunk", [1, 3, 10, 16, 1000])
def test_chunks_find_what_all_scores_at_once_find(chunk: int) -> None:
    query, keys, k = halves(9, seed=1), halves(37, seed=2), 5
    cosine, frequency = query @ keys.T, integers(4, 37, seed=3) / 8
    ids, scores = nearest(query, keys, k, chunk=chunk)
    chosen, distances = nearest(query, keys, k, frequency=frequency, chunk=chunk)
    for b, row in enumerate(cosine.tolist()):
        assert ids[b].tolist() == sorted(range(37), key=lambda m, row=row: (-row[m], m))[:k]
        rank = {m: ((1 - s) * h, 1 - s, m) for m, (s, h) in enumerate(zip(row, frequency.tolist(), strict=True))}
        assert chosen[b].tolist() == sorted(rank, key=rank.__getitem__)[:k]
    assert torch.equal(scores, cosine.gather(1, ids))
    assert torch.equal(distances, cosine.gather(1, chosen))


def test_a_hundred_thousand_prompts() -> None:
    query, keys = draw(7, 24), 3 * draw(MANY, 24, seed=1)
    cosine = F.normalize(query.double(), dim=1) @ F.normalize(keys.double(), dim=1).T
    best, expected = cosine.topk(20, dim=1)
    ids, scores = nearest(query, keys, 20)
    assert torch.equal(ids, expected)
    assert_close(scores.double(), best, atol=1e-6, rtol=0)


class Allocations(TorchDispatchMode):
    """The largest tensor that was made, not counting views of what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("diversified", [False, True])
def test_memory_of_a_choice_does_not_grow_with_the_pool(diversified: bool) -> None:
    found = []
    for size in (20_000, MANY):
        model = new_model(pool_size=size, prompt_length=1, top_k=3, diversified_selection=diversified)
        model.begin_task([2])
        pool, query = model.adapter.pool, draw(32, 32)
        with Allocations() as seen:
            prompts = pool(PoolInput(32, query, 1 if diversified else None))
        assert prompts.scores is None
        found.append(seen.largest)
    assert found[0] == found[1] == 32 * CHUNK


def test_training_never_holds_a_number_per_image_and_prompt() -> None:
    model, images = new_model(pool_size=20_000, prompt_length=1), inputs("vit", 64)["pixel_values"]
    model.begin_task([2, 3])
    model.train()
    labels = 2 + torch.arange(64) % 2
    with Allocations() as seen:
        output = model(images, labels=labels)
        output.loss.backward()
    assert seen.largest == 20_000 * 32, "a gradient is as large as its parameter"
    assert model.adapter.pool.history.counts.sum() == 64 * 5
    assert output.scores is None
    with torch.no_grad():
        assert model.eval()(images[:2]).prompt_ids.shape == (2, 5)


def new_model(**fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, L2PConfig(**fields))
    model.begin_task([0, 1])
    model.end_task()
    return model


def learnt(limit: int, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[PromptPoolModel, list[Any]]:
    """Two tasks of a pool of 5,000 prompts, all scores at once or in chunks; the model and its outputs."""
    monkeypatch.setattr(l2p, "CHUNK", limit)
    model, outputs = new_model(pool_size=5000, prompt_length=2, pull_coefficient=0.7, **fields), []
    for task in range(2):
        model.begin_task([2 + 2 * task, 3 + 2 * task])
        model.train()
        outputs.append(model(IMAGES, labels=LABELS + 2 + 2 * task))
        outputs[-1].loss.backward()
        model.end_task()
    with torch.no_grad():
        outputs.append(model.eval()(IMAGES))
    return model, outputs


@pytest.mark.parametrize(
    "fields",
    [{}, {"diversified_selection": True}, {"key_type": "prompt_mean"}],
    ids=["plain", "diversified", "prompt_mean"],
)
def test_l2p_with_a_large_pool(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same choices, losses and gradients as from all scores at once."""
    small, expected = learnt(10**6, monkeypatch, **fields)
    large, found = learnt(CHUNK, monkeypatch, **fields)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.scores is None
        assert theirs.scores.shape == (4, 5000)
        assert torch.equal(ours.prompt_ids, theirs.prompt_ids)
        assert_close(ours.prompt_weights, theirs.prompt_weights, atol=1e-6, rtol=0)
        for column in (ours.logits, theirs.logits):
            column[column.isinf()] = 0
        assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=0)
        if ours.losses:
            assert_close(ours.losses, theirs.losses, atol=1e-6, rtol=0)
    if "diversified_selection" in fields:
        assert not torch.equal(found[1].prompt_ids, found[2].prompt_ids), "nothing was weighted"
    for ours, theirs in zip(large.adapter.parameters(), small.adapter.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0
        assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)


def test_a_loss_on_all_scores_gets_them() -> None:
    model = new_model(pool_size=5000, entropy_weight=0.1)
    model.begin_task([2, 3])
    assert model.train()(IMAGES, labels=LABELS + 2).losses["collapse"] > 0
    with torch.no_grad():
        assert model.eval()(IMAGES).scores is None
