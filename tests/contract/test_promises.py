"""The promises of the design: one matrix, methods (methods.py) × families."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.families import build, inputs
from support.methods import EVERYWHERE, METHODS, VARIANTS, cells
from support.processes import in_a_new_process
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import PromptPoolModel, get_prompt_pool_model
from cl_prompts.backbones.fingerprint import fingerprint
from cl_prompts.methods.shared.per_task import PerTask


pytestmark = pytest.mark.by_turns(13)

FAMILIES = ["vit", "dinov2", "beit", "clip", "siglip"]
TASKS = [[3, 5], [40, 8], [2, 9]]

matrix = pytest.mark.parametrize(("method", "family"), cells(FAMILIES))
each_method = pytest.mark.parametrize("method", METHODS)


def learn(model: Any, tasks: list[list[int]], optimizer: Any = None, first: int = 0) -> None:
    """Three steps on each task, with weight decay; a given optimizer is kept over the tasks."""
    for number, classes in enumerate(tasks, start=first):
        model.begin_task(classes)
        new = torch.optim.AdamW(model.parameter_groups(learning_rate=0.02), weight_decay=0.1)
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
        for step in range(3):
            labels = torch.tensor([classes[i % len(classes)] for i in range(6)])
            values = inputs("vit", 6, seed=100 * number + step)
            model(**values, labels=labels, sample_ids=list(range(6 * step, 6 * step + 6))).loss.backward()
            used.step()
            used.zero_grad()
        model.end_task()
    model.eval()


def fresh(method: str, family: str) -> PromptPoolModel:
    base = build(family)
    torch.manual_seed(3)
    return get_prompt_pool_model(base, {**METHODS, **VARIANTS}[method]())


@cache
def trained(method: str, family: str) -> PromptPoolModel:
    """A model of three tasks. Tests that change it take a copy of their own."""
    model = fresh(method, family)
    learn(model, TASKS)
    return model


@torch.no_grad()
def logits(model: Any, images: Tensor, **more: Any) -> Tensor:
    answer: Tensor = model(images, **more).logits
    return answer


@matrix
def test_an_answer_does_not_depend_on_the_batch(method: str, family: str) -> None:
    model = trained(method, family)
    images = inputs(family, 5, seed=9)["pixel_values"]
    together = logits(model, images)
    assert together.shape == (5, 6)
    assert_close(together, torch.cat([logits(model, image[None]) for image in images]), atol=1e-5, rtol=0)
    # and the images do get different answers
    assert (together[0] - together[1]).abs().max() > 1e-4


@matrix
def test_an_answer_does_not_depend_on_labels(method: str, family: str) -> None:
    model = trained(method, family)
    images = inputs(family, 3, seed=9)["pixel_values"]
    assert torch.equal(logits(model, images), logits(model, images, labels=torch.tensor([2, 3, 40])))


@matrix
def test_off_is_off_and_the_backbone_is_never_changed(method: str, family: str) -> None:
    model, untouched = trained(method, family), build(family)
    base, structure = model.get_base_model(), model.base_model.structure
    for (name, ours), theirs in zip(base.state_dict().items(), untouched.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    print_ = fingerprint(base, structure, structure.pooling)
    assert print_ == model.adapter.config.state.base_fingerprint
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())
    assert not any(module.training for module in base.modules())
    values = inputs(family, 2, seed=9)
    with torch.no_grad(), model.disable_adapter():
        ours = model(**values).last_hidden_state
    with torch.no_grad():
        assert torch.equal(ours, untouched(**values).last_hidden_state)


@matrix
def test_every_trainable_tensor_learns(method: str, family: str) -> None:
    model = fresh(method, family)
    model.begin_task([0, 1])
    model.end_task()
    model.begin_task([2, 3])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(model.parameter_groups(learning_rate=1.0))
    model.attach_optimizer(optimizer)
    model.train()
    for _ in range(2):  # what lies before a projection that starts at zero learns from the second step on
        model(**inputs(family, 6), labels=torch.tensor([2, 3] * 3)).loss.backward()
        optimizer.step()
    after = dict(model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(after[name], value)]
    assert not still, "no gradient reached them"


def frozen_by(pool: Any, first: bool) -> dict[str, Tensor]:
    """What the pool keeps of its first task: as it was at that task's end (first=True), or later."""
    kept = {}
    for name, module in pool.named_modules():
        if isinstance(module, PerTask):
            kept[name] = module.current if first else module.earlier[0]
        elif name == "history":
            kept[name] = module.counts[0]
    if hasattr(pool, "old_routers"):
        kept["router"] = pool.router if first else pool.old_routers[0]
    return {name: tensor.detach().clone() for name, tensor in kept.items()}


@matrix
def test_what_a_method_freezes_stays_frozen(method: str, family: str) -> None:
    """Bit-equal after two later tasks, with AdamW, weight decay 0.1 and one optimizer kept over all tasks."""
    model = fresh(method, family)
    model.begin_task(TASKS[0])
    optimizer = torch.optim.AdamW(model.parameter_groups(learning_rate=0.02), weight_decay=0.1)
    model.attach_optimizer(optimizer)
    model.train()
    model(**inputs(family, 6), labels=torch.tensor([3, 5] * 3)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.end_task()
    pool = model.adapter.pool
    kept = frozen_by(pool, first=True)
    learn(model, TASKS[1:], optimizer, first=1)
    for name, tensor in frozen_by(pool, first=False).items():
        if name == "history":  # of prompts that were added later there is no use in the first task
            kept[name] = F.pad(kept[name], (0, tensor.shape[-1] - kept[name].shape[-1]))
        assert torch.equal(tensor, kept[name]), name
        if name != "history":
            assert not torch.equal(frozen_by(pool, first=True)[name], kept[name]), f"{name} does not learn"


@matrix
def test_training_goes_on_after_loading(method: str, family: str, tmp_path: Path) -> None:
    """A loaded adapter learns the next task exactly as the one that was saved."""
    model = fresh(method, family)
    learn(model, TASKS[:2])
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    for m in (model, loaded):
        torch.manual_seed(8)
        learn(m, TASKS[2:], first=2)
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def loads_bit_equal(folder: Path) -> None:
    for cell, wanted in torch.load(folder / "expected.pt").items():
        family = cell.rpartition("-")[2]
        model = PromptPoolModel.from_pretrained(build(family), folder / cell)
        assert model.classes == [3, 5, 40, 8, 2, 9], cell
        assert torch.equal(model(**inputs(family, 4, seed=5)).logits, wanted), cell


def test_save_and_load_in_a_new_process(tmp_path: Path) -> None:
    """All methods on ViT, some on SigLIP (no CLS token), saved here and loaded by one new process."""
    expected = {}
    for method, family in [*((name, "vit") for name in METHODS), *((name, "siglip") for name in EVERYWHERE)]:
        model = trained(method, family)
        cell = f"{method}-{family}"
        model.save_pretrained(tmp_path / cell)
        assert {p.name for p in (tmp_path / cell).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }
        state = json.loads((tmp_path / cell / "adapter_config.json").read_text())["state"]
        assert state["tasks"] == TASKS
        expected[cell] = logits(model, **{"images": inputs(family, 4, seed=5)["pixel_values"]})
    torch.save(expected, tmp_path / "expected.pt")
    assert len(expected) == len(METHODS) + len(EVERYWHERE)
    in_a_new_process(loads_bit_equal, tmp_path)


@each_method
def test_the_output_tells_what_was_chosen(method: str) -> None:
    """ids, weights and scores agree in shape, and the ids are prompts of the pool."""
    model = trained(method, "vit")
    with torch.no_grad():
        output = model(**inputs("vit", 3))
    if output.prompt_ids is None:
        assert not model.adapter.config.selects
        return
    assert output.prompt_ids.shape == output.prompt_weights.shape
    prompts = model.adapter.pool.prompt_table().shape[1]
    assert output.prompt_ids.min() >= 0
    assert output.prompt_ids.max() < prompts
    if output.scores is not None:
        assert output.scores.shape[-1] == prompts


@each_method
def test_a_plain_peft_model_is_the_same(method: str) -> None:
    """Loss, its parts and every gradient of `peft.get_peft_model` equal those of PromptPoolModel, in the second task."""
    values, labels = inputs("vit", 6), torch.tensor([2, 3] * 3)
    found = []
    for wrap in (get_prompt_pool_model, get_peft_model):
        base = build("vit")
        torch.manual_seed(3)
        model: Any = wrap(base, {**METHODS, **VARIANTS}[method]())
        tuner = model.base_model
        tuner.begin_task([0, 1])
        tuner.end_task()
        tuner.begin_task([2, 3])
        tuner.attach_optimizer(torch.optim.SGD(tuner.parameter_groups(learning_rate=1.0)))
        output = model.train()(**values, labels=labels)
        output.loss.backward()
        gradients = {name: p.grad for name, p in tuner.adapter.named_parameters()}
        found.append((output.losses, gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours == theirs
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert torch.equal(gradient, their_gradients[name]), name


@each_method
def test_answers_under_autocast_are_close(method: str) -> None:
    """bf16 in the backbone changes an answer by rounding only: selection and mixing stay in float32."""
    model = trained(method, "vit")
    images = inputs("vit", 3, seed=9)["pixel_values"]
    exact = logits(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = logits(model, images)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.25 * exact.abs().max()
