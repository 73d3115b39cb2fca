"""Registers the PEFT type `PROMPT_POOL`, so that PEFT's own classes load and save prompt pools."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runtime.peft_type import PEFT_TYPE
from cl_prompts.tuner.older_peft import replace_state_dict_functions
from cl_prompts.tuner.tuner import PromptPoolTuner


def register_peft_type() -> None:
    """Enter config and tuner into PEFT's mappings.

    PEFT's own `register_peft_method` needs an entry in its enumeration; the mappings themselves take any string.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = PromptPoolConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = PromptPoolTuner
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        replace_state_dict_functions()
