"""What the hooks know of a block and its attention, noted on the modules themselves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

from torch import nn

from cl_prompts.backbones.attention_products import forward_with_prefix
from cl_prompts.backbones.prefix import ATTENTION
from cl_prompts.backbones.structure import Structure, attention_norm, calls_registered_function


@dataclass(frozen=True)
class BlockInfo:
    """What the hooks know of a block.

    Args:
        layer: its number.
        norm: name, in the block, of the norm in front of its attention.
        last: whether it is the last one.
        takes_keywords: whether its forward hands keyword arguments on to its attention.
        windowed: whether its attention runs in windows.
    """

    layer: int
    norm: str
    last: bool
    takes_keywords: bool
    windowed: bool


def prepare(model: nn.Module, structure: Structure) -> None:
    """Note on each block what the hooks need to know, and let each attention join its prefix."""
    for layer, (block_name, attention_name) in enumerate(zip(structure.blocks, structure.attentions, strict=True)):
        block: Any = model.get_submodule(block_name)
        attention: Any = model.get_submodule(attention_name)
        norm = attention_norm(block, attention)
        keywords = any(p.kind is Parameter.VAR_KEYWORD for p in signature(type(block).forward).parameters.values())
        last = layer == len(structure.blocks) - 1
        block._cl_block = BlockInfo(layer, norm, last, keywords, structure.shape.windowed)
        attention._cl_norm = (block, norm)  # a tuple, so that the block does not become a child of its attention
        if calls_registered_function(attention):
            attention._cl_shared_config = attention.config
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation_internal = ATTENTION
        else:
            attention.forward = partial(forward_with_prefix, attention)


def restore(model: nn.Module, structure: Structure) -> None:
    """Undo `prepare`."""
    for block_name, attention_name in zip(structure.blocks, structure.attentions, strict=True):
        attention: Any = model.get_submodule(attention_name)
        if hasattr(attention, "_cl_shared_config"):
            attention.config = attention._cl_shared_config
            del attention._cl_shared_config
        else:
            del attention.forward
        del attention._cl_norm
        del model.get_submodule(block_name)._cl_block
