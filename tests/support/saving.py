"""Adapters to save and load, a user's own files beside them, and forks that save."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model
from support.families import build, inputs


KEPT = {"notes.txt": b"mine", "sub/table.csv": b"1,2"}


def adapter(seed: int) -> PromptPoolModel:
    """Adapters of two seeds have the same shapes and other values."""
    model = get_prompt_pool_model(build("vit"), L2PConfig(pool_size=4, top_k=2))
    torch.manual_seed(seed)
    model.begin_task([3, 1], class_names={3: f"of adapter {seed}"})
    with torch.no_grad():
        for parameter in model.base_model.adapter.parameters():
            parameter.normal_()
    model.end_task()
    return model.eval()


def answer(model: PromptPoolModel) -> Tensor:
    with torch.no_grad():
        return model(**inputs("vit")).logits


def loaded(folder: Path) -> Tensor:
    return answer(PromptPoolModel.from_pretrained(build("vit"), folder))


def class_names(model: PromptPoolModel) -> dict[str, str]:
    return model.base_model.adapter.config.state.class_names  # type: ignore[no-any-return]


def add_foreign_files(folder: Path) -> None:
    for name, content in KEPT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def foreign_files_are_there(folder: Path) -> bool:
    return all((folder / name).is_file() and (folder / name).read_bytes() == content for name, content in KEPT.items())


def forked(act: Callable[[], Any]) -> int:
    """Run `act` in a fork, which exits with 1 if it raises; the process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
    except BaseException:
        os._exit(1)
    os._exit(0)


def exit_code(pid: int) -> int:
    """The exit code of a fork that ends, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(act: Callable[[], Any]) -> int:
    """Run `act` in a fork; the exit code, or minus the signal that ended it."""
    return exit_code(forked(act))
