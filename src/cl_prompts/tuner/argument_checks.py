"""Checks of what a caller names: adapters, configs, and modules of the base to train."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from torch import nn

from cl_prompts.backbones.structure import Structure, behind_the_feature
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runtime.text import short_repr


def check_adapter_name(name: Any) -> None:
    """Raise ValueError if an adapter cannot have a name, because modules and folders get it too."""
    if isinstance(name, str) and name and not set(name) & set("./\\") and not hasattr(nn.ModuleDict(), name):
        return
    other = re.sub(r"[./\\]", "_", name) if isinstance(name, str) else ""
    other = f"adapter_{name or 1}" if other in ("", name) else other
    is_folder = isinstance(name, str | os.PathLike) and os.path.isdir(name)
    order = " (it is a folder: the folder comes first, then the name)" if is_folder else ""
    raise ValueError(
        f"no adapter can be called {short_repr(name)}: modules and folders get its name, so it has no '.', '/' or '\\' and "
        f"is no attribute of a module; use {other!r}{order}"
    )


def chosen_adapter(names: Any, known: Collection[str]) -> str:
    """The name of the adapter to activate. A list may have one name, because one adapter answers at a time.

    Raises:
        ValueError: there are several names or none, or no adapter has that name.
    """
    listed = list(names) if isinstance(names, list | tuple | set) else [names]
    if len(listed) != 1:
        raise ValueError(f"set_adapter({short_repr(names)}): one adapter answers at a time, choose one of {sorted(known)}")
    if listed[0] not in known:
        raise ValueError(f"adapter {short_repr(listed[0])} does not exist; there are {sorted(known)}")
    return listed[0]


def check_config(config: Any) -> None:
    """Raise TypeError if a config is no `PromptPoolConfig`."""
    if isinstance(config, PromptPoolConfig):
        return
    if isinstance(config, str):
        raise TypeError(
            f"config is {config!r}, a name: pass PromptPoolConfig(method={config!r}), or the method's own config"
        )
    what = f"the class {config.__name__}" if isinstance(config, type) else f"a {type(config).__name__}"
    raise TypeError(f"config is {what}: pass a PromptPoolConfig, like L2PConfig()")


def check_modules_to_save(config: PromptPoolConfig, model: nn.Module, structure: Structure, pooling: str) -> None:
    """Raise ValueError if a name in `modules_to_save` is of no module that training can change.

    A name stands for all modules whose full name ends with it, as in PEFT.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    read = {pooling, config.readout}
    for end in config.modules_to_save or ():
        found = [name for name in modules if end and name.endswith(end)]
        where = f"modules_to_save={config.modules_to_save}: {end!r}"
        if not found:
            ends = {n.rpartition(".")[2] for n, module in modules.items() if any(True for _ in module.parameters())}
            known = sorted(name for name in ends if name and not name.isdecimal())
            raise ValueError(f"{where} is no module of {type(model).__name__}: name some of {short_repr(known)}")
        if not any(True for name in found for _ in modules[name].parameters()):
            raise ValueError(f"{where} has no parameters: name a module that has some")
        if all(_is_bypassed(model, name, structure, "pooler" in read) for name in found):
            raise ValueError(
                f"{where} is bypassed: the adapter's own head learns the classes, on features before it; leave it out"
            )
    every = [name for name in modules if any(end and name.endswith(end) for end in config.modules_to_save or ())]
    inside = [(inner, outer) for outer in every for inner in every if inner.startswith(f"{outer}.")]
    if inside:
        inner, outer = inside[0]
        raise ValueError(
            f"modules_to_save={config.modules_to_save} names {outer!r} and {inner!r} inside it, since a name stands for "
            f"all modules that end with it: name one of them only, for example {inner.rpartition('.')[2]!r}"
        )


def _is_bypassed(model: nn.Module, name: str, structure: Structure, pooler: bool) -> bool:
    """Whether a module comes after the features that the adapter reads."""
    inner = f"{structure.inner}." if structure.inner else ""
    if not name.startswith(inner):
        return True
    child = name.removeprefix(inner).partition(".")[0]
    return child in behind_the_feature(model, structure) and not (pooler and structure.pooler == f"{inner}{child}")
