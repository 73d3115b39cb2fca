"""Numbers of the published implementations (`golden/`), within the tolerances their fixtures state.

Sizes, layers and the backbone are read from the folder in `CL_PROMPTS_GOLDEN`, so that fixtures can be regenerated.
"""

import pytest
import torch
from support.golden_cases import METHODS
from support.golden_harness import GOLDEN, Case, Method, gradient
from torch.testing import assert_close


both = pytest.mark.parametrize("name", METHODS)


def load(name: str) -> tuple[Method, Case]:
    method = METHODS[name]
    return method, Case.load(method.fixture or name)


def test_every_fixture_has_its_method() -> None:
    fixtures = {file.stem for file in GOLDEN.glob("*.json")} - {"metrics"}
    assert fixtures == {method.fixture or name for name, method in METHODS.items()}


@both
def test_answers(name: str) -> None:
    method, case = load(name)
    model = method.build(case, test=True).eval()
    with torch.no_grad():
        output = model(case.tensors["pixel_values"])
    if output.query is not None:
        case.close(output.query, "expected/query", "query")
    wanted = case.tensors["expected/eval_logits"][:, model.classes]
    assert_close(output.logits, wanted, atol=case.tolerance("eval_logits"), rtol=0)
    method.check_test(case, output)


@both
def test_trains(name: str) -> None:
    method, case = load(name)
    model = method.build(case, test=False).train()
    about, scalars, tag = case.about["optimizer"], case.about["expected_scalars"], method.variant
    images, labels = case.tensors["pixel_values"], case.tensors["labels"]
    optimizer = torch.optim.Adam(
        model.parameter_groups(**method.rates(about)),
        betas=tuple(about["betas"]),
        eps=about["eps"],
        weight_decay=about.get("weight_decay", 0.0),
    )
    model.attach_optimizer(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for step in range(about["steps"]):
        output = model(images, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        losses.append(output.loss.item())
        if step == 0:
            for part, ours in method.parts.items():
                value = scalars[f"{tag}loss/{part}"]
                own = sum(output.losses[name].item() for name in ours.split("+"))
                assert own == pytest.approx(value, abs=case.tolerance("loss", value)), part
            assert set(output.losses) == set("+".join(method.parts.values()).split("+"))
            for part in method.all_parts(case, model, gradient):
                wanted = case.tensors[f"expected/{tag}grad/{part.name}"]
                allowed = case.tolerance("grad") * (wanted.abs().max().item() + 1e-3)
                assert_close(
                    part.ours, wanted[part.index], atol=allowed, rtol=0, msg=lambda m, part=part: f"{part.name}: {m}"
                )
            norm = torch.stack([p.grad.norm() for p in trained]).norm().item()
            assert norm == pytest.approx(scalars[f"{tag}grad_norm"], rel=1e-4)
        if about["gradient_clipping"]:
            torch.nn.utils.clip_grad_norm_(trained, about["gradient_clipping"]["max_norm"])
        optimizer.step()
    for ours, wanted in zip(losses, scalars[f"{tag}step_losses"], strict=True):
        assert ours == pytest.approx(wanted, abs=case.tolerance("step_losses", wanted))
    for part in method.all_parts(case, model, torch.Tensor.detach):
        first = case.tensors[f"expected/{tag}grad/{part.name}"][part.index]
        wanted = case.tensors[f"{tag}after/{part.name}"][part.index]
        clear = (first == 0) | (first.abs() > 1e-5)
        exact = case.about["tolerance"].get("after", 1e-5)  # older fixtures tell theirs in words
        exact = exact if isinstance(exact, float) else 1e-5
        assert_close(part.ours[clear], wanted[clear], atol=exact, rtol=0, msg=lambda m, part=part: f"{part.name}: {m}")
        assert_close(part.ours, wanted, atol=max(method.rates(about).values()), rtol=0)
