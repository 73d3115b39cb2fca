"""Fingerprint of a frozen backbone: tells bases of one shape apart by their weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from cl_prompts.backbones.structure import Structure


_ROW = 8 * 521  # bytes


def fingerprint(model: nn.Module, structure: Structure, pooling: str) -> str:
    """sha256 over names, shapes and sums of the frozen tensors that an adapter's answers depend on.

    These are embeddings, blocks and the final norm, named from the bare backbone, so that an adapter trained on `ViTModel`
    fits `ViTForImageClassification`. The pooler counts only where its feature is used, because many checkpoints have none
    and transformers then initializes a random one. The fingerprint is no protection against deliberate forgery.
    """
    backbone = model.get_submodule(structure.inner)
    unused = unread_parts(model, structure, pooling)
    sha = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        if name.split(".")[0] in unused or ".modules_to_save." in name:
            continue
        sha.update(f"{name.replace('.original_module.', '.')} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A process holds a part of each sharded block (cl_prompts.tuner.sharding); all processes gather the whole together.
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for part in _summed(whole.detach()):
            sha.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


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
    children = [name for name, _ in model.get_submodule(structure.inner).named_children()]
    norm = structure.norm.rpartition(".")[2]
    unread = set(children[children.index(norm) + 1 :])
    if pooling == "pooler" and structure.pooler:
        unread.discard(structure.pooler.rpartition(".")[2])
    return unread
