"""VQ-Prompt against plain torch, where the golden fixture (one task, tau 1, no padding) does not look."""

import copy
from typing import Any

import pytest
import torch
from support.families import build
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import PromptPoolModel, VQPromptConfig, get_prompt_pool_model
from cl_prompts.interfaces import BackboneShape, PoolInput
from cl_prompts.methods.vq_prompt.pool import VQPromptPool, nearest_prompt


SMALL: dict[str, Any] = {"pool_size": 5, "prompt_length": 4, "layers": [0, 2]}
TASKS = ([4, 1], [0, 7])


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def new_model(**fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, VQPromptConfig(**{**SMALL, **fields}))


@pytest.mark.parametrize("space", ["projected", "input"])
def test_snap_loss_and_gradients(space: str) -> None:
    """A loop over images in float64. Straight through: the prefix's gradient is the mixture's."""
    config = VQPromptConfig(**SMALL, temperature=0.5, soft_to_hard_weight=0.3, hard_to_soft_weight=0.7, prefix_space=space)
    pool = VQPromptPool(config, BackboneShape(16, 3, 4, 4))
    query = draw(6, 16)
    answer = pool(PoolInput(6, query, task=0))
    assert not pool(PoolInput(6, query)).prefixes[0].losses, "at test there is no loss"

    prompts, keys = (x.detach().double().requires_grad_() for x in (pool.prompts, pool.keys))
    total, ours = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for row, layer in enumerate(SMALL["layers"]):
        prefix = answer.prefixes[layer]
        assert prefix.k.shape == ((6, 4, 2, 4) if space == "projected" else (6, 2, 16))
        rows = torch.cat([x.transpose(1, 2).flatten(2) if x.dim() == 4 else x for x in (prefix.k, prefix.v)], 1)
        noise = draw(6, 4, 16, seed=7 + row)
        ours = ours + (rows * noise).sum() + prefix.losses["quantization"].value.sum()
        assert prefix.losses["quantization"].reduction == "mean"
        for b in range(6):
            scores = torch.stack([query[b].double() @ k / k.norm() for k in keys[row]])
            alpha = (2 * scores).exp() / (2 * scores).exp().sum()
            soft = sum(a * p for a, p in zip(alpha, prompts[row], strict=True))
            m = min(range(5), key=lambda m: (soft - prompts[row, m]).norm().item())
            assert prefix.ids[b].tolist() == [m]
            assert torch.equal(rows[b], pool.prompts[row, m])
            assert_close(prefix.weights[b, 0].double(), alpha[m].detach(), atol=1e-6, rtol=0)
            assert_close(prefix.scores[b].double(), scores, atol=1e-5, rtol=0)
            apart = ((soft - prompts[row, m].detach()) ** 2).mean(), ((soft.detach() - prompts[row, m]) ** 2).mean()
            value = 0.3 * apart[0] + 0.7 * apart[1]
            assert_close(prefix.losses["quantization"].value[b].double(), value, atol=1e-6, rtol=0)
            total = total + (soft * noise[b].double()).sum() + value
    wanted = torch.autograd.grad(total, [prompts, keys])
    for actual, expected in zip(torch.autograd.grad(ours, [pool.prompts, pool.keys]), wanted, strict=True):
        assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_nearest_of_prompts_that_are_alike() -> None:
    """Far from the origin and close together, where |a|^2 - 2ab + |b|^2 is all rounding; equal ones: the lowest number."""
    points = 100 + 1e-3 * draw(7, 600, seed=1)
    points[5] = points[2]
    vectors = points[[0, 5, 6, 3, 2, 4]] + 2e-4 * draw(6, 600, seed=2)
    assert nearest_prompt(vectors, points).tolist() == [0, 2, 6, 3, 2, 4]
    assert nearest_prompt(vectors[:1], points[[1, 1, 1]]).tolist() == [0]


def test_counts_of_two_tasks_and_padding() -> None:
    """An image counts once per task and layer; padding counts nowhere, not in the losses and their gradients either."""
    model = new_model()
    wanted = torch.zeros(2, 2, 5, dtype=torch.int64)
    for task, classes in enumerate(TASKS):
        images, labels = draw(4, 3, 32, 32, seed=task), torch.tensor(classes * 2)
        model.begin_task(classes)
        model.train()
        bare = copy.deepcopy(model)
        padded = {"labels": torch.cat([labels, torch.tensor([-100])]), "sample_ids": [0, 1, 2, 3, -1]}
        for _ in range(2):
            output = model(torch.cat([images, 9 * images[:1]]), **padded)
        for ids in output.prompt_ids[:4]:
            for row in range(2):
                wanted[task, row, ids[row, 0]] += 1
        alone = bare(images, labels=labels)
        for name in ("cross_entropy", "quantization"):
            assert_close(output.losses[name], alone.losses[name], atol=1e-6, rtol=1e-5)
        for loss in (output.loss, alone.loss):
            loss.backward()
        model.end_task()
        for ours, theirs in zip(model.adapter.pool.parameters(), bare.adapter.pool.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
            ours.grad = None
    assert torch.equal(model.adapter.pool.history.counts, wanted)
    assert len(wanted.nonzero()) > 4, "the images must disagree on the prompt"


def test_task_free_and_batches_under_autocast() -> None:
    """Without tasks it trains and counts nothing; in bf16 an image chooses as it does alone."""
    model, images = new_model(num_labels=3, class_mask="none"), draw(5, 3, 32, 32)
    model.train()
    model(images, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    assert model.adapter.pool.keys.grad.abs().sum() > 0
    assert len(model.adapter.pool.history.counts) == 0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        together = model(images)
        alone = [model(image[None]) for image in images]
    assert torch.equal(together.prompt_ids, torch.cat([one.prompt_ids for one in alone]))
    assert together.scores.dtype == torch.float32
    assert_close(together.logits, torch.cat([one.logits for one in alone]), atol=0.05, rtol=0)


def test_bad_fields() -> None:
    for field, value in (("temperature", 0.0), ("pool_size", 0), ("prompt_length", 3), ("readout", "prompt")):
        with pytest.raises(ValueError, match=field):
            VQPromptConfig(**{field: value})
