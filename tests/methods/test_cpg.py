"""CPG's gate noise. What it shares with VPT-NSP2 is tested there, and golden numbers without noise in tests/contract."""

import pytest
import torch
from support.families import build
from support.golden_cases import CPG
from support.golden_harness import Case, Method, Part, gradient
from support.methods import METHODS
from support.tensors import draw
from torch.testing import assert_close

from cl_prompts import CPGConfig, get_prompt_pool_model
from cl_prompts.methods.cpg import pool as cpg_pool
from cl_prompts.methods.cpg.noise import GateNoise, normal_draws, soft_load
from cl_prompts.methods.cpg.pool import PromptGenerator


def noisy_config(case: Case) -> CPGConfig:
    return CPGConfig(**{**CPG.config(case).to_dict(), "gate_noise": True})


NOISY = Method(
    config=noisy_config,
    layout=lambda case, pool, value: [*CPG.layout(case, pool, value), Part("w_noise", ..., value(pool.noise_gate).mT)],
    parts=CPG.parts,
)


def test_a_step_with_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code with its gating module in training mode, for stored draws."""
    case = Case.load("cpg")
    model = NOISY.build(case, test=False).train()
    model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
    monkeypatch.setattr(cpg_pool, "normal_draws", lambda *size, **rest: case.tensors["noisy/noise"].view(size))
    output = model(case.tensors["pixel_values"], labels=case.tensors["labels"])
    output.loss.backward()
    current = case.about["task"]["current_classes"]
    logits = output.logits[:, [model.classes.index(c) for c in current]]
    case.close(logits, "expected/noisy/train_logits", "eval_logits")
    gates = torch.zeros_like(case.tensors["expected/noisy/gates"]).transpose(0, 1)
    gates = gates.scatter(2, output.prompt_ids, output.prompt_weights)
    case.close(gates.transpose(0, 1), "expected/noisy/gates", "gates")
    for part, ours in NOISY.parts.items():
        wanted = case.about["expected_scalars"][f"noisy/loss/{part}"]
        assert output.losses[ours].item() == pytest.approx(wanted, abs=case.tolerance("loss", wanted)), part
    for one in NOISY.all_parts(case, model, gradient):
        wanted = case.tensors[f"expected/noisy/grad/{one.name}"][one.index]
        allowed = case.tolerance("grad") * (wanted.abs().max().item() + 1e-3)
        assert_close(one.ours, wanted, atol=allowed, rtol=0, msg=lambda m, one=one: f"{one.name}: {m}")


def test_noise_is_of_training_only() -> None:
    torch.manual_seed(0)
    model = get_prompt_pool_model(build("vit"), METHODS["cpg"](gate_noise=True))
    model.begin_task([0, 1])
    model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
    images, labels = draw(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        answers = [model.eval()(images).scores for _ in range(2)]
    assert torch.equal(*answers)
    steps = [model.train()(images, labels=labels) for _ in range(2)]
    assert not torch.equal(steps[0].scores, steps[1].scores)
    steps[0].loss.backward()
    assert model.adapter.pool.noise_gate.grad.flatten(1).any(1).all()


def test_padding_has_no_part_in_the_balance() -> None:
    """Nor do the gradients know of it, whatever it holds."""
    gate, noise_gate, rows = draw(5, 8, seed=1), draw(5, 8, seed=2), draw(3, 4, 8, seed=3)
    padded = torch.cat([rows, torch.full((1, 4, 8), torch.inf)])
    found = []
    for tokens, valid in ((rows, [True] * 3), (padded, [True] * 3 + [False])):
        trained = gate.clone().requires_grad_()
        noise = GateNoise(noise_gate, draw(4, 5, seed=4)[: len(tokens)], torch.tensor(valid), 1.0)
        prefix = PromptGenerator(draw(5, 2, 8, seed=5), trained, 2, True, noise)(tokens, tokens)
        loss = prefix.losses["balance"].value
        found.append(loss.detach())
    assert_close(found[0], found[1])


def test_the_load_of_a_pool_that_is_used_whole() -> None:
    scores = draw(3, 4)
    assert torch.equal(soft_load(scores, scores + 1, torch.ones(3, 4), 4), torch.ones(3, 4))


def test_draws_follow_from_one_number() -> None:
    """So that processes with other numbers of images are at the same state of the generator afterwards."""
    torch.manual_seed(7)
    first = normal_draws(2, 3, 4, rank=0, device=torch.device("cpu"))
    after = torch.rand(())
    torch.manual_seed(7)
    other = normal_draws(2, 5, 4, rank=1, device=torch.device("cpu"))
    assert torch.equal(after, torch.rand(()))
    assert not torch.equal(first, other[:, :3])
