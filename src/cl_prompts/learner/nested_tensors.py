"""Tensors of several parts in one flat dict, each part's names under a prefix, as safetensors stores them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with `prefix` in front of every name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy the values of saved tensors into tensors of the same names and shapes.

    Args:
        source: saved tensors by name.
        target: tensors to overwrite, by name. After an error none has changed.

    Raises:
        ValueError: a name is missing on one side, or shapes differ.
    """
    wrong = sorted(set(target) ^ set(source)) or [name for name in target if target[name].shape != source[name].shape]
    if wrong:
        raise ValueError(
            f"the training state was taken with another config or other options: {wrong} are missing, unknown or differ"
        )
    for name, tensor in target.items():
        tensor.copy_(source[name])
