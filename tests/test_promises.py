"""The promises of the design: one matrix, methods × families. A new method adds a line to METHODS."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs
from safetensors import safe_open
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.backbones.structure import fingerprint


METHODS: dict[str, Callable[[], Any]] = {
    "l2p": lambda: L2PConfig(top_k=3),
    "hash": lambda: HashPromptConfig(pool_size=6, top_k=2, history_top=2, layers=[0, 2]),
}
FAMILIES = ["vit", "dinov2", "siglip"]
TASKS = [[3, 5], [40, 8], [2, 9]]

pytestmark = [pytest.mark.parametrize("method", METHODS), pytest.mark.parametrize("family", FAMILIES)]


def learn(model: Any, tasks: list[list[int]], optimizer: Any = None, steps: int = 3) -> None:
    """A few steps on each task, with weight decay; a given optimizer is kept over the tasks."""
    for number, classes in enumerate(tasks):
        model.begin_task(classes)
        new = torch.optim.AdamW(model.parameter_groups(lr=0.02), weight_decay=0.1)
        if optimizer is not None:
            # An optimizer that is kept carries its momentum over for the parameters that stay.
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for group in new.param_groups:
                fresh = [p for p in group["params"] if id(p) not in known]
                if fresh:
                    optimizer.add_param_group({**group, "params": fresh})
        used = optimizer or new
        model.attach_optimizer(used)
        model.train()
        for step in range(steps):
            labels = torch.tensor([classes[i % len(classes)] for i in range(6)])
            values = inputs("vit", 6, seed=100 * number + step)
            model(**values, labels=labels, sample_ids=list(range(6 * step, 6 * step + 6))).loss.backward()
            used.step()
            used.zero_grad()
        model.end_task()
    model.eval()


def trained(method: str, family: str, tasks: list[list[int]] = TASKS) -> PromptPoolModel:
    torch.manual_seed(3)
    model = get_prompt_pool_model(build(family), METHODS[method]())
    learn(model, tasks)
    return model


def test_an_answer_does_not_depend_on_the_batch(method: str, family: str) -> None:
    model = trained(method, family)
    images = inputs(family, 5, seed=9)["pixel_values"]
    with torch.no_grad():
        together = model(images).logits
        alone = torch.cat([model(image[None]).logits for image in images])
    assert together.shape == (5, 6)
    assert_close(together, alone, atol=1e-5, rtol=0)
    # and the images do get different answers
    assert (together[0] - together[1]).abs().max() > 1e-4


def test_the_backbone_is_never_changed(method: str, family: str) -> None:
    base = build(family)
    model = get_prompt_pool_model(base, METHODS[method]())
    structure = model.base_model.structure
    before = fingerprint(base, structure, structure.pooling)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    learn(model, TASKS)
    assert fingerprint(base, structure, structure.pooling) == before == model.adapter.config.state.base_fingerprint
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())
    assert not any(module.training for name, module in base.named_modules() if name not in structure.blocks)
    with torch.no_grad():
        next(base.parameters()).add_(1e-3)
    assert fingerprint(base, structure, structure.pooling) != before


def test_every_trainable_tensor_learns(method: str, family: str) -> None:
    model = get_prompt_pool_model(build(family), METHODS[method]())
    model.begin_task([0, 1])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    learn_one = torch.optim.SGD(model.parameter_groups(lr=10.0))
    model.attach_optimizer(learn_one)
    model.train()
    model(**inputs(family, 6), labels=torch.tensor([0, 1] * 3)).loss.backward()
    learn_one.step()
    for name, parameter in model.named_parameters():
        if name in before:
            assert (parameter - before[name]).abs().max() > 0, f"{name} got no gradient"


def test_what_a_method_freezes_stays_frozen(method: str, family: str) -> None:
    """Bit-equal after later tasks, with AdamW, weight decay and one optimizer kept over all tasks."""
    torch.manual_seed(3)
    model = get_prompt_pool_model(build(family), METHODS[method]())
    model.begin_task(TASKS[0])
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.02), weight_decay=0.1)
    model.attach_optimizer(optimizer)
    model.train()
    model(**inputs(family, 6), labels=torch.tensor([3, 5] * 3)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.end_task()
    frozen = {"history": model.adapter.pool.history.counts.clone()}
    if method == "hash":
        frozen["router"] = model.adapter.pool.router.detach().clone()
    learn(model, TASKS[1:], optimizer)
    assert torch.equal(model.adapter.pool.history.counts[:1], frozen["history"])
    assert frozen["history"].sum() > 0
    if method == "hash":
        assert torch.equal(model.adapter.pool.old_routers[0], frozen["router"])
        assert not torch.equal(model.adapter.pool.router, frozen["router"])


def test_save_and_load_in_a_new_process(method: str, family: str, tmp_path: Path) -> None:
    model = trained(method, family)
    model.begin_task([77], class_names={77: "owl"})
    model.end_task()
    base = tmp_path / "base"
    model.get_base_model().save_pretrained(base)
    images = inputs(family, 4, seed=5)["pixel_values"]
    with torch.no_grad():
        torch.save({"images": images, "logits": model(images).logits}, tmp_path / "expected.pt")
    model.save_pretrained(tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    state = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["state"]
    assert state["tasks"] == [*TASKS, [77]]
    assert state["class_names"] == {"77": "owl"}
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        counts = [tensors.get_tensor(name) for name in tensors.keys() if "history" in name]  # noqa: SIM118
    assert [c.dtype for c in counts] == [torch.int64]
    program = f"""
import torch
from transformers import AutoModel
from cl_prompts import PromptPoolModel
expected = torch.load({str(tmp_path / "expected.pt")!r})
model = PromptPoolModel.from_pretrained(AutoModel.from_pretrained({str(base)!r}), {str(tmp_path / "adapter")!r})
assert model.classes == [3, 5, 40, 8, 2, 9, 77]
assert torch.equal(model(expected["images"]).logits, expected["logits"])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_goes_on_after_loading(method: str, family: str, tmp_path: Path) -> None:
    """A loaded adapter learns the next task exactly as the one that was saved."""
    model = trained(method, family, TASKS[:2])
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    for m in (model, loaded):
        torch.manual_seed(8)
        learn(m, TASKS[2:])
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
