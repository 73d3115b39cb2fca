"""The table of prompt methods by name."""

from __future__ import annotations

from typing import NamedTuple

from peft import PeftConfig

from cl_prompts.methods.pool import PromptPool


class PromptMethod(NamedTuple):
    """A registered method: the class of its config and of its pool."""

    config_class: type[PeftConfig]
    pool_class: type[PromptPool]


METHODS: dict[str, PromptMethod] = {}


def register_prompt_method(name: str, config_class: type[PeftConfig], pool_class: type[PromptPool]) -> None:
    """Register a method, as `peft.utils.register_peft_method` registers a PEFT method.

    Args:
        name: the method's name, the default of its config's field `method`.
        config_class: the method's `PromptPoolConfig`.
        pool_class: the method's `PromptPool`, built as `pool_class(config, shape)`.

    Raises:
        ValueError: the name is registered already, or is not the default of `config_class.method`.
    """
    if name in METHODS:
        raise ValueError(
            f"method {name!r} is registered already, by {METHODS[name].config_class.__name__}: choose another name"
        )
    default = getattr(config_class, "method", None)
    if default != name:
        raise ValueError(f"{config_class.__name__} has method={default!r}: give this field the default {name!r}")
    METHODS[name] = PromptMethod(config_class, pool_class)
