"""A LoRA inside the base and a pool on top: neither switches, trains or saves the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.closed_form_models import answers, learn_task
from support.families import build, inputs
from torch import Tensor

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model


LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(1)
    get_peft_model(build("vit"), LORA).save_pretrained(folder)
    return folder


def with_lora(lora: Path, way: str) -> Any:
    """A base with the LoRA inside, as PEFT or as transformers puts it there."""
    base = build("vit")
    if way == "transformers":
        base.load_adapter(lora)
        return base
    return PeftModel.from_pretrained(base, lora).get_base_model()


@torch.no_grad()
def features(base: Any) -> Tensor:
    found: Tensor = base(**inputs("vit")).last_hidden_state
    return found


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_a_pool_over_a_frozen_lora(lora: Path, way: str, tmp_path: Path) -> None:
    base = with_lora(lora, way)
    expected, configs = features(base), dict(base.peft_config) if way == "transformers" else None
    assert not torch.equal(expected, features(build("vit")))
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items() if "lora" in name}
    model = get_prompt_pool_model(base, HashPromptConfig(pool_size=6, top_k=2, layers=[0, 2]))
    assert not any("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    learn_task(model, [4, 2])
    model.add_adapter("second", L2PConfig(pool_size=5, top_k=2))
    learnt = answers(model)

    with model.disable_adapter():  # off is the base as it came, with its LoRA
        assert torch.equal(features(model), expected)
    model.set_adapter("second")
    learn_task(model, [0, 1, 5])
    with model.disable_adapter():
        assert torch.equal(features(model), expected)
    model.set_requires_grad("default", True)
    assert not any("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    assert answers(model).shape[1] == 3  # heads of different widths
    model.set_adapter("default")
    assert torch.equal(answers(model), learnt)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base.state_dict().items() if name in tensors)

    model.save_pretrained(tmp_path / "pool")
    again = PromptPoolModel.from_pretrained(with_lora(lora, way), tmp_path / "pool", strict_base=True)
    assert torch.equal(answers(again), learnt)
    with pytest.warns(UserWarning, match="other weights"):
        PromptPoolModel.from_pretrained(build("vit"), tmp_path / "pool")
    model.delete_adapter("second")
    assert torch.equal(features(model.unload()), expected)
    if configs is not None:
        assert base.peft_config == configs
        base.save_pretrained(tmp_path / "lora")
        assert torch.equal(features(with_lora(tmp_path / "lora", way)), expected)


def test_a_peft_model_is_no_base(lora: Path) -> None:
    wrapped = PeftModel.from_pretrained(build("vit"), lora)
    with pytest.raises(TypeError, match=r"the base is a PeftModel: pass model.get_base_model\(\), its LoRA stays inside"):
        get_prompt_pool_model(wrapped, L2PConfig())
    get_prompt_pool_model(wrapped.get_base_model(), L2PConfig(top_k=2))  # and PEFT warns of nothing
