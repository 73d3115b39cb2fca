"""Layer-grouped prompts against an oracle that makes every row of every prompt by itself."""

import math
from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.tensors import draw
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import LayerGroupedPromptConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.interfaces import BackboneShape, PoolInput, PrefixKV
from cl_prompts.methods.layer_grouped.pool import LayerGroupedPool
from cl_prompts.methods.shared.per_task import PerTask


TASKS = [[4, 1], [0, 7], [3, 5]]
SMALL: dict[str, Any] = {"prompt_length": 3, "num_groups": 2, "bottleneck": 5}
MAKERS = ("root", "down", "bias", "up", "positions")


def new_model(**fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, LayerGroupedPromptConfig(**{**SMALL, **fields}))


def deep_pool(depth: int = 5, width: int = 8, **fields: Any) -> LayerGroupedPool:
    return LayerGroupedPool(LayerGroupedPromptConfig(**{**SMALL, **fields}), BackboneShape(width, depth, 2, width // 2))


def of_task(tensor: PerTask, task: int) -> Tensor:
    return [*tensor.earlier, tensor.current.detach()][task]


def prompt_by_hand(pool: LayerGroupedPool, task: int, place: int, group: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, D] of one layer in one task, row by row, with gelu written out."""
    root, down, bias, up, positions = (of_task(getattr(pool, name), task) for name in MAKERS)
    halves = []
    for half in (0, 1):
        rows = []
        for row in root[half]:
            hidden = down[group].T.mv(row) + bias[group]
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            rows.append(row + up[group].T.mv(hidden) + positions[place, half].squeeze(0))
        halves.append(torch.stack(rows))
    return halves[0], halves[1]


def assert_is_prefix(prefix: Any, image: int, keys: Tensor, values: Tensor) -> None:
    """An image's prefix holds these rows, cut into two heads."""
    assert isinstance(prefix, PrefixKV)
    for ours, rows in ((prefix.k, keys), (prefix.v, values)):
        assert_close(ours[image], torch.stack(rows.chunk(2, 1)), atol=1e-5, rtol=0)


def randomize(pool: LayerGroupedPool) -> None:
    with torch.no_grad():
        for i, tensor in enumerate([*pool.parameters(), *pool.buffers()]):
            tensor.copy_(draw(*tensor.shape, seed=i) / 2)


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "groups", "expected"),
    [
        (12, 3, "000011112222"),
        (12, 1, "000000000000"),
        (3, 3, "012"),
        (5, 2, "00011"),
        (5, 3, "00112"),
        (7, 3, "0001122"),
        (8, 3, "00011122"),
        (10, 4, "0001112233"),
        (7, 4, "0011223"),
    ],
)
def test_groups(depth: int, groups: int, expected: str) -> None:
    assert deep_pool(depth, num_groups=groups).groups == [int(group) for group in expected]


@pytest.mark.parametrize("layers", [None, [3, 0, 4]])
def test_prefixes_in_training(layers: list[int] | None) -> None:
    """The current task's prompts alone, in every layer that is asked for."""
    pool = deep_pool(layers=layers)
    blocks, groups = ([0, 1, 2, 3, 4], [0, 0, 0, 1, 1]) if layers is None else ([0, 3, 4], [0, 0, 1])
    for classes in TASKS:
        pool.begin_task(classes)
    randomize(pool)
    query = draw(4, 8, seed=30)
    answer = pool(PoolInput(4, query, task=2))
    assert list(answer.prefixes) == list(pool.layers) == blocks
    for place, (block, group) in enumerate(zip(blocks, groups, strict=True)):
        keys, values = prompt_by_hand(pool, 2, place, group)
        for image in range(4):
            assert_is_prefix(answer.prefixes[block], image, keys, values)
    assert answer.ids.tolist() == [[2]] * 4
    assert answer.weights.tolist() == [[1.0]] * 4
    key = pool.keys.current.detach()
    cosine = [(q @ key / q.norm() / key.norm()).item() for q in query]
    assert_close(answer.losses["pull"].value, -torch.tensor(cosine), atol=1e-6, rtol=0)
    assert answer.losses["pull"].reduction == "mean"


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_prefixes_at_test(temperature: float) -> None:
    """All tasks' finished prompts, mixed by the softmax of the query's cosines with the tasks' keys."""
    pool = deep_pool(temperature=temperature)
    for classes in TASKS:
        pool.begin_task(classes)
    randomize(pool)
    query = draw(4, 8, seed=30)
    answer = pool(PoolInput(4, query))
    assert not answer.losses
    for image, q in enumerate(query):
        keys = [of_task(pool.keys, task) for task in range(3)]
        cosine = torch.stack([q @ k / q.norm() / k.norm() for k in keys])
        weights = (cosine / temperature).exp() / (cosine / temperature).exp().sum()
        assert_close(answer.scores[image], cosine, atol=1e-6, rtol=0)
        assert_close(answer.weights[image], weights, atol=1e-5, rtol=0)
        assert answer.ids[image].tolist() == [0, 1, 2]
        for block, group in enumerate([0, 0, 0, 1, 1]):
            made = [prompt_by_hand(pool, task, block, group) for task in range(3)]
            mixed = (sum(w * pair[half] for w, pair in zip(weights, made, strict=True)) for half in (0, 1))
            assert_is_prefix(answer.prefixes[block], image, *mixed)
    table = pool.prompt_table()
    assert table.shape == (5, 3, 6, 8)
    keys, values = prompt_by_hand(pool, 1, 4, 1)
    assert_close(table[4, 1], torch.cat([keys, values]), atol=1e-6, rtol=0)
    assert torch.equal(pool.key_table(), torch.stack(keys_of(pool))[None])


def keys_of(pool: LayerGroupedPool) -> list[Tensor]:
    return [*pool.keys.earlier, pool.keys.current]


def test_what_learns_from_what() -> None:
    """The key learns from the pull alone, the prompts from the rest alone; earlier tasks' prompts carry no gradient."""
    model = new_model(generator_init="normal", pull_coefficient=0.5)
    for classes in TASKS[:2]:
        model.begin_task(classes)
        model.end_task()
    model.begin_task(TASKS[2])
    pool, values, labels = model.adapter.pool, inputs("vit", 4), torch.tensor([3, 5, 5, -100])
    query = model.extract_features(**values)
    output = model.train()(**values, labels=labels)
    key = pool.keys.current.detach().clone().requires_grad_()
    pull = -0.5 * torch.cosine_similarity(query[:3], key[None]).mean()
    assert_close(output.losses["pull"], pull, atol=1e-6, rtol=0)
    assert_close(output.loss, output.losses["cross_entropy"] + pull, atol=1e-6, rtol=0)
    output.losses["cross_entropy"].backward(retain_graph=True)
    assert pool.keys.current.grad is None
    made = {name: getattr(pool, name).current for name in MAKERS}
    assert all(p.grad.abs().sum() > 0 for p in made.values())
    found = torch.autograd.grad(output.losses["pull"], [pool.keys.current, *made.values()], allow_unused=True)
    assert_close(found[0], torch.autograd.grad(pull, key)[0], atol=1e-6, rtol=0)
    assert all(gradient is None for gradient in found[1:])
    assert not any(p.requires_grad for p in pool.buffers())


# ---- tasks ---------------------------------------------------------------------------------------------------------


def test_a_fresh_generator_changes_nothing() -> None:
    """Every layer starts with the root, which is drawn from a Gaussian."""
    pool = deep_pool(width=64, prompt_length=40, num_groups=3)
    root = pool.root.current.detach()
    assert root.std().item() == pytest.approx(0.02, rel=0.05)
    for prefix in pool(PoolInput(1, draw(1, 64))).prefixes.values():
        for ours, rows in zip((prefix.k, prefix.v), root, strict=True):
            assert torch.equal(ours[0].transpose(0, 1).flatten(1), rows)


def test_tasks_start_from_copies() -> None:
    """The next task's tensors are copies, its key is new; the prompts of earlier tasks stay what they were."""
    pool = deep_pool()
    pool.begin_task([0])
    randomize(pool)
    before, prompts = (
        {name: getattr(pool, name).current.detach().clone() for name in (*MAKERS, "keys")},
        pool.all_prompts()[0],
    )
    pool.begin_task([1])
    for name in MAKERS:
        assert torch.equal(getattr(pool, name).current, before[name]), name
    assert not torch.isclose(pool.keys.current, before["keys"]).any()
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(1)
    assert all(torch.equal(getattr(pool, name).earlier[0], value) for name, value in before.items())
    assert_close(pool.all_prompts()[0], prompts, atol=1e-6, rtol=0)


def test_images_fill_the_root_alone() -> None:
    model = new_model(generator_init="normal")
    pool = model.adapter.pool
    before = {name: p.detach().clone() for name, p in pool.named_parameters()}
    model.base_model.initialize_prompts(**inputs("vit"))
    for name, parameter in pool.named_parameters():
        assert torch.equal(parameter, before[name]) == (name != "root.current"), name
