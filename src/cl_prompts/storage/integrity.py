"""Checks of an adapter's tensors before and after loading: checksums, names, shapes and types."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_prompts.runtime.text import short_repr
from cl_prompts.storage.declared import CONFIG_FILE, WEIGHTS_FILE, Declared


SAVED_PREFIX = "base_model.pools.prompt_pool."  # of the adapter's own tensors in a file
CLASSES_SUFFIX = "tasks._extra_state"  # of the tensor with the classes; files of earlier versions have none


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
