"""What PEFT promises its users, row by row, for our string-typed method; run before a bound on PEFT is raised."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from families import build, inputs
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from cl_prompts import (
    AutoPromptPoolModel,
    HashPromptConfig,
    L2PConfig,
    PromptPoolConfig,
    PromptPoolModel,
    PromptPoolOutput,
    get_prompt_pool_model,
)


METHODS: dict[str, Callable[..., PromptPoolConfig]] = {
    "l2p": lambda **more: L2PConfig(pool_size=7, top_k=3, **more),
    "hash": lambda **more: HashPromptConfig(pool_size=7, layers=[0, 2], **more),
}
LEARNED = {
    "l2p": {"pool.prompts", "pool.keys", "head.weight", "head.bias"},
    "hash": {"pool.prompts", "pool.router", "head.weight", "head.bias"},
}
methods = pytest.mark.parametrize("method", METHODS)
heads = pytest.mark.parametrize("classifier", [False, True], ids=["bare", "classifier"])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learn(model: Any, classes: list[int], seed: int = 0) -> list[PromptPoolOutput]:
    """One task of two SGD steps; returns the outputs. Gradients of the last step stay."""
    model.begin_task(classes)
    model.train()
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.5))
    model.attach_optimizer(optimizer)
    outputs = []
    for step in range(2):
        optimizer.zero_grad()
        labels = torch.tensor([classes[0], classes[-1], classes[0]])
        outputs.append(model(**inputs("vit", seed=10 * seed + step), labels=labels))
        outputs[-1].loss.backward()
        optimizer.step()
    model.end_task()
    return outputs


@torch.no_grad()
def logits(model: Any, seed: int = 99) -> Tensor:
    answer: Tensor = model.eval()(**inputs("vit", seed=seed)).logits
    return answer


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders of a saved tiny ViT, bare and with a head: Auto classes load them without a network."""
    folder = tmp_path_factory.mktemp("bases")
    for classifier in (False, True):
        build("vit", classifier=classifier).save_pretrained(folder / str(classifier))
    return {classifier: folder / str(classifier) for classifier in (False, True)}


def load_base(bases: dict[bool, Path], classifier: bool = False) -> Any:
    return (T.ViTForImageClassification if classifier else T.ViTModel).from_pretrained(bases[classifier])


def trained(base: Any, method: str, **more: Any) -> Any:
    """A model of two tasks, classes out of order."""
    torch.manual_seed(3)
    model = get_prompt_pool_model(base, METHODS[method](**more))
    learn(model, [7, 3])
    learn(model, [1, 5], seed=1)
    return model


# ---- one behaviour, whoever wraps ------------------------------------------------------------------------------------


@heads
@methods
def test_plain_peft_model_learns_as_ours(method: str, classifier: bool) -> None:
    plain = get_peft_model(build("vit", classifier=classifier), METHODS[method]())
    ours = get_prompt_pool_model(build("vit", classifier=classifier), METHODS[method]())
    assert type(plain) is PeftModel
    assert type(ours) is PromptPoolModel
    for task, classes in enumerate(([7, 3], [1, 5])):
        rng = torch.get_rng_state()
        if task == 0:
            for model in (plain, ours):
                torch.set_rng_state(rng)
                model.begin_task([100])
                model.end_task()
            ours.load_state_dict(plain.state_dict())
        outputs = []
        for model in (plain, ours):
            torch.manual_seed(task)
            outputs.append(learn(model, classes, seed=task))
        for a, b in zip(*outputs, strict=True):
            assert type(a) is type(b) is PromptPoolOutput
            assert torch.equal(a.loss, b.loss)
            assert torch.equal(a.logits, b.logits)
            assert a.losses.keys() == b.losses.keys()
            assert all(torch.equal(a.losses[part], b.losses[part]) for part in a.losses)
            assert_close(sum(a.losses.values()), a.loss)
        grads, expected = ({n: p.grad for n, p in trainable(m).items()} for m in (plain, ours))
        assert {n.partition(".default.")[2] for n in grads} == LEARNED[method]
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert grad.abs().sum() > 0, name
            assert torch.equal(grad, expected[name]), name
    assert torch.equal(logits(plain), logits(ours))
    assert plain.classes == ours.classes == [100, 7, 3, 1, 5]
    for model in (plain, ours):
        base = [p for n, p in model.named_parameters() if ".prompt_pool." not in n]
        assert base
        assert all(p.grad is None and not p.requires_grad for p in base)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saver", [PeftModel, PromptPoolModel])
@heads
@methods
def test_saved_by_either_loads_with_all(
    method: str, classifier: bool, saver: type, bases: dict[bool, Path], tmp_path: Path
) -> None:
    model = trained(load_base(bases, classifier), method)
    expected, names = logits(model), trainable(model).keys()
    saver.save_pretrained(model, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    path = str(tmp_path / "adapter")
    for loader, kind in (
        (PeftModel, PeftModel),
        (PromptPoolModel, PromptPoolModel),
        (AutoPeftModel, PeftModel),
        (AutoPromptPoolModel, PromptPoolModel),
    ):
        for is_trainable in (False, True):
            base = [] if "Auto" in loader.__name__ else [load_base(bases, classifier)]
            loaded = loader.from_pretrained(*base, path, is_trainable=is_trainable)
            assert type(loaded) is kind
            assert type(loaded.get_base_model()) is type(model.get_base_model())
            assert loaded.classes == [7, 3, 1, 5]
            assert torch.equal(logits(loaded), expected)
            assert trainable(loaded).keys() == (names if is_trainable else set())
            if is_trainable:
                learn(loaded, [4, 2], seed=2)
                assert loaded.classes == [7, 3, 1, 5, 4, 2]
                assert all(p.grad is not None and p.grad.any() for p in trainable(loaded).values())


@methods
def test_low_memory_load(method: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    model = trained(load_base(bases), method)
    model.save_pretrained(tmp_path)
    for kind in (PeftModel, PromptPoolModel):
        loaded = kind.from_pretrained(load_base(bases), str(tmp_path), low_cpu_mem_usage=True)
        assert torch.equal(logits(loaded), logits(model))


def test_fresh_process_needs_the_import(bases: dict[bool, Path], tmp_path: Path) -> None:
    for method in METHODS:
        model = trained(load_base(bases), method)
        model.save_pretrained(tmp_path / method)
        torch.save(logits(model), tmp_path / f"{method}.pt")
    script = """
import sys
from pathlib import Path
import torch
from peft import AutoPeftModel
from families import inputs

folder = Path(sys.argv[1])
try:
    AutoPeftModel.from_pretrained(str(folder / "l2p"))
except KeyError as error:
    assert error.args == ("PROMPT_POOL",), error
else:
    raise AssertionError("loaded without the import")
import cl_prompts
for method in ("l2p", "hash"):
    for auto in (AutoPeftModel, cl_prompts.AutoPromptPoolModel):
        with torch.no_grad():
            logits = auto.from_pretrained(str(folder / method)).eval()(**inputs("vit", seed=99)).logits
        assert torch.equal(logits, torch.load(folder / f"{method}.pt")), method
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_method_chooses_the_config_class() -> None:
    assert PromptPoolConfig(method="l2p", pool_size=7) == L2PConfig(pool_size=7)
    assert type(PromptPoolConfig(method="hash", layers=[2])) is HashPromptConfig
    with pytest.raises(ValueError, match=r"unknown method 'l3p': choose one of \['hash', 'l2p'\]"):
        PromptPoolConfig(method="l3p")
    with pytest.raises(TypeError, match="layers"):
        L2PConfig(layers=[0])


@methods
def test_unknown_key_drops_no_other(method: str, tmp_path: Path) -> None:
    config = METHODS[method](max_adapter_bytes=12345678, strict_base=True, verify=False, class_mask="none")
    model = get_prompt_pool_model(build("vit"), config)
    model.begin_task([4, 2])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    assert not {"max_adapter_bytes", "strict_base", "verify"} & set(values)
    file.write_text(json.dumps({**values, "from_the_future": 1, "verify": False}))
    for kind in (PeftConfig, PromptPoolConfig, type(config)):
        with pytest.warns(UserWarning, match=r"unknown fields \['from_the_future', 'verify'\]"):
            read = kind.from_pretrained(str(tmp_path))
        assert type(read) is type(config)
        assert (read.pool_size, read.class_mask, read.state.tasks) == (7, "none", [[4, 2]])
        saved = read.to_dict()
        assert saved.pop("auto_mapping")["base_model_class"] == "ViTModel"
        assert saved == {n: v for n, v in model.peft_config["default"].to_dict().items() if n in saved} | {
            "inference_mode": True
        }
        assert (read.max_adapter_bytes, read.strict_base, read.verify) == (8 * 2**30, False, True)
    other = HashPromptConfig if method == "l2p" else L2PConfig
    with (
        pytest.warns(UserWarning, match="unknown fields"),
        pytest.raises(ValueError, match=f"holds a {type(config).__name__}"),
    ):
        other.from_pretrained(str(tmp_path))


@methods
def test_models_of_one_config_share_no_state(method: str) -> None:
    config = METHODS[method]()
    one, two = (wrap(build("vit"), config) for wrap in (get_prompt_pool_model, get_peft_model))
    one.begin_task([1])
    assert (one.classes, two.classes, config.state.tasks) == ([1], [], [])
    two.begin_task([2, 3])
    one.add_adapter("other", config)
    assert (one.classes, two.classes, config.state.tasks) == ([1], [2, 3], [])
    one.set_adapter("other")
    assert one.classes == []


# ---- modules_to_save -------------------------------------------------------------------------------------------------


@heads
@methods
def test_modules_to_save(method: str, classifier: bool, bases: dict[bool, Path], tmp_path: Path) -> None:
    model = trained(load_base(bases, classifier), method, modules_to_save=["layernorm"])
    copies = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert len(copies) == 2
    assert all(p.requires_grad and p.grad.any() for p in copies.values())
    own = load_base(bases, classifier).requires_grad_(False)
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
        loaded = kind.from_pretrained(load_base(bases, classifier), str(tmp_path))
        assert torch.equal(logits(loaded), expected)
        for name, parameter in copies.items():
            assert torch.equal(loaded.get_parameter(name), parameter)


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_several_adapters(bases: dict[bool, Path], tmp_path: Path) -> None:
    model = trained(load_base(bases), "l2p")
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

    loaded = PromptPoolModel.from_pretrained(load_base(bases), tmp_path)
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


@methods
def test_adapters_with_own_modules_to_save(method: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    model = trained(load_base(bases), method, modules_to_save=["layernorm"])
    model.add_adapter("second", METHODS[method](modules_to_save=["layernorm"]))
    first = logits(model)
    model.set_adapter("second")
    learn(model, [9, 8])
    second = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(load_base(bases), tmp_path)
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
def test_disable_adapter_keeps_gradient_flags(
    is_trainable: bool, bases: dict[bool, Path], tmp_path: Path
) -> None:
    trained(load_base(bases), "l2p", modules_to_save=["layernorm"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load_base(bases), str(tmp_path), is_trainable=is_trainable)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(flags.values()) == is_trainable
    expected = logits(model)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(logits(model), expected)


# ---- torch -----------------------------------------------------------------------------------------------------------


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
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@methods
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
        optimizer = torch.optim.SGD(m.parameter_groups(lr=0.5))
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


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    model = trained(build("vit"), "l2p")
    with pytest.raises(TypeError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert not (tmp_path / "pickle").exists()
    base = build("vit")
    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        peft.inject_adapter_in_model(L2PConfig(), base)
    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        base.add_adapter(L2PConfig())
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
