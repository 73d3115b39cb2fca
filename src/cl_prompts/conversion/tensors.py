"""Tensors that are taken one by one, so that none is missing, has another shape, or is left."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor


# What a plain ViT has no place for.
FOREIGN = {
    r"reg_token|register_tokens": "register tokens",
    r"norm_pre\.": "a norm before the blocks, as CLIP has",
    r"fc_norm\.|attn_pool\.|MAPHead": "another pooling than the CLS token",
    r".*rel_pos|.*relative_position": "relative positions, as BEiT has",
    r".*\.(q_norm|k_norm)\.": "norms of queries and keys",
    r".*\.mlp\.(w12|fc1_g|gate)": "a gated MLP",
    r"conv_root|block\d|patch_embed\.backbone": "convolutions in front of the blocks",
}


class Tensors:
    """The tensors of a network by name.

    Raises:
        ValueError: the network has parts that a plain ViT has not.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for pattern, meaning in FOREIGN.items():
            if any(re.match(pattern, name) for name in tensors):
                raise ValueError(f"the network has {meaning}: only plain vision transformers are converted")
        self._left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def shape(self, name: str, dims: int) -> torch.Size:
        """The shape of a tensor.

        Raises:
            ValueError: it is missing, or has another number of dimensions.
        """
        if name not in self._left:
            raise ValueError(f"the checkpoint lacks {name}")
        shape = self._left[name].shape
        if len(shape) != dims:
            raise ValueError(f"{name} has the shape {list(shape)}, expected {dims} dimensions")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor, which is not taken again.

        Raises:
            ValueError: it is missing, or has another shape.
        """
        found = self.shape(name, len(shape))
        if found != shape:
            raise ValueError(f"{name} has the shape {list(found)}, expected {list(shape)}")
        return self._left.pop(name)

    def drop(self, *starts: str) -> None:
        """Forget the tensors whose names start so."""
        self._left = {name: tensor for name, tensor in self._left.items() if not name.startswith(starts)}

    def check_empty(self) -> None:
        """Check that every tensor was taken.

        Raises:
            ValueError: some were not.
        """
        if self._left:
            names = ", ".join(sorted(self._left)[:3])
            raise ValueError(f"{len(self._left)} tensors of the network have no place in a ViT, such as {names}")
