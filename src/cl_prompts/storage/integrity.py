"""Checks of an adapter's files and tensors before and after loading: checksums, sizes, names, shapes and types."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cl_prompts.runtime.peft_type import PEFT_TYPE
from cl_prompts.runtime.text import first_line, short_repr
from cl_prompts.storage.bounded_read import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, check_bounded, read_json_object


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SAVED_PREFIX = "base_model.pools.prompt_pool."  # of the adapter's own tensors in a file
CLASSES_SUFFIX = "tasks._extra_state"  # of the tensor with the classes; files of earlier versions have none


class Declared(NamedTuple):
    """A tensor as a safetensors header declares it: its type ("F32", ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


# Floating types, which are taken for one another, in a safetensors header and in torch.
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", torch.float64, torch.float32, torch.float16, torch.bfloat16)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors):
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()


def digest_file(folder: str | os.PathLike[str]) -> str | None:
    """`digest` of the adapter weights in a folder; None if there are none."""
    path = Path(folder, WEIGHTS_FILE)
    return digest(load_file(path).items()) if path.is_file() else None


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
        with safe_open(path, framework="pt") as file:
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


def check_shapes(found: Mapping[str, Tensor | Declared], expected: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and types of a file's tensors with those that its config implies.

    Args:
        found: tensors of the file, or what its header declares, by name.
        expected: tensors of the adapter that the config builds, by the same names.

    Raises:
        ValueError: a tensor is missing, foreign, or of another shape or type.
    """
    missing = sorted(name for name in set(expected) - set(found) if not name.endswith(CLASSES_SUFFIX))
    foreign = sorted(set(found) - set(expected))
    if missing or foreign:
        raise ValueError(
            f"{WEIGHTS_FILE} does not fit its config: missing {short_repr(missing)}, unexpected {short_repr(foreign)}. "
            "Are both files from the same save?"
        )
    for name, tensor in found.items():
        like = expected[name]
        kinds: tuple[Any, ...] = FLOAT_TYPES if like.is_floating_point() else ("I64", torch.int64)
        if tuple(tensor.shape) != tuple(like.shape) or tensor.dtype not in kinds:
            raise ValueError(
                f"{name} is {tensor.dtype}{short_repr(list(tensor.shape))} in {WEIGHTS_FILE}, the config implies "
                f"{like.dtype}{list(like.shape)}: are both files from the same save?"
            )


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], sha256: str | None) -> None:
    """Compare loaded tensors with those that the config implies.

    Args:
        found: tensors of the file, by name.
        expected: tensors of the freshly built adapter, by the same names.
        sha256: checksum to compare with; None skips that.

    Raises:
        ValueError: a tensor is missing, foreign, of another shape or type, or holds NaN or Inf, or the checksum differs.
    """
    check_shapes(found, expected)
    if sha256 is not None and digest(found.items()) != sha256:
        raise ValueError(
            f"the checksum of {WEIGHTS_FILE} does not match `weights_sha256` in {CONFIG_FILE}: the file was damaged or "
            "changed. Fetch it again, or pass verify=False to load it all the same"
        )
    wrong = not_finite(found)
    if wrong:
        raise ValueError(f"{wrong[0]} holds NaN or Inf: the run that wrote it diverged; lower its learning rate")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or Inf."""
    return [
        name
        for name, tensor in tensors.items()
        # A sum shows NaN and Inf ten times as fast. Where it is not finite, an overflow of the sum is ruled out.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all()
    ]
