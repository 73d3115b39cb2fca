"""What the files of an adapter say before a tensor is read: the config, and the header of the weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cl_prompts.runtime.peft_type import PEFT_TYPE
from cl_prompts.runtime.text import first_line, short_repr
from cl_prompts.storage.bounded_read import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, check_bounded, read_json_object


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class Declared(NamedTuple):
    """A tensor as a safetensors header declares it: its type ("F32", ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


def declared_tensors(path: Path) -> Mapping[str, Declared]:
    """What the header of a safetensors file declares, by name; no tensor is read.

    Raises:
        ValueError: it is no regular file, truncated, no safetensors file, or declares more tensors than any adapter has.
    """
    size = check_bounded(path, None)
    with path.open("rb") as start:
        length = int.from_bytes(start.read(8), "little")
    if MAX_HEADER_BYTES < length <= size:
        raise ValueError(f"{path} has a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}: it is no adapter's")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            return {name: Declared(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({first_line(error)}): fetch or save it again"
        ) from error


def check_config_size(path: Path) -> None:
    """Raise ValueError if a config file is larger than `MAX_CONFIG_BYTES`, the most that is read."""
    size = check_bounded(path, None)
    if size > MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, a config at most {MAX_CONFIG_BYTES:,}: shorten its class names if it is yours"
        )


def read_config_file(path: Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`.

    Raises:
        ValueError: it is too large, truncated, no JSON, or of another method of PEFT.
    """
    check_config_size(path)
    content = read_json_object(path, MAX_CONFIG_BYTES)
    kind = content.get("peft_type")
    if kind != PEFT_TYPE:
        raise ValueError(
            f"{path} has peft_type {short_repr(kind)}, not {PEFT_TYPE!r}: it is no prompt pool; load it with PEFT"
        )
    return content
