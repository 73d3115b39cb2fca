"""Numbers of the published implementations (`golden/`), within the tolerances their fixtures state.

Sizes, layers and the backbone are read from the folder in `CL_PROMPTS_GOLDEN`, so that fixtures can be regenerated.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import ViTModel

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model


GOLDEN = Path(os.environ.get("CL_PROMPTS_GOLDEN", Path(__file__).parent / "golden"))


@dataclass
class Case:
    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> "Case":
        return cls(load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text()))

    def tolerance(self, what: str, value: Tensor | float = 0.0) -> float:
        rule = self.about["tolerance"][what]
        if isinstance(rule, float):
            return rule
        number = float(rule.replace("per tensor:", "").split("*")[0])  # "2e-5 * max(1, |value|)" and the like
        return number * max(1.0, abs(float(value)))

    def close(self, actual: Tensor, name: str, what: str) -> None:
        assert_close(actual, self.tensors[name], atol=self.tolerance(what), rtol=0)


def l2p_model(case: Case) -> PromptPoolModel:
    """The fixture's model: every class but the current task's is declared in an earlier task."""
    about = case.about["hyperparameters"]
    vit = ViTModel.from_pretrained(GOLDEN / "backbone", add_pooling_layer=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="batchwise_selection")
        config = L2PConfig(
            pool_size=about["pool_size"],
            prompt_length=about["prompt_length"],
            top_k=about["top_k"],
            pull_coefficient=about["pull_coefficient"],
            batchwise_selection=about["batchwise_vote"],
        )
    model = get_prompt_pool_model(vit, config)
    current = case.about["task"]["current_classes"]
    model.begin_task([c for c in range(case.about["dims"]["num_classes"]) if c not in current])
    model.end_task()
    model.begin_task(current)
    adapter = model.adapter
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            value = case.tensors[f"before/{name}"]
            parameter.copy_(value[model.classes] if name.startswith("head.") else value)
    assert {*parameters(model)} == {name.removeprefix("before/") for name in case.tensors if name.startswith("before/")}
    assert adapter.pool.num_tasks == 2
    return model


def parameters(model: PromptPoolModel) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters under the fixtures' names."""
    pool, head = model.adapter.pool, model.adapter.head
    return {"prompt": pool.prompts, "key": pool.keys, "head.weight": head.weight, "head.bias": head.bias}


def by_class(model: PromptPoolModel, values: Tensor, dim: int = 0) -> Tensor:
    """Rows or columns of the head, in the fixtures' order of classes."""
    return values.index_select(dim, torch.tensor(model.classes).argsort())


def in_fixture_order(model: PromptPoolModel, name: str, values: Tensor) -> Tensor:
    return by_class(model, values) if name.startswith("head.") else values


CASES = ["l2p_pytorch", "l2p_pytorch_batchwise"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case.load(request.param)


def test_l2p_answers(case: Case) -> None:
    model = l2p_model(case).eval()
    with torch.no_grad():
        output = model(case.tensors["pixel_values"])
    case.close(output.query, "expected/query", "query")
    case.close(by_class(model, output.logits, 1), "expected/eval_logits", "eval_logits")
    chosen = case.tensors.get("expected/indices")
    if chosen is not None:
        assert torch.equal(output.prompt_ids, chosen)
        assert_close(
            output.prompt_weights,
            case.tensors["expected/similarity"].gather(1, chosen),
            atol=case.tolerance("similarity"),
            rtol=0,
        )
    else:
        assert torch.equal(output.prompt_ids.sort(1).values[0], case.tensors["expected/indices_voted"].flatten())


def test_l2p_trains(case: Case) -> None:
    model = l2p_model(case).train()
    about = case.about["optimizer"]
    images, labels = case.tensors["pixel_values"], case.tensors["labels"]
    optimizer = torch.optim.Adam(model.parameter_groups(lr=about["lr"]), betas=tuple(about["betas"]), eps=about["eps"])
    model.attach_optimizer(optimizer)
    first_gradients, losses = {}, []
    for step in range(about["steps"]):
        output = model(images, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        losses.append(output.loss.item())
        if step == 0:
            expected = case.about["expected_scalars"]
            for part, ours in (("ce", "cross_entropy"), ("key", "pull")):
                value = expected[f"loss/{part}"]
                assert output.losses[ours].item() == pytest.approx(value, abs=case.tolerance("loss", value))
            for name, parameter in parameters(model).items():
                gradient = in_fixture_order(model, name, parameter.grad)
                wanted = case.tensors[f"expected/grad/{name}"]
                allowed = case.tolerance("grad") * (wanted.abs().max().item() + 1e-3)
                assert_close(gradient, wanted, atol=allowed, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
                first_gradients[name] = wanted
        torch.nn.utils.clip_grad_norm_(list(parameters(model).values()), about["gradient_clipping"]["max_norm"])
        optimizer.step()
    for ours, wanted in zip(losses, case.about["expected_scalars"]["step_losses"], strict=True):
        assert ours == pytest.approx(wanted, abs=case.tolerance("step_losses", wanted))
    for name, parameter in parameters(model).items():
        clear = (first_gradients[name] == 0) | (first_gradients[name].abs() > 1e-5)
        after = in_fixture_order(model, name, parameter.detach())
        wanted = case.tensors[f"after/{name}"]
        assert_close(after[clear], wanted[clear], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        assert_close(after, wanted, atol=about["lr"], rtol=0)
