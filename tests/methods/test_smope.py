"""SMoPE: the rest of its golden fixture, and plain loops where that does not look (counts, two tasks, padding)."""

import math
from typing import Any

import pytest
import torch
from support.families import build
from support.golden_cases import SMOPE, smope_choices
from support.golden_harness import Case
from support.tensors import draw
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import PromptPoolModel, SMoPEConfig, get_prompt_pool_model
from cl_prompts.methods.smope.pool import ExpertRouter


SMALL: dict[str, Any] = {"pool_size": 7, "top_k": 2, "layers": [0, 2], "router_weight": 0.1, "prototype_weight": 0.2}
TASKS = ([4, 1], [0, 7], [3, 5])
LAYERS, HEADS, EXPERTS, TOP = 2, 4, 7, 2


def images_of(task: int) -> Tensor:
    return draw(4, 3, 32, 32, seed=10 + task)


def new_model(**fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, SMoPEConfig(**{**SMALL, **fields}))


def best(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


def counted(scores: Tensor) -> Tensor:
    """How often each expert is among the best, for scores [images, layers, H, E], by counting."""
    counts = torch.zeros(LAYERS, HEADS, EXPERTS, dtype=torch.int64)
    for image in scores:
        for layer in range(LAYERS):
            for head in range(HEADS):
                for expert in best(image[layer, head].tolist(), TOP):
                    counts[layer, head, expert] += 1
    return counts


# ---- golden, in training and with all experts ----------------------------------------------------------------------


def test_choices_and_logits_of_training() -> None:
    case = Case.load("smope")
    model = SMOPE.build(case, test=False).train()
    output = model(case.tensors["pixel_values"], labels=case.tensors["labels"])
    smope_choices(case, output, "train")
    columns = [model.classes.index(c) for c in case.about["task"]["current_classes"]]
    wanted = case.tensors["expected/train_logits"][:, case.about["task"]["current_classes"]]
    assert_close(output.logits[:, columns], wanted, atol=case.tolerance("eval_logits"), rtol=0)


def test_all_experts() -> None:
    case = Case.load("smope")
    case.sizes["top_k"] = case.sizes["experts"]
    model = SMOPE.build(case, test=True).eval()
    with torch.no_grad():
        logits = model(case.tensors["pixel_values"]).logits
    wanted = case.tensors["expected/eval_logits_dense"][:, model.classes]
    assert_close(logits, wanted, atol=case.tolerance("eval_logits"), rtol=0)


def test_counts_are_of_scores_without_penalty() -> None:
    """The fixture's counts, from its counting images; a penalty on every other expert changes nothing."""
    case = Case.load("smope")
    model = SMOPE.build(case, test=False).train()
    pool = model.adapter.pool
    pool.history.counts.zero_()
    # Lower layers' choices move the scores above: layer 0 alone is free of them.
    pool.history.counts[0, 0, :, ::2] = 1
    model(case.tensors["count_pixel_values"], labels=case.tensors["labels"])
    assert torch.equal(pool.history.counts[1, 0], case.tensors["fixed/activation_count"][0])


# ---- one layer -----------------------------------------------------------------------------------------------------


def test_router() -> None:
    """Choice, bias, values and loss, image by image and head by head."""
    keys, values, queries = draw(4, 7, 8), draw(4, 7, 8, seed=1), draw(5, 4, 9, 8, seed=2)
    penalty = torch.tensor([0.0, 0.5, 0.0, 2.0, 0.0, 0.0, 0.5]).expand(4, -1)
    prefix = ExpertRouter(keys, values, penalty, 3, 0.4, 0.1)(torch.empty(0), queries)
    moved = 0
    for b in range(5):
        loss = 0.0
        for h in range(4):
            scores = [sum(queries[b, h, n].dot(keys[h, e]).item() for n in range(9)) / 9 for e in range(7)]
            span = max(scores) - min(scores)
            ids = best([s - p * span for s, p in zip(scores, penalty[h].tolist(), strict=True)], 3)
            moved += ids != best(scores, 3)
            assert prefix.ids[b, h].tolist() == ids
            assert 3 not in ids, "a penalty of two ranges excludes"
            assert_close(prefix.scores[b, h], torch.tensor(scores), atol=1e-5, rtol=0)
            for rank, expert in enumerate(ids):
                assert torch.equal(prefix.v[b, h, rank], values[h, expert])
                wanted = torch.full((9,), scores[expert] / math.sqrt(8))
                assert_close(prefix.logit_bias[b, h, :, rank], wanted, atol=1e-5, rtol=0)
                logits = torch.tensor([s + (0.0 if e in ids else 0.4 * span) for e, s in enumerate(scores)])
                loss += 0.1 * F.cross_entropy(logits, torch.tensor(expert)).item()
        assert prefix.losses["router"].value[b].item() == pytest.approx(loss, abs=1e-4)
    assert moved > 5
    assert not prefix.k.any()
    rounded = queries.bfloat16()
    scores = ExpertRouter(keys, values, penalty, 3, 0.4, 0.1)(torch.empty(0), rounded).scores
    assert_close(scores, torch.einsum("bhd,hed->bhe", rounded.float().mean(2), keys), atol=1e-5, rtol=0)


def test_excluded_experts_come_last() -> None:
    """With fewer used experts than ranks the rest is filled up, best first."""
    penalty = torch.tensor([[2.0, 0.0, 2.0, 2.0]])
    prefix = ExpertRouter(torch.tensor([[[5.0], [1.0], [4.0], [3.0]]]), torch.zeros(1, 4, 1), penalty, 3, 0.4, 0.0)(
        torch.empty(0), torch.ones(1, 1, 2, 1)
    )
    assert prefix.ids.tolist() == [[[1, 0, 2]]]
    assert not prefix.losses


# ---- tasks ---------------------------------------------------------------------------------------------------------


def test_three_tasks() -> None:
    """Counts of an image's newest pass, padding aside; who was frequent, who is excluded; the prototype loss."""
    model = new_model()
    pool = model.adapter.pool
    cumulative = torch.zeros(LAYERS, HEADS, EXPERTS, dtype=torch.int64)
    frequent = torch.zeros(LAYERS, HEADS, EXPERTS, dtype=torch.bool)
    for task, classes in enumerate(TASKS):
        before = pool.expert_keys.detach().clone()
        model.begin_task(classes)
        assert torch.equal(pool.frequently_used(), frequent)
        optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=0.05))
        model.train()
        passes = []
        for _ in range(3):
            seen = []
            for rows, images in ([0, 1, 2, 0], 3), ([3, 0, 0, 0], 1):  # what follows them is padding
                rows, real = torch.tensor(rows), torch.arange(4) < images
                labels = torch.where(real, torch.tensor(classes)[rows % 2], -100)
                output = model(images_of(task)[rows], labels=labels, sample_ids=torch.where(real, rows, -1))
                seen.append(output.scores.detach()[real])
                if task:
                    wanted = prototype(before, pool.expert_keys.detach(), frequent)
                    assert output.losses["prototype"].item() == pytest.approx(0.2 * wanted, rel=1e-4)
                else:
                    assert "prototype" not in output.losses
                output.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            passes.append(counted(torch.cat(seen)))
            assert torch.equal(pool.history.counts[task], passes[-1])
        assert not torch.equal(passes[0], passes[-1]), "training must move the choice"
        cumulative += passes[-1]
        for layer in range(LAYERS):
            for head in range(HEADS):
                row = cumulative[layer, head].tolist()
                mean = sum(row) / sum(n > 0 for n in row)
                for expert in range(EXPERTS):
                    frequent[layer, head, expert] |= row[expert] >= mean
        model.end_task()
    never = cumulative == 0
    assert never.any()
    with torch.no_grad():
        output = model.eval()(draw(20, 3, 32, 32, seed=3))
    unused = never.expand(20, -1, -1, -1)
    assert output.scores.masked_fill(~unused, -math.inf).amax(-1).gt(output.scores.topk(TOP).values[..., -1]).any()
    assert not unused.gather(-1, output.prompt_ids).any()


def prototype(old: Tensor, new: Tensor, frequent: Tensor) -> float:
    """The prototype loss by loops, for keys [layers, E, D]."""
    total = 0.0
    for layer in range(LAYERS):
        for head in range(HEADS):
            part = slice(8 * head, 8 * head + 8)
            old_keys, keys = old[layer, :, part], new[layer, :, part]
            users = [e for e in range(EXPERTS) if frequent[layer, head, e]]
            for e in users:
                for target in best((old_keys @ old_keys[e]).tolist(), TOP):
                    total += F.cross_entropy(keys @ old_keys[e], torch.tensor(target)).item() / len(users)
    return total


def test_counts_without_image_numbers() -> None:
    """Every forward counts then."""
    model = new_model()
    model.begin_task([4, 1])
    model.train()
    first = model(images_of(0), labels=torch.tensor([4, 1, 1, 4])).scores
    second = model(images_of(1), labels=torch.tensor([4, 1, 1, 4])).scores
    assert torch.equal(model.adapter.pool.history.counts[0], counted(first) + counted(second))


def test_prompt_table_is_what_heads_choose_from() -> None:
    pool = new_model().adapter.pool
    table = pool.prompt_table()
    assert table.shape == (LAYERS * HEADS, EXPERTS, 2, 8)
    assert torch.equal(table[5, 3, 1], pool.expert_values[1, 3, 8:16])
    assert torch.equal(table[2, 6, 0], pool.expert_keys[0, 6, 16:24])
