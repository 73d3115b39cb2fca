"""VQ-Prompt against plain torch, where the golden fixture (one task, tau 1, no padding) does not look."""

from typing import Any

import pytest
import torch
from support.families import build
from support.tensors import draw
from torch.testing import assert_close

from cl_prompts import PromptPoolModel, VQPromptConfig, get_prompt_pool_model
from cl_prompts.interfaces import BackboneShape, PoolInput
from cl_prompts.methods.vq_prompt.pool import VQPromptPool, nearest_prompt


SMALL: dict[str, Any] = {"pool_size": 5, "prompt_length": 4, "layers": [0, 2]}
TASKS = ([4, 1], [0, 7])


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
