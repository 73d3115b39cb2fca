"""The table of methods, and how a config finds its class."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from cl_prompts import L2PConfig, PromptPoolConfig, VPTConfig
from cl_prompts.methods import METHODS, L2PPool, VPTPool, register_prompt_method
from cl_prompts.runtime.peft_type import PEFT_TYPE


def test_a_name_stands_for_a_config_and_a_pool() -> None:
    assert METHODS["l2p"] == (L2PConfig, L2PPool)
    assert PromptPoolConfig(method="l2p", pool_size=7) == L2PConfig(pool_size=7)
    assert PromptPoolConfig.from_peft_type(method="vpt", deep=True) == VPTConfig(deep=True)
    with pytest.raises(ValueError, match=r"unknown method 'l3p': choose one of \['apt', 'coda', 'coda_layer_argmax', "):
        PromptPoolConfig(method="l3p")
    with pytest.raises(ValueError, match="L2PConfig is for method='l2p', not 'vpt'"):
        L2PConfig(method="vpt")
    with pytest.raises(ValueError, match=r"the file holds a VPTConfig \(method 'vpt'\), not a L2PConfig"):
        L2PConfig.from_peft_type(method="vpt")


def test_a_name_is_given_once_and_is_that_of_the_config() -> None:
    before = dict(METHODS)
    with pytest.raises(ValueError, match="method 'l2p' is registered already, by L2PConfig: choose another name"):
        register_prompt_method("l2p", L2PConfig, L2PPool)
    with pytest.raises(ValueError, match="VPTConfig has method='vpt': give this field the default 'vpt2'"):
        register_prompt_method("vpt2", VPTConfig, VPTPool)
    assert before == METHODS


def test_a_subclass_is_no_method_before_it_is_registered() -> None:
    @dataclass
    class Config(L2PConfig):
        method: str = "unregistered"

    with pytest.raises(ValueError, match="unknown method 'unregistered'"):
        PromptPoolConfig(method="unregistered")
    assert Config().method == "unregistered"


@pytest.mark.parametrize("search", ["torch", "faiss"])
def test_a_retired_field_of_a_file_is_ignored_silently(search: str, tmp_path: Path) -> None:
    """`search` never changed an answer; a warning would fail this test. It is no field any more."""
    values = {"peft_type": PEFT_TYPE, "method": "l2p", "pool_size": 7, "search": search}
    assert PromptPoolConfig.from_peft_type(**json.loads(json.dumps(values))) == L2PConfig(pool_size=7)
    with pytest.raises(TypeError, match="search"):
        L2PConfig(search=search)  # type: ignore[call-arg]
