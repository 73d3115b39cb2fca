"""Saving and loading with PEFT before 0.21, which asks no tuner for the names of its tensors."""

import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import logits, trained
from support.families import build

from cl_prompts import PromptPoolModel
from cl_prompts.tuner.older_peft import replace_state_dict_functions


FUNCTIONS = ("get_peft_model_state_dict", "set_peft_model_state_dict")


@pytest.fixture
def replaced() -> Iterator[None]:
    """Our functions in place of PEFT's, as `import cl_prompts` puts them with PEFT before 0.21."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"]
    before = [(module, name, vars(module)[name]) for module in modules for name in FUNCTIONS if name in vars(module)]
    replace_state_dict_functions()
    assert len(before) > len(FUNCTIONS)
    assert all(vars(module)[name] is not function for module, name, function in before)
    yield
    for module, name, function in before:
        setattr(module, name, function)


@pytest.mark.by_turns(5, always=())
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["layernorm"]}], ids=["pool", "modules_to_save"])
@pytest.mark.parametrize("method", ["l2p", "hash"])
@pytest.mark.parametrize("loader", [PromptPoolModel, PeftModel])
def test_files_are_those_of_later_versions(
    loader: type[PeftModel], method: str, settings: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = trained(build("vit"), method, **settings)
    model.save_pretrained(tmp_path / "later")
    state = peft.get_peft_model_state_dict(model)
    request.getfixturevalue("replaced")
    older = peft.get_peft_model_state_dict(model)
    assert older.keys() == state.keys()
    assert all(torch.equal(older[name], state[name]) for name in state if name.rpartition(".")[2] != "_extra_state")
    model.save_pretrained(tmp_path / "older")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("later", "older")]
    assert files[0] == files[1]
    for low in (False, True):
        loaded = loader.from_pretrained(build("vit"), tmp_path / "older", low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.usefixtures("replaced")
def test_other_adapters_stay_with_peft(tmp_path: Path) -> None:
    model = get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("vit"), tmp_path)
    state, again = (peft.get_peft_model_state_dict(m) for m in (model, loaded))
    assert state.keys() == again.keys()
    assert state
    assert all(torch.equal(state[name], again[name]) for name in state)
