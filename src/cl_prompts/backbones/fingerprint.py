"""Fingerprint of a frozen backbone: tells bases of one shape apart by their weights."""

from __future__ import annotations

import hashlib
import warnings

import torch
from torch import Tensor, nn

from cl_prompts.backbones.frozen_tensors import dense_parts, stored_tensor
from cl_prompts.backbones.structure import Structure, behind_the_feature
from cl_prompts.runtime.text import first_line


_ROW = 8 * 521  # bytes


def fingerprint(model: nn.Module, structure: Structure, pooling: str, dtype: torch.dtype | None = None) -> str | None:
    """sha256 over names, shapes and sums of the frozen tensors that an adapter's answers depend on.

    These are embeddings, blocks and the final norm, named from the bare backbone, so that an adapter trained on `ViTModel`
    fits `ViTForImageClassification`. The pooler counts only where its feature is used, because many checkpoints have none
    and transformers then initializes a random one. The fingerprint is no protection against deliberate forgery.

    Args:
        model: the base; it may be quantized, sharded, or offloaded by Accelerate.
        structure: where its parts are.
        pooling: which feature is read.
        dtype: cast floating-point tensors to it first; None: leave them as they are.

    Returns:
        64 hexadecimal digits; None, with a warning, for a base whose numbers cannot be read.
    """
    try:
        return _fingerprint(model, structure, pooling, dtype)
    except Exception as error:  # the code of any tensor subclass may fail in any way
        warnings.warn(
            f"the weights of this {type(model).__name__} cannot be read for its fingerprint ({first_line(error)}): whether "
            "an adapter is loaded onto the base of its training is not checked",
            stacklevel=3,
        )
        return None


def _fingerprint(model: nn.Module, structure: Structure, pooling: str, dtype: torch.dtype | None) -> str:
    backbone = model.get_submodule(structure.inner)
    unused = unread_parts(model, structure, pooling)
    sha = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        if name.split(".")[0] in unused or ".modules_to_save." in name:
            continue
        stored = stored_tensor(model, f"{structure.inner}.{name}" if structure.inner else name, value)
        for part_name, tensor in dense_parts(name.replace(".original_module.", "."), stored):
            whole = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            sha.update(f"{part_name} {whole.dtype} {tuple(whole.shape)}\n".encode())
            for part in _summed_or_dequantized(whole):
                sha.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _summed_or_dequantized(tensor: Tensor) -> list[Tensor]:
    """`_summed` of a tensor or, for a tensor subclass whose bytes cannot be viewed, of what its `dequantize` returns."""
    try:
        return _summed(tensor)
    except Exception:  # as above
        if type(tensor) is Tensor:
            raise
        return _summed(tensor.dequantize())


def _summed(tensor: Tensor) -> list[Tensor]:
    """The parts of a tensor that are hashed: all bytes of a small tensor, sums over 521 integers of 8 bytes of a large one.

    The sums are exact on every device and ten times faster to hash than all bytes. 521 is prime, so that swapped rows,
    channels or heads change the sums.
    """
    numbers = tensor.contiguous().reshape(-1).view(torch.uint8)
    if numbers.storage_offset() % 8:
        numbers = numbers.clone()
    whole = numbers.numel() // _ROW * _ROW
    return [numbers[:whole].view(torch.int64).view(-1, _ROW // 8).sum(1), numbers[whole:]] if whole else [numbers]


def unread_parts(model: nn.Module, structure: Structure, pooling: str) -> set[str]:
    """Names of the bare backbone's children that a feature does not depend on: what follows the final norm."""
    unread = set(behind_the_feature(model, structure))
    if pooling == "pooler" and structure.pooler:
        unread.discard(structure.pooler.rpartition(".")[2])
    return unread
