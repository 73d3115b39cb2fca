"""Checkpoints of a run: tensors in safetensors, the rest in JSON, no pickle, no copy of the backbone.

A checkpoint is a folder `<number>` that is filled beside its place and renamed into it. `manifest.json` holds the sha256
of each file, so that a damaged one is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from cl_prompts.storage.disk_full import explain_disk_full
from cl_prompts.storage.staging import finish_interrupted_save, staging_folder


TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "manifest.json"


class Checkpoints:
    """The checkpoints of one run, the newest few kept.

    Args:
        folder: where they lie.
        keep: how many are kept.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def save(self, number: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove those that are no longer kept; returns its folder."""
        target = self.folder / f"{number:09d}"
        # A file holds each tensor once, whole: views and shared storage become copies.
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        files = {TENSORS: save(own), VALUES: json.dumps(values).encode()}
        files[MANIFEST] = json.dumps({name: _sha256(content) for name, content in files.items()}).encode()
        with explain_disk_full(target), staging_folder(target) as staging:
            for name, content in files.items():
                (staging / name).write_bytes(content)
        for old in self._folders()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and values of the newest whole checkpoint, None without one; damaged ones are skipped with a warning."""
        for folder in self._folders():
            finish_interrupted_save(folder)
            try:
                manifest = json.loads((folder / MANIFEST).read_text())
                contents = {name: (folder / name).read_bytes() for name in (TENSORS, VALUES)}
                damaged = [name for name, content in contents.items() if manifest.get(name) != _sha256(content)]
                if damaged:
                    raise ValueError(f"{damaged} do not match {MANIFEST}")
                return load(contents[TENSORS]), json.loads(contents[VALUES])
            except (OSError, ValueError, AttributeError) as error:
                warnings.warn(f"checkpoint {folder} is damaged ({error}): trying the one before", stacklevel=2)
        return None

    def clear(self) -> None:
        """Remove all checkpoints, and nothing else that lies there."""
        for folder in self._folders():
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((f for f in self.folder.iterdir() if f.name.isdigit()), reverse=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of this process's random number generators (torch, each CUDA device, numpy, Python): tensors and values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    tensors["python"] = torch.tensor(numbers, dtype=torch.int64)
    values = {"numpy": [int(position), int(has_gauss), float(cached)], "python": [version, gauss]}
    return tensors, values


def set_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put this process's random number generators where `random_state` found them."""
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[f"cuda.{i}"] for i in range(sum(name.startswith("cuda.") for name in tensors))]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    position, has_gauss, cached = values["numpy"]
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: tensors "<parameter number>.<key>", and its other values."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{key}"] = value
            else:
                scalars[f"{number}.{key}"] = value
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def set_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Give an optimizer over the same parameters the state that `optimizer_state` found."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *values["scalars"].items()]:
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under longer names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
