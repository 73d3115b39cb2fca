"""Tensors of a checkpoint file by name. No code of a file is run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_prompts.runtime.text import first_line, short_repr
from cl_prompts.storage.bounded_read import MAX_BASE_CONFIG_BYTES, read_json_object


WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder as timm puts it on the Hub


def find_checkpoint(source: str | Path) -> Path:
    """The checkpoint file that a path names: itself, or the weights in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise FileNotFoundError(f"{source} has none of {', '.join(WEIGHTS)}: name the checkpoint file")
    raise FileNotFoundError(f"there is no checkpoint {source}: name a file that lies on this machine")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.npz`, `.safetensors` or torch file; names of nested dictionaries are joined by dots.

    Torch files are read with `weights_only=True`.

    Raises:
        ValueError: the file is damaged, holds no tensors, or asks for code.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: _tensor(arrays[name]) for name in arrays.files}
        elif path.suffix == ".safetensors":
            found = load_file(path)
        else:
            # DINO and iBOT keep the arguments of their training, a Namespace, beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = dict(_tensors_of(torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as error:  # each format has its own errors
        raise ValueError(f"{path} is damaged, or no .npz, .safetensors or torch file ({first_line(error)})") from error
    if not found:
        raise ValueError(f"{path} holds no tensors")
    return found


def read_normalization(checkpoint: Path) -> dict[str, Any] | None:
    """What timm's `config.json` beside a checkpoint says about images: `mean`, `std`, `interpolation`; None without one.

    Raises:
        ValueError: the file is damaged.
    """
    path = checkpoint.with_name("config.json")
    if not path.is_file():
        return None
    config = read_json_object(path, MAX_BASE_CONFIG_BYTES)
    declared = config.get("pretrained_cfg", config)
    if not isinstance(declared, dict) or not {"mean", "std"} <= declared.keys():
        return None
    for name in ("mean", "std"):
        values = declared[name]
        if not (isinstance(values, list) and all(isinstance(value, int | float) for value in values)):
            raise ValueError(f"{path}: {name} is {short_repr(json.dumps(values))}, not a list of numbers")
    return declared


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype == np.dtype("V2"):  # how numpy reads JAX's bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_of(inner, f"{name}.{key}" if name else str(key))
