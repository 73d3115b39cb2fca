"""Saving and loading with PEFT before 0.21, which asks no tuner for the names of its tensors in a file.

There, `get_peft_model_state_dict` and `set_peft_model_state_dict` decide by type. The functions here answer for models with
prompt pools and leave all others to PEFT's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from cl_prompts.runtime.peft_type import PEFT_TYPE
from cl_prompts.tuner.tuner import PromptPoolTuner


def replace_state_dict_functions() -> None:
    """Put the functions of this module wherever PEFT has imported its own."""
    from peft.utils import save_and_load

    for name, wrap in (("get_peft_model_state_dict", _saving_pools), ("set_peft_model_state_dict", _loading_pools)):
        of_peft = getattr(save_and_load, name)
        replaced = wrap(of_peft)
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] == "peft" and vars(module).get(name) is of_peft:
                setattr(module, name, replaced)


def _saving_pools(of_peft: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    @wraps(of_peft)
    def get_peft_model_state_dict(
        model: Any, state_dict: dict[str, Tensor] | None = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        config = model.peft_config[adapter_name]
        if config.peft_type != PEFT_TYPE:
            return of_peft(model, state_dict, adapter_name, *args, **kwargs)
        tensors = model.state_dict() if state_dict is None else state_dict
        pool = PromptPoolTuner._get_adapter_state_dict(model, config, adapter_name, tensors, [])
        saved = {PromptPoolTuner._remove_adapter_name_from_key(key, adapter_name): value for key, value in pool.items()}
        for name, module in _modules_to_save(model):
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            saved |= {f"{name}.{key}": value for key, value in module.adapter_state_dict(adapter_name, own).items()}
        return saved

    return get_peft_model_state_dict


def _loading_pools(of_peft: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(of_peft)
    def set_peft_model_state_dict(
        model: Any,
        peft_model_state_dict: dict[str, Tensor],
        adapter_name: str = "default",
        ignore_mismatched_sizes: bool = False,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> Any:
        config = model.peft_config[adapter_name]
        if config.peft_type != PEFT_TYPE:
            return of_peft(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage, **kwargs)
        tensors = dict(peft_model_state_dict)
        for name, module in _modules_to_save(model):
            for saved, own in module.adapter_state_dict_load_map(adapter_name).items():
                if f"{name}.{saved}" in tensors:
                    tensors[f"{name}.{own}"] = tensors.pop(f"{name}.{saved}")
        tensors = PromptPoolTuner._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        return model.load_state_dict(tensors, strict=False, assign=low_cpu_mem_usage)

    return set_peft_model_state_dict


def _modules_to_save(model: nn.Module) -> list[tuple[str, AuxiliaryTrainingWrapper]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
