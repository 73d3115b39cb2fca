"""What PEFT promises beside one adapter: several of them, `modules_to_save`, copies, compiling, checkpointing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.adapters import METHODS, heads, learn, logits, methods, trainable, trained
from support.families import build, inputs
from torch.testing import assert_close

from cl_prompts import PromptPoolModel


# ---- modules_to_save ------------------------------------------------------------------------------------------------


@heads
@methods
def test_modules_to_save(method: str, classifier: bool, tmp_path: Path) -> None:
    model = trained(build("vit", classifier=classifier), method, modules_to_save=["layernorm"])
    copies = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert len(copies) == 2
    assert all(p.requires_grad and p.grad.any() for p in copies.values())
    own = build("vit", classifier=classifier).requires_grad_(False)
    before = dict(own.named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if ".modules_to_save." not in name:
            assert torch.equal(parameter, before[name.replace(".original_module.", ".")]), name
    for name, parameter in copies.items():
        key = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        assert not torch.equal(parameter, before[key]), "the copy was not trained"
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        for a, b in zip(model(**inputs("vit")).to_tuple(), own(**inputs("vit")).to_tuple(), strict=True):
            assert torch.equal(a, b)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for kind in (PeftModel, PromptPoolModel):
        loaded = kind.from_pretrained(build("vit", classifier=classifier), str(tmp_path))
        assert torch.equal(logits(loaded), expected)
        for name, parameter in copies.items():
            assert torch.equal(loaded.get_parameter(name), parameter)


# ---- several adapters -----------------------------------------------------------------------------------------------


def test_several_adapters(tmp_path: Path) -> None:
    model = trained(build("vit"), "l2p")
    model.add_adapter("second", METHODS["hash"]())
    assert all(".default." in name for name in trainable(model)), "a new adapter waits until it is chosen"
    first = logits(model)
    model.set_adapter("second")
    learn(model, [9, 8, 6])
    second = logits(model)
    assert (first.shape, second.shape) == ((3, 4), (3, 3))
    assert all(".second." in name for name in trainable(model))
    for name, classes, expected in (("default", [7, 3, 1, 5], first), ("second", [9, 8, 6], second)):
        model.set_adapter(name)
        assert model.active_adapter == name
        assert model.classes == classes
        assert torch.equal(logits(model), expected)
        status = model.get_model_status()
        assert (status.active_adapters, status.available_adapters) == ([name], ["default", "second"])
        assert status.enabled is True
        assert status.trainable_params == sum(p.numel() for p in trainable(model).values()) > 0
        (layer,) = model.get_layer_status()
        assert (layer.active_adapters, layer.enabled) == ([name], True)

    model.save_pretrained(tmp_path)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors"))
    assert files == ["adapter_model.safetensors", "second/adapter_model.safetensors"]
    root, prefix = tmp_path / files[0], "base_model.pools.prompt_pool."
    assert {"pool.keys", "pool.prompts"} < {name.removeprefix(prefix) for name in load_file(root)}
    for file, adapter in zip(files, ("default", "second"), strict=True):
        own = model.base_model.pools.prompt_pool[adapter].state_dict()
        saved = load_file(tmp_path / file)
        assert saved.keys() == {prefix + name for name in own}
        assert all(torch.equal(saved[prefix + name], tensor) for name, tensor in own.items())

    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    assert list(loaded.peft_config) == ["default"]
    loaded.load_adapter(str(tmp_path / "second"), "again")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), second)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), second)
    assert not any(".default." in name for name in loaded.state_dict())

    model.set_adapter("second")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), first)
    assert trainable(model), "the adapter that takes over can be trained"
    learn(model, [2, 4], seed=5)
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")
    with pytest.raises(ValueError, match="second"):
        model.delete_adapter("second")


def test_tensors_of_other_tasks_are_not_taken_in(tmp_path: Path) -> None:
    """PEFT reads only the tensors when the name is taken; the columns would then mean other classes."""
    model = trained(build("vit"), "l2p")
    model.save_pretrained(tmp_path)
    expected = logits(model)
    learn(model, [2], seed=2)
    with pytest.raises(ValueError, match=r"knows the tasks \[\[7, 3\], \[1, 5\], \[2\]\], the one in .* under another"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "earlier")
    model.set_adapter("earlier")
    assert torch.equal(logits(model), expected)


@methods
def test_adapters_with_own_modules_to_save(method: str, tmp_path: Path) -> None:
    model = trained(build("vit"), method, modules_to_save=["layernorm"])
    model.add_adapter("second", METHODS[method](modules_to_save=["layernorm"]))
    first = logits(model)
    model.set_adapter("second")
    learn(model, [9, 8])
    second = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    loaded.load_adapter(str(tmp_path / "second"), "second")
    for either in (model, loaded):
        either.set_adapter("default")
        assert torch.equal(logits(either), first)
        either.set_adapter("second")
        assert torch.equal(logits(either), second)
        with pytest.warns(UserWarning, match="Setting active adapter to default"):
            either.delete_adapter("second")
        assert torch.equal(logits(either), first)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_disable_adapter_keeps_gradient_flags(is_trainable: bool, tmp_path: Path) -> None:
    trained(build("vit"), "l2p", modules_to_save=["layernorm"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("vit"), str(tmp_path), is_trainable=is_trainable)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(flags.values()) == is_trainable
    expected = logits(model)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(logits(model), expected)


# ---- torch ----------------------------------------------------------------------------------------------------------


@methods
def test_copies_are_independent(method: str) -> None:
    model = trained(build("vit"), method)
    twin = copy.deepcopy(model)
    expected = logits(model)
    assert torch.equal(logits(twin), expected)
    learn(twin, [2, 4], seed=4)
    assert twin.classes == [7, 3, 1, 5, 2, 4]
    assert model.classes == [7, 3, 1, 5]
    assert torch.equal(logits(model), expected)
    learned = logits(twin)
    del model.base_model.pools.prompt_pool["default"]  # a hook still bound to the original would miss it
    assert torch.equal(logits(twin), learned)


# dynamo itself looks at the .grad of tensors it traces
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("method", [pytest.param("l2p", marks=pytest.mark.slow), "hash"])
def test_whole_model_compiles_within_a_task(method: str) -> None:
    torch._dynamo.reset()
    model = trained(build("vit"), method)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(logits(compiled), logits(model), atol=1e-6, rtol=0)

    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    model.begin_task([2, 4])
    twin.begin_task([2, 4])
    twin.load_state_dict(model.state_dict())
    results = []
    for m, forward in ((model, model), (twin, compiled)):
        m.train()
        optimizer = torch.optim.SGD(m.parameter_groups(learning_rate=0.5))
        m.attach_optimizer(optimizer)
        losses = []
        for step in range(2):
            optimizer.zero_grad()
            loss = forward(**inputs("vit", seed=step), labels=torch.tensor([2, 4, 4])).loss
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
        results.append((losses, {n: p.grad for n, p in trainable(m).items()}, m.state_dict()))
    for eager, fast in zip(*results, strict=True):
        assert_close(fast, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@methods
def test_gradient_checkpointing(method: str, when: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = build("vit")
        if checkpointing and when == "before":
            base.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model = get_peft_model(base, METHODS[method](modulate="gradient") if method == "hash" else METHODS[method]())
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable()
        calls: list[int] = []
        base.layers[2].layernorm_before.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.begin_task([0, 1])
        loss = model.train()(**inputs("vit"), labels=torch.tensor([0, 1, 1])).loss
        before = len(calls)
        loss.backward()
        assert (len(calls) > before) == checkpointing
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
