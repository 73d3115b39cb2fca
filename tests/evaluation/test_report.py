"""What a pool is used for, in numbers, lines and pictures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.families import build, inputs
from support.methods import METHODS
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.continual import Evaluation, evaluate
from cl_prompts.evaluation.diagnostics import (
    are_shares,
    prompt_similarity,
    routing_entropy,
    selected_sets,
    selection_counts,
    selection_summary,
    weight_entropy,
)
from cl_prompts.evaluation.plots import draw_selection


def integers(high: int, *size: int, seed: int = 0) -> Tensor:
    return torch.randint(high, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [(), (2,), (2, 3)], ids=["pool", "layers", "heads"])
def test_selection_counts(rows: tuple[int, ...]) -> None:
    ids, tasks = integers(6, 20, *rows, 3), integers(4, 20, seed=1)
    tasks[tasks == 2] = 3  # a task without images
    counts = selection_counts(ids, tasks, 6)
    assert counts.shape == (4, *rows, 6)
    assert counts.dtype == torch.int64
    expected = np.zeros((4, *rows, 6), dtype=int)
    for image, task in enumerate(tasks.tolist()):
        for place in np.ndindex(*rows, 3):
            expected[(task, *place[:-1], ids[(image, *place)].item())] += 1
    assert counts.tolist() == expected.tolist()
    assert counts[2].sum() == 0


def test_routing_entropy() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [0, 9, 0, 0], [3, 3, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    mixed = -sum(n / 10 * math.log(n / 10) for n in (1, 2, 3, 4)) / math.log(4)
    expected = torch.tensor([1, 0, 0.5, 0, mixed], dtype=torch.float64)
    assert_close(routing_entropy(counts), expected)
    assert_close(routing_entropy(counts[None].expand(3, -1, -1)), expected.expand(3, -1))
    assert routing_entropy(torch.tensor([7])) == 0


def test_sets_and_entropy_of_weights() -> None:
    ids = torch.tensor([[[0, 1], [2, 3]], [[1, 0], [2, 4]], [[0, 2], [4, 2]]])
    assert selected_sets(ids).tolist() == [2, 2]
    assert selected_sets(ids[:, 0]) == 2
    assert "by layer: 2 2" in selection_summary(torch.ones(1, 2, 5, dtype=torch.int64), sets=selected_sets(ids))
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert_close(weight_entropy(weights), torch.tensor([1.0, 0.0]))
    assert are_shares(weights)
    assert not any(map(are_shares, (weights - 0.1, 2 * weights)))
    assert "by layer: 0.50 (1" in selection_summary(torch.ones(1, 5, dtype=torch.int64), mixing=weight_entropy(weights))


def new_model(method: str) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, METHODS[method]())
    for classes in ([0, 1], [2, 3]):
        model.begin_task(classes)
        model.end_task()
    return model.eval()


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("method", METHODS)
def test_similarity_and_counts_of_every_method(method: str, tmp_path: Path) -> None:
    model = new_model(method)
    table = model.adapter.pool.prompt_table().detach()
    similarity = prompt_similarity(table)
    groups, size = table.shape[:2]
    assert similarity.shape == (groups, size, size)
    for group in range(groups):
        for a, b in ((0, 0), (0, size - 1), (size // 2, 0)):
            expected = torch.cosine_similarity(table[group, a].flatten(), table[group, b].flatten(), dim=0)
            assert_close(similarity[group, a, b], expected, atol=1e-5, rtol=0)
    labels = torch.tensor([0, 3, -100])
    found = evaluate(model, [{**inputs("vit", 3), "labels": labels}] * 2, model.classes, "cpu")
    assert found.images == 4
    if found.prompt_ids is None:
        return
    counts = selection_counts(found.prompt_ids, torch.tensor([0, 1, 0, 1]), size)
    with torch.no_grad():
        alone = model(**inputs("vit", 3)).prompt_ids[:2]
    assert torch.equal(found.prompt_ids, torch.cat([alone, alone]))
    assert counts.sum() == found.prompt_ids.numel()
    assert selection_summary(counts, similarity).count("\n") == 2 + (size > 1)
    if method in ("l2p", "smope"):
        assert draw_selection(counts, similarity, tmp_path).is_file()


@torch.no_grad()
def test_what_candidates_chose() -> None:
    """One row per image, layer by layer, however many passes its answer took."""
    values = inputs("vit", 3)
    model = new_model("dualprompt one-stage")
    output = model(**values)
    assert output.prompt_ids.sort(2).values.tolist() == [[[0, 1], [0, 1]]] * 3
    best = output.scores.sort(2, descending=True)
    assert output.scores.shape == (3, 2, 2)
    assert torch.equal(output.prompt_ids[:, 0], best.indices[:, 0])
    assert_close(output.prompt_weights[:, 0], best.values[:, 0])

    model = get_prompt_pool_model(build("vit"), METHODS["hash"](router_inference="confidence")).eval()
    for classes in ([0, 1], [2, 3]):
        model.begin_task(classes)
        model.adapter.pool.router.normal_()
        model.end_task()
    output = model(**values)
    assert output.scores.shape == (3, 2, 6)
    best = output.scores.topk(2, dim=2)
    assert torch.equal(output.prompt_ids, best.indices)
    assert_close(output.prompt_weights, best.values.softmax(2))


def test_a_method_that_chooses_nothing() -> None:
    model = get_prompt_pool_model(build("vit"), L2PConfig(key_type="none", top_k=10)).eval()
    model.begin_task([0, 1])
    batch = {**inputs("vit", 3), "labels": torch.tensor([0, 1, 0])}
    found = evaluate(model, [batch], model.classes, "cpu")
    assert isinstance(found, Evaluation)
    assert found.prompt_ids is None


def test_summary() -> None:
    counts = torch.tensor([[[8, 0, 0, 0], [4, 4, 0, 0]], [[0, 8, 0, 0], [2, 2, 2, 2]]])
    similarity = torch.full((2, 4, 4), 0.25) + 0.75 * torch.eye(4)
    similarity[1, 0, 1] = -0.95
    assert selection_summary(counts, similarity).splitlines() == [
        "- routing entropy by task: 0.25 0.50 (1: prompts are chosen alike, 0: always the same one; mean over layers)",
        f"- routing entropy over all tasks: {(0.5 + routing_entropy(torch.tensor([6, 6, 2, 2])).item()) / 2:.2f}",
        "- prompts chosen for no image: 2 of 8",
        "- cosine of two prompts: mean 0.20, largest 0.25",
    ]
    assert len(selection_summary(counts).splitlines()) == 3


def pixels_of(file: Path) -> Any:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def colored(file: Path) -> Any:
    """Share of pixels that are not gray."""
    pixels = pixels_of(file)
    return (pixels.max(2) - pixels.min(2) > 30).mean()


@pytest.mark.slow
def test_picture(tmp_path: Path) -> None:
    """Bars grow with what they count, and there is a row per layer, up to six."""
    heights = {}
    for layers in (1, 2, 9):
        counts = torch.ones(3, layers, 5, dtype=torch.int64)
        heights[layers] = len(pixels_of(draw_selection(counts, None, tmp_path)))
    assert heights[2] == 2 * heights[1]
    assert heights[9] == 6 * heights[1]
    few, many = torch.zeros(2, 30, dtype=torch.int64), torch.ones(2, 30, dtype=torch.int64)
    few[0, 4] = 1
    shares = [colored(draw_selection(counts, None, tmp_path)) for counts in (few, many)]
    assert shares[0] < 0.1 < 0.3 < shares[1]
    assert draw_selection(few, torch.eye(30)[None], tmp_path) == tmp_path / "selection.png"
