"""Loss terms that any pool can use: closed forms, whom they move, and that padding counts nowhere."""

import math
from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.methods import METHODS
from support.tensors import draw
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import PromptPoolModel, get_prompt_pool_model
from cl_prompts.methods.shared.regularizers import alignment, collapse, diversity, orthogonality


def everyone(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def close(actual: Tensor, expected: float) -> None:
    assert_close(actual, torch.tensor(float(expected)), atol=1e-5, rtol=0)


# ---- closed forms


def test_diversity() -> None:
    apart, lengths = torch.eye(5)[None, :4], torch.tensor([0.1, 3.0, -2.0, 1.0])[:, None]
    close(diversity(apart * lengths), 0)
    same = draw(1, 1, 5).expand(1, 4, 5) * lengths
    close(diversity(same), 1)
    close(diversity(torch.cat([apart * lengths, same])), 0.5)
    diagonal = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    close(diversity(diagonal), 0.5)  # cos² of 45 degrees


@pytest.mark.parametrize(("count", "width"), [(3, 7), (7, 3), (2, 2)], ids=["few", "many", "square"])
def test_diversity_of_any_prompts(count: int, width: int) -> None:
    prompts = draw(2, count, width).requires_grad_()
    squares = [
        torch.cosine_similarity(layer[i], layer[j], dim=0) ** 2 for layer in prompts for i in range(count) for j in range(i)
    ]
    expected = torch.stack(squares).mean()
    assert_close(diversity(prompts), expected, atol=1e-6, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(x, prompts)[0] for x in (diversity(prompts), expected))
    assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_single_prompt_is_diverse() -> None:
    prompt = draw(2, 1, 5).requires_grad_()
    value = diversity(prompt)
    value.backward()
    assert value == 0
    assert prompt.grad.abs().max() == 0


def test_alignment() -> None:
    prompts = draw(2, 3, 4, 6)
    means = prompts.mean(2)
    close(alignment(prompts, 0.3 * means), 0)
    close(alignment(prompts, -2 * means), 2)
    keys = draw(2, 3, 6, seed=1)
    keys = keys - (keys * means).sum(-1, keepdim=True) / means.square().sum(-1, keepdim=True) * means
    close(alignment(prompts, keys), 1)
    shared = draw(1, 3, 6, seed=2)
    cosines = [torch.cosine_similarity(means[layer, m], shared[0, m], dim=0) for layer in range(2) for m in range(3)]
    close(alignment(prompts, shared), 1 - sum(cosines) / 6)


def test_collapse() -> None:
    close(collapse(torch.full((6, 5), 2.3), everyone(6)), 0)
    one = torch.zeros(6, 5)
    one[:, 3] = 200.0
    close(collapse(one, everyone(6)), math.log(5))
    close(collapse(200 * torch.eye(5), everyone(5)), 0)  # each image sure of another prompt: the pool is used evenly
    close(collapse(torch.stack([one, torch.zeros(6, 5)], 1), everyone(6)), math.log(5) / 2)  # two layers
    half = torch.cat([200 * torch.eye(4)[:2], torch.full((2, 4), 0.0)])
    close(collapse(half, torch.tensor([True, True, False, False])), math.log(4) - math.log(2))


@pytest.mark.parametrize("rubbish", [5.0, math.inf, math.nan])
def test_padding_collapses_nothing(rubbish: float) -> None:
    scores, counted = draw(5, 2, 7), torch.tensor([True, False, True, True, False])
    scores[~counted] = rubbish
    scores.requires_grad_()
    value = collapse(scores, counted)
    mean = scores.detach()[counted].softmax(-1).mean(0)
    assert_close(value, math.log(7) + (mean * mean.log()).sum(-1).mean(), atol=1e-6, rtol=0)
    value.backward()
    assert scores.grad[~counted].abs().max() == 0
    assert scores.grad[counted].abs().min() > 0


def test_orthogonality() -> None:
    rows = torch.linalg.qr(draw(6, 6))[0][:4]
    close(orthogonality(rows[None]), 0)
    close(orthogonality(torch.stack([2 * rows, torch.zeros(4, 6)])), 9 / 4 + 1 / 4)  # (4 - 1)² and 1 on the diagonals
    close(orthogonality(rows[:1].expand(4, 6)[None]), 12 / 16)  # ones everywhere off the diagonal


# ---- in the loss


def taught(method: str, **fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, METHODS[method](**fields))
    model.begin_task([0, 1])
    model.end_task()
    model.begin_task([2, 3])
    model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
    with torch.no_grad():  # nothing is a copy of an earlier task's tensor
        for number, parameter in enumerate(model.adapter.pool.parameters()):
            parameter.add_(0.1 * draw(*parameter.shape, seed=number))
    return model.train()


IMAGES, LABELS = inputs("vit", 4)["pixel_values"], torch.tensor([2, 3, 3, 2])


@pytest.mark.parametrize(
    "method", [name for name in METHODS if not name.startswith(("vpt", "none", "one_prompt", "apt"))]
)  # one prompt, or none
def test_they_join_the_loss_and_move_what_they_are_about(method: str) -> None:
    config = METHODS[method]()
    fields = {"diversity_weight": 0.3}
    if config.has_keys:
        fields["alignment_weight"] = 0.2
    if config.selects:
        fields["entropy_weight"] = 0.7
    model = taught(method, **fields)
    pool, output = model.adapter.pool, model(IMAGES, labels=LABELS)
    table = pool.prompt_table()
    expected = {"diversity": 0.3 * diversity(table.flatten(2))}
    if config.has_keys:
        expected["alignment"] = 0.2 * alignment(table, pool.key_table())
    if config.selects:
        mean = output.scores.softmax(-1).mean(0)
        entropy = -(mean * mean.log()).sum(-1).mean()
        expected["collapse"] = 0.7 * (math.log(mean.shape[-1]) - entropy)
    names = {"diversity", "alignment", "collapse"} & set(output.losses)
    assert names == set(expected)
    for name, value in expected.items():
        assert_close(output.losses[name], value, atol=1e-6, rtol=1e-5)
        assert value > 0
    assert_close(output.loss, torch.stack(list(output.losses.values())).sum())

    moves = {}
    parameters = dict(pool.named_parameters())
    for name in names:
        found = torch.autograd.grad(output.losses[name], list(parameters.values()), retain_graph=True, allow_unused=True)
        moved = {n for n, gradient in zip(parameters, found, strict=True) if gradient is not None and gradient.any()}
        moves[name] = {pool.roles[n] for n in moved}
    assert moves["diversity"] == {"prompts"}
    if config.has_keys:
        assert moves["alignment"] == {"prompts", "keys"}
    if config.selects:
        assert moves["collapse"] & {"keys", "routers"} or not {"keys", "routers"} & set(pool.roles.values())
    with torch.no_grad():
        assert set(model.eval()(IMAGES, labels=LABELS).losses) == {"cross_entropy"}


def test_a_few_steps_do_what_they_say() -> None:
    model = taught("l2p", diversity_weight=5.0, alignment_weight=5.0)
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=0.05))
    model.attach_optimizer(optimizer)
    losses = []
    for _ in range(20):
        output = model(IMAGES, labels=LABELS)
        losses.append({name: value.item() for name, value in output.losses.items()})
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("diversity", "alignment"):
        assert losses[-1][name] < 0.5 * losses[0][name]
