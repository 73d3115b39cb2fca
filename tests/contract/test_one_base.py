"""Several models on one base: loads, failed loads and trained copies of the base's modules leave the others alone."""

from pathlib import Path

import pytest
import torch
from support.families import build, inputs

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model


CONFIGS = {"l2p": lambda: L2PConfig(), "hash": lambda: HashPromptConfig(layers=[0, 2], modulate="gradient")}
pytestmark = pytest.mark.parametrize("method", CONFIGS)


def learnt(method: str, **config: object) -> PromptPoolModel:
    torch.manual_seed(1)
    made = CONFIGS[method]()
    for name, value in config.items():
        setattr(made, name, value)
    model = get_prompt_pool_model(build("vit"), made)
    model.begin_task([0, 1])
    model.end_task()
    return model.eval()


@torch.no_grad()
def test_an_adapter_loads_onto_the_base_that_was_trained(method: str, tmp_path: Path) -> None:
    model = learnt(method)
    expected = model(**inputs("vit")).logits
    model.save_pretrained(tmp_path)
    vit = model.get_base_model()
    loaded = PromptPoolModel.from_pretrained(vit, tmp_path)
    assert torch.equal(loaded(**inputs("vit")).logits, expected)
    assert torch.equal(model(**inputs("vit")).logits, expected)
    again = PromptPoolModel.from_pretrained(vit, tmp_path)
    assert torch.equal(again(**inputs("vit")).logits, expected)
    assert len(vit._forward_hooks) == 1, "one set of hooks for all"


@torch.no_grad()
def test_a_failed_load_leaves_the_base_with_its_model(method: str, tmp_path: Path) -> None:
    model = learnt(method)
    expected = model(**inputs("vit")).logits
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="checksum"):
        PromptPoolModel.from_pretrained(model.get_base_model(), tmp_path)
    assert torch.equal(model(**inputs("vit")).logits, expected)
    assert model.get_base_model().peft_config is model.base_model.peft_config


@pytest.mark.parametrize("gone", ["unloaded", "forgotten"])
@torch.no_grad()
def test_modules_to_save_leave_with_their_model(method: str, gone: str) -> None:
    base = build("vit").requires_grad_(False)
    expected = base(**inputs("vit")).last_hidden_state
    model = learnt(method, modules_to_save=["layernorm"])
    vit = model.get_base_model()
    for name, parameter in vit.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(1.0)
    with pytest.raises(ValueError, match=r"this base belongs to several models.*unload\(\) the other model"):
        get_prompt_pool_model(vit, CONFIGS[method]())
    if gone == "unloaded":
        model.unload()
    else:
        del model
    other = get_prompt_pool_model(vit, CONFIGS[method]())
    with other.disable_adapter():
        assert torch.equal(other(**inputs("vit")).last_hidden_state, expected)
    assert torch.equal(other.unload()(**inputs("vit")).last_hidden_state, expected)
    assert set(vit.state_dict()) == set(base.state_dict())
