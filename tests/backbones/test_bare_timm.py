"""Bare models of timm, and of its layout, as bases: what a user sees of the wrapper, and files."""

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from backbones.test_timm import NO_TIMM, SMALL, bare
from support.families import inputs
from support.timm_layout import VisionTransformer
from torch import nn

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.backbones.timm_models import wrapped_if_bare
from cl_prompts.baselines import get_baseline


LABELS = torch.tensor([0, 1])
SETTINGS = {"pool_size": 4, "top_k": 2, "prompt_length": 2}


def taught(base: Any) -> Any:
    model = get_prompt_pool_model(base, L2PConfig(**SETTINGS))
    model.begin_task([0, 1])
    model.train()(**inputs("vit", 2), labels=LABELS).loss.backward()
    model.end_task()
    return model.eval()


def bare_twice(name: str) -> tuple[Any, Any]:
    """A model without and one with a classifier, of the same weights."""
    with_head = bare(name, num_classes=7).eval()
    without = copy.deepcopy(with_head)
    without.head, without.num_classes = nn.Identity(), 0
    return without, with_head


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "gap", "vit", "siglip"])
def test_a_bare_model_of_timm_is_a_base_and_is_given_back(name: str) -> None:
    images = inputs("vit", 2)["pixel_values"]
    for base in bare_twice(name):
        # torch rounds a linear layer of an expanded input otherwise if its weights are trainable.
        base.requires_grad_(False)
        own, forward = base(images), type(base).forward
        with torch.enable_grad():
            model, other = taught(base), get_prompt_pool_model(base, HashPromptConfig(layers=[0, 2]))
        assert model.get_base_model() is other.get_base_model()
        assert model.get_base_model().timm_model is base
        with model.disable_adapter():
            off = model(images)
        assert torch.equal(off["logits" if "logits" in off else "pooler_output"], own)
        assert model.unload() is base
        assert other.unload() is base
        assert torch.equal(base(images), own)
        assert type(base).forward is forward
        assert not any(hasattr(module, "_cl_norm") or module._forward_hooks for module in base.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "vit", "eva02"])
def test_an_adapter_of_a_bare_model_loads_on_bare_models_and_on_the_wrapper(name: str, tmp_path: Path) -> None:
    images = inputs("vit", 2)["pixel_values"]
    without, with_head = bare_twice(name)
    with torch.enable_grad():
        model = taught(with_head)
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] is None
    kind = "TimmWrapperModel" if name == "eva02" else "TimmWrapperForImageClassification"  # timm's weights have no head
    assert saved["auto_mapping"]["base_model_class"] == kind
    assert f"not on the Hub ({kind}, 3 blocks" in (tmp_path / "README.md").read_text()

    bases = [copy.deepcopy(without), copy.deepcopy(without), wrapped_if_bare(without)]
    assert type(bases[2]).__name__ == "TimmWrapperModel"
    for load, base in zip((PromptPoolModel, peft.PeftModel, PromptPoolModel), bases, strict=True):
        loaded = load.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(pixel_values=images).logits, expected)
    bases[0].blocks[0].norm1.weight.data += 1
    with pytest.raises(ValueError, match="other weights"):
        PromptPoolModel.from_pretrained(bases[0], tmp_path, strict_base=True)


@torch.no_grad()
def test_a_bare_model_outlives_the_models_made_of_it() -> None:
    """Also where the garbage collector has run: the hooks on its blocks belong to a wrapper that stays with it."""
    images, base = inputs("vit", 2)["pixel_values"], bare("plain")
    expected = base(images)
    for _ in range(2):
        with torch.enable_grad():
            model = taught(base)
        assert model.get_base_model() is wrapped_if_bare(base)
        twin = copy.deepcopy(base)
        del model
        gc.collect()
        assert torch.equal(base(images), expected)
        assert torch.equal(twin(images), expected)
        with torch.enable_grad():
            taught(twin)
    freed = weakref.ref(base)
    del base, twin
    gc.collect()
    assert freed() is None


def test_peft_and_comparison_learners_take_a_bare_model() -> None:
    base = bare("plain")
    model = peft.get_peft_model(base, L2PConfig(**SETTINGS, num_labels=2, class_mask="none")).eval()
    assert model(**inputs("vit", 2)).logits.shape == (2, 2)
    assert model.base_model.unload() is base
    lora = peft.get_peft_model(bare("plain"), peft.LoraConfig(target_modules=["qkv"]))
    assert taught(lora.get_base_model())(**inputs("vit", 2)).logits.shape == (2, 2)
    learner = get_baseline("finetune", bare("plain"))
    learner.begin_task([0, 1])
    assert learner(**inputs("vit", 2), labels=LABELS).loss.isfinite()


class Convolutions(VisionTransformer):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.stem = nn.Conv2d(3, 8, 3)


def test_other_models_of_timm_are_refused_by_their_own_name() -> None:
    with pytest.raises(TypeError, match=r"^Convolutions is not supported: it has no list of transformer blocks"):
        get_prompt_pool_model(Convolutions(), L2PConfig())


def test_a_failed_wrap_leaves_a_bare_model_as_it_was() -> None:
    base = bare("plain")
    attributes = set(vars(base))
    with pytest.raises(ValueError, match="layers"):
        get_prompt_pool_model(base, HashPromptConfig(layers=[9]))
    assert set(vars(base)) == attributes
    assert all(p.requires_grad for p in base.parameters())
    assert not any(hasattr(module, "_cl_norm") or module._forward_hooks for module in base.modules())


@pytest.mark.parametrize(
    ("arguments", "trained", "name", "model_args"),
    [
        ({}, True, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", None),
        ({}, False, "", None),
        ({"img_size": 32}, True, "", {"img_size": [32, 32]}),
        ({"num_heads": 6}, True, "", None),
        (SMALL, True, "", None),
    ],
)
def test_the_wrapper_names_weights_of_the_hub(
    arguments: dict[str, Any], trained: bool, name: str, model_args: Any, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm", reason=NO_TIMM, exc_type=ImportError)
    base = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments).eval()
    if trained:
        nn.init.normal_(base.norm.bias)
    wrapper: Any = wrapped_if_bare(base)
    assert (wrapper.name_or_path, wrapper.config.model_args) == (name, model_args)
    if model_args:
        wrapper.save_pretrained(tmp_path)
        again = T.AutoModelForImageClassification.from_pretrained(tmp_path)
        assert all(torch.equal(t, again.state_dict()[n]) for n, t in wrapper.state_dict().items())
        assert T.AutoImageProcessor.from_pretrained(tmp_path).data_config["input_size"] == (3, 32, 32)
