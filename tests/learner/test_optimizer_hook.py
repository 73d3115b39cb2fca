"""Hash's HGM: busy prompts learn slowly. The scaled step is exact for every optimizer; so are the other two forms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.hash_models import IMAGES, TASKS, draw, labels_of, learn, new_model
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import PromptPoolModel


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


class Twin:
    """The same optimizer on copies of a model's parameters, with nobody in its way."""

    def __init__(self, model: PromptPoolModel, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.own = [p for p in model.adapter.parameters() if p.requires_grad]
        self.prompts = next(i for i, p in enumerate(self.own) if p is model.adapter.pool.prompts)
        self.copies = [p.detach().clone().requires_grad_() for p in self.own]
        self.optimizer = make(self.copies)

    @torch.no_grad()
    def step(self) -> list[tuple[Tensor, Tensor]]:
        """(before, after an un-modulated step) of each parameter, from where the model is and with its gradients."""
        before = [p.detach().clone() for p in self.own]
        for twin, p in zip(self.copies, self.own, strict=True):
            twin.copy_(p)
            twin.grad = p.grad.clone()
        self.optimizer.step()
        return list(zip(before, [twin.detach().clone() for twin in self.copies], strict=True))

    def check(self, steps: list[tuple[Tensor, Tensor]], factor: Tensor) -> None:
        for i, (before, after) in enumerate(steps):
            if i == self.prompts:
                slowed = (factor < 1).expand_as(before)
                assert_close(self.own[i][slowed], (before + factor * (after - before))[slowed], atol=1e-7, rtol=0)
                assert torch.equal(self.own[i][~slowed], after[~slowed])
                assert (after != before).any()
            else:
                assert torch.equal(self.own[i], after)


def second_task(make: Callable[[Any], torch.optim.Optimizer], **fields: Any) -> tuple[PromptPoolModel, Any, Twin, Tensor]:
    """A model in its second task, its optimizer, the twin, and the factor by hand: 0.25 for the two busiest prompts."""
    model = learn(new_model(beta=0.25, **fields), 1)
    model.begin_task(TASKS[1])
    model.train()
    optimizer = make([p for p in model.adapter.parameters() if p.requires_grad])
    model.attach_optimizer(optimizer)
    counts = model.adapter.pool.history.counts[0]
    factor = torch.ones(2, 6, 1, 1)
    for layer in range(2):
        for prompt in sorted(range(6), key=lambda m, layer=layer: (-counts[layer, m].item(), m))[:2]:
            factor[layer, prompt] = 0.25
    return model, optimizer, Twin(model, make), factor


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_scaled_exactly(name: str) -> None:
    model, optimizer, twin, factor = second_task(OPTIMIZERS[name])
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGES, labels=labels_of(1)).loss.backward()
        steps = twin.step()
        optimizer.step()
        twin.check(steps, factor)


def test_accumulation_is_one_step() -> None:
    model, optimizer, twin, factor = second_task(OPTIMIZERS["adamw"])
    for part in (slice(0, 4), slice(4, 8)):
        (model(IMAGES[part], labels=labels_of(1)[part]).loss / 2).backward()
    steps = twin.step()
    optimizer.step()
    twin.check(steps, factor)


@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
def test_a_skipped_step_changes_nothing(name: str) -> None:
    """A gradient scaler skips a step whose gradients overflow; the next one starts from where the parameters are.

    A fused optimizer is called all the same, and its kernel leaves the parameters.
    """
    model, optimizer, twin, factor = second_task(OPTIMIZERS[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for overflow in (True, False):
        before = [p.detach().clone() for p in twin.own]
        optimizer.zero_grad()
        scaler.scale(model(IMAGES, labels=labels_of(1)).loss).backward()
        if overflow:
            model.adapter.pool.prompts.grad[0, 0, 0, 0] = float("inf")
        scaler.unscale_(optimizer)
        if not overflow:
            steps = twin.step()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, b) for p, b in zip(twin.own, before, strict=True))
            with torch.no_grad():
                model.adapter.pool.prompts.mul_(0.5)  # what others do in between is not undone
    twin.check(steps, factor)


@pytest.mark.parametrize("attach_first", [True, False])
def test_accelerates_optimizer(attach_first: bool) -> None:
    model, optimizer, twin, factor = second_task(OPTIMIZERS["adamw"])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        prepared = accelerator.prepare_optimizer(optimizer)
        if not attach_first:
            model.attach_optimizer(prepared)
        for i, part in enumerate((slice(0, 4), slice(4, 8))):
            with accelerator.accumulate(model):
                accelerator.backward(model(IMAGES[part], labels=labels_of(1)[part]).loss)
                if i:
                    steps = twin.step()
                prepared.step()
                if not i:
                    assert all(torch.equal(p, c) for p, c in zip(twin.own, twin.copies, strict=True))
                prepared.zero_grad()
        twin.check(steps, factor)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_optimizer_of_the_last_task_is_let_go() -> None:
    model, optimizer, twin, _ = second_task(OPTIMIZERS["sgd"])
    model(IMAGES, labels=labels_of(1)).loss.backward()
    model.end_task()
    steps = twin.step()
    optimizer.step()
    twin.check(steps, torch.ones(2, 6, 1, 1))


def test_gradient_form_scales_gradients() -> None:
    gradients = []
    for hgm in ("reciprocal", "none"):
        model = learn(new_model(modulate="gradient", hgm="none", zeta=0.3), 1)
        model.adapter.config.hgm = hgm
        model.begin_task(TASKS[1])
        with torch.no_grad():
            model.adapter.head.weight[2:] = draw(2, 32, seed=3)
        model.train()(IMAGES, labels=labels_of(1)).loss.backward()
        gradients.append({n: p.grad for n, p in model.adapter.named_parameters()})
        assert model.adapter.pool.update_factors() == {}
    counts = model.adapter.pool.history.counts[0].float()
    factor = {"pool.prompts": 1 / (1 + 0.3 * counts)[:, :, None, None]}
    for name, plain in gradients[1].items():
        assert_close(gradients[0][name], factor.get(name, 1.0) * plain, atol=1e-7, rtol=1e-5)


def test_quadratic_form() -> None:
    """zeta / 2 * sum_e H_e |theta_e - theta_e^t|^2 joins the loss, and zeta H (theta - theta^t) the gradient."""
    model = learn(new_model(modulate="quadratic", zeta=0.3), 2)
    model.begin_task(TASKS[2])
    pool = model.adapter.pool
    start = pool.prompts.detach().clone()
    output = model.train()(IMAGES, labels=labels_of(2))
    assert output.losses["history"] == 0
    with torch.no_grad():
        pool.prompts.add_(0.1 * draw(*start.shape, seed=4))
    output = model(IMAGES, labels=labels_of(2))
    history = (pool.history.counts[0] + pool.history.counts[1]).float()
    moved = (pool.prompts - start).detach()
    expected = sum(0.3 / 2 * history[layer, m] * moved[layer, m].norm() ** 2 for layer in range(2) for m in range(6))
    assert_close(output.losses["history"], expected, atol=1e-5, rtol=1e-5)
    assert_close(output.loss, output.losses["cross_entropy"] + output.losses["history"])
    (gradient,) = torch.autograd.grad(output.losses["history"], [pool.prompts])
    assert_close(gradient, 0.3 * history[:, :, None, None] * moved, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert "history" not in model.eval()(IMAGES, labels=labels_of(2)).losses
