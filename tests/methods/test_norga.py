"""NoRGa where the golden numbers do not reach: both gates, and how the gate is frozen."""

import math
from typing import Any

import pytest
import torch
from support.hide_models import TASKS, answer, images_of, labels_of, learn, new_model
from support.tensors import draw
from torch import nn
from torch.testing import assert_close

from cl_prompts import NoRGaConfig
from cl_prompts.interfaces import PrefixKV
from cl_prompts.methods.norga.pool import GatedPrefix


@pytest.mark.parametrize(("gate", "activation"), [("sigmoid", lambda x: 1 / (1 + math.exp(-x))), ("tanh", math.tanh)])
def test_the_gates_part_of_a_logit(gate: str, activation: Any) -> None:
    keys, queries, scale = draw(2, 2, 3, 4), draw(2, 2, 5, 4, seed=1), torch.tensor([1.7, -0.6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prefix = GatedPrefix(PrefixKV(keys, keys), scale, gate)(draw(2, 5, 8), queries.bfloat16())
    assert prefix.logit_bias.shape == (2, 2, 5, 3)
    assert prefix.logit_bias.dtype == torch.float32
    for b, h, n, p in torch.cartesian_prod(*map(torch.arange, (2, 2, 5, 3))).tolist():
        z = sum(q * k for q, k in zip(queries.bfloat16()[b, h, n].tolist(), keys[b, h, p].tolist(), strict=True)) / 2
        assert prefix.logit_bias[b, h, n, p].item() == pytest.approx(activation(z * 1.7) * -0.6, abs=1e-5)


def test_a_closed_gate_is_hide_prompt() -> None:
    """With b = 0 nothing is added to a logit; with b = 1 the answer is another."""
    gated, plain = learn(new_model(NoRGaConfig), range(2)), new_model(prompt_momentum=0.0)
    for classes in TASKS[:2]:
        plain.begin_task(classes)
        plain.end_task()
    state = {name: value for name, value in gated.state_dict().items() if "gate_scale" not in name}
    plain.load_state_dict(state)
    images = torch.cat([images_of(0, 2), images_of(1, 2)])
    wanted = answer(plain, images).logits
    assert (answer(gated, images).logits - wanted).abs().max() > 1e-3
    gated.adapter.pool.gate_scale[:, 1] = 0
    assert_close(answer(gated, images).logits, wanted, atol=1e-5, rtol=0)


def test_the_gate_is_frozen_after_the_first_task() -> None:
    """Bit-equal after two later tasks, with AdamW, weight decay 0.1 and one optimizer kept; it did learn before."""
    model = new_model(NoRGaConfig)
    model.begin_task(TASKS[0])
    optimizer = torch.optim.AdamW(model.parameter_groups(learning_rate=2e-2), weight_decay=0.1)
    assert {group["name"] for group in optimizer.param_groups} == {"prompts", "routers", "head"}
    for _ in range(2):
        model.train()(images_of(0), labels=labels_of(0)).loss.backward()
        optimizer.step()  # gradients stay, so that the next step would still move the gate
    model.end_task()
    pool = model.adapter.pool
    kept = pool.gate_scale.detach().clone()
    assert (kept - 1).abs().min() > 1e-3
    assert isinstance(pool.gate_scale, nn.Parameter)
    learn(model, range(1, 3), optimizer=optimizer)
    assert torch.equal(pool.gate_scale, kept)
    assert "gate_scale" in dict(pool.named_buffers())
    assert not pool.gate_scale.requires_grad
