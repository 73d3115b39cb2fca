"""What a caller names: the base, the config, adapters, modules to train. It is accepted, or one line says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image as PILImage
from support.base_condition import condition
from support.families import build, inputs
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTModel

from cl_prompts import AutoPromptPoolModel, L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.baselines import get_baseline
from cl_prompts.continual import evaluate


IMAGES = inputs("vit", 4)["pixel_values"]
LABELS = torch.tensor([0, 1, 0, 1])


def new_model(**config: Any) -> PromptPoolModel:
    return get_prompt_pool_model(build("vit"), L2PConfig(top_k=2, **config))


def learnt(**config: Any) -> PromptPoolModel:
    model = new_model(**config)
    model.begin_task([0, 1])
    model.train()
    model(IMAGES, labels=LABELS).loss.backward()
    model.end_task()
    return model.eval()


# ---- base and config


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: get_prompt_pool_model("google/vit", L2PConfig()),
            r"the base is 'google/vit', a name: load it first, .*AutoM",
        ),  # type: ignore[arg-type]
        (lambda: PromptPoolModel.from_pretrained("google/vit", "folder"), "the base is 'google/vit', a name"),  # type: ignore[arg-type]
        (lambda: get_baseline("er", "google/vit"), "the base is 'google/vit', a name"),  # type: ignore[arg-type]
        (lambda: get_prompt_pool_model(None, L2PConfig()), "the base is a NoneType: pass a model first"),  # type: ignore[arg-type]
        (lambda: get_prompt_pool_model(ViTModel, L2PConfig()), "the base is the class ViTModel: pass a model"),  # type: ignore[arg-type]
        (lambda: get_prompt_pool_model(L2PConfig(), build("vit")), "the base is a L2PConfig: pass a model first"),  # type: ignore[arg-type]
        (
            lambda: get_prompt_pool_model(build("vit"), "l2p"),
            r"config is 'l2p', a name: pass PromptPoolConfig\(method='l2p'\)",
        ),  # type: ignore[arg-type]
        (lambda: get_prompt_pool_model(build("vit"), L2PConfig), "config is the class L2PConfig: pass a PromptPoolConfig"),  # type: ignore[arg-type]
        (lambda: get_prompt_pool_model(build("vit"), {"method": "l2p"}), "config is a dict: pass a PromptPoolConfig"),  # type: ignore[arg-type]
        (lambda: PromptPoolModel.from_pretrained(build("vit"), None), "the adapter is a NoneType: name its folder"),  # type: ignore[arg-type]
        (lambda: AutoPromptPoolModel.from_pretrained(build("vit")), "the adapter is a ViTModel: name its folder"),
        (lambda: learnt().add_adapter("cars", "l2p"), "config is 'l2p', a name"),  # type: ignore[arg-type]
        (lambda: learnt().add_adapter("cars", LoraConfig()), "config is a LoraConfig: pass a PromptPoolConfig"),  # type: ignore[arg-type]
        (lambda: learnt().base_model.merge_adapter(), "prompts cannot be merged"),
        (lambda: learnt()(PILImage.new("RGB", (32, 32))), "got Image: the base's image processor makes one"),
        (lambda: learnt()({"pixel_values": IMAGES}), r"got dict: pass model\(\*\*inputs\)"),
    ],
)
def test_what_is_no_base_config_or_image(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


# ---- names of adapters


@pytest.mark.filterwarnings("ignore:Adapter name")
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("v1.0", "v1_0"),
        ("..", "__"),
        ("a/b", "a_b"),
        ("", "adapter_1"),
        ("keys", "adapter_keys"),
        ("train", "adapter_train"),
    ],
)
def test_names_that_no_adapter_can_have(name: str, other: str, tmp_path: Path) -> None:
    model = learnt()
    model.save_pretrained(tmp_path)
    before = model(IMAGES).logits
    for call in (
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.add_adapter(name, L2PConfig(top_k=2)),
        lambda: get_prompt_pool_model(build("vit"), L2PConfig(), adapter_name=name),
    ):
        with pytest.raises(ValueError, match=f"no adapter can be called {name!r}: .*; use {other!r}"):
            call()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IMAGES).logits, before)
    model.load_adapter(tmp_path, other)
    model.set_adapter(other)
    assert torch.equal(model(IMAGES).logits, before)


def test_arguments_in_the_wrong_order(tmp_path: Path) -> None:
    model = learnt()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no adapter can be called .* \(it is a folder: the folder comes first"):
        model.load_adapter("cars", str(tmp_path))
    with pytest.raises(ValueError, match="no adapter can be called L2PConfig"):
        model.add_adapter(L2PConfig(), "cars")  # type: ignore[arg-type]
    assert list(model.peft_config) == ["default"]


def test_names_of_adapters_that_do_not_exist(tmp_path: Path) -> None:
    model = learnt()
    with pytest.raises(ValueError, match=r"'cars' does not exist; there are \['default'\]"):
        model.base_model.set_requires_grad(["default", "cars"])
    with pytest.raises(ValueError, match=r"selected_adapters=\[\] would save nothing: name some of \['default'\]"):
        model.save_pretrained(tmp_path / "new", selected_adapters=[])
    assert not (tmp_path / "new").exists()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"no adapter is called \['cars'\]"):
        model(IMAGES, adapter_names=["default", "default", "default", "cars"])


def test_one_adapter_answers_at_a_time() -> None:
    """A second name was ignored: the first adapter answered for both."""
    model = learnt()
    model.add_adapter("cars", L2PConfig(top_k=2))
    for either in (model, model.base_model):
        for wrong in (["default", "cars"], []):
            with pytest.raises(ValueError, match=r"one adapter answers at a time, choose one of \['cars', 'default'\]"):
                either.set_adapter(wrong)
        for wrong in ("boats", ["boats"], None):
            with pytest.raises(ValueError, match=r"does not exist; there are \['cars', 'default'\]"):
                either.set_adapter(wrong)
        assert model.active_adapters == ["default"]
        either.set_adapter(["cars"])
        assert model.active_adapters == ["cars"]
        either.set_adapter("default")
    assert model(IMAGES).logits.shape == (4, 2)


# ---- training what was loaded for inference


@pytest.mark.parametrize("modules", [None, ["layernorm"]])
def test_begin_task_makes_a_loaded_adapter_trainable(modules: list[str] | None, tmp_path: Path) -> None:
    learnt(modules_to_save=modules).save_pretrained(tmp_path)
    model = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    model.begin_task([2, 3])
    model.train()
    model(IMAGES, labels=LABELS + 2).loss.backward()
    groups = {group["name"]: group["params"] for group in model.parameter_groups(0.1)}
    assert groups.keys() == {"prompts", "keys", "head"} | ({"base"} if modules else set())
    assert all(p.grad is not None for parameters in groups.values() for p in parameters)


def test_training_without_a_task_needs_is_trainable(tmp_path: Path) -> None:
    new_model(num_labels=2, class_mask="none").save_pretrained(tmp_path)
    model = PromptPoolModel.from_pretrained(build("vit"), tmp_path).train()
    for call in (lambda: model(IMAGES, labels=LABELS), lambda: model.parameter_groups(0.1)):
        with pytest.raises(ValueError, match="was loaded for inference: load it with is_trainable=True to train it"):
            call()


# ---- modules to train


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_a_block_can_be_trained(family: str, tmp_path: Path) -> None:
    name = new_model().structure.blocks[0] if family == "vit" else "encoder.layer.0"
    model = get_prompt_pool_model(build(family), L2PConfig(top_k=2, modules_to_save=[name]))
    model.begin_task([0, 1])
    model.train()
    model(IMAGES, labels=LABELS).loss.backward()
    trained = [p for p in model.get_base_model().parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained)
    model.end_task()
    model.eval().save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build(family), tmp_path)
    assert torch.allclose(loaded(IMAGES).logits, model(IMAGES).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "classifier", "message"),
    [
        (["encoder"], False, r"'encoder' is no module of ViTModel: name some of \['attention', .*'layernorm'"),
        (["layernorm", "encoder"], False, "'encoder' is no module"),
        ([""], False, "'' is no module"),
        (["dropout"], False, "'dropout' has no parameters"),
        (["pooler"], False, "'pooler' is bypassed: the adapter's own head learns the classes.*; leave it out"),
        (["classifier"], True, "'classifier' is bypassed"),
        (
            ["embeddings"],
            False,
            "names 'embeddings' and 'embeddings.patch_embeddings' inside it.*for example 'patch_embeddings'",
        ),
        (["layers.0", "layers.0.mlp"], False, "names 'layers.0' and 'layers.0.mlp' inside it"),
    ],
)
def test_modules_that_cannot_be_trained(modules: list[str], classifier: bool, message: str) -> None:
    base = build("vit", classifier=classifier)
    before = condition(base)
    with pytest.raises(ValueError, match=message):
        get_prompt_pool_model(base, L2PConfig(modules_to_save=modules))
    assert condition(base) == before


# ---- batches


def test_batches_of_a_data_loader() -> None:
    model = learnt()
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 2)
    assert evaluate(model, loader, model.classes, "cpu").images == 4
    fitted = new_model(head="discriminant")
    fitted.begin_task([0, 1])
    fitted.consolidate(loader)  # type: ignore[arg-type]
    fitted.end_task()
    for wrong in (IMAGES, {"image": IMAGES}, [IMAGES]):
        with pytest.raises(TypeError, match=r"give batches with pixel_values and labels.*, or pairs"):
            evaluate(model, [wrong], model.classes, "cpu")
