"""Key/value prefixes in chosen blocks, through an attention function registered with transformers.

The block's pre-hook hands the prefix over as a keyword argument, so that gradient checkpointing keeps it with the block's
other inputs and the recomputation finds it again; the attention's pre-hook takes it out of the keyword arguments, which
some families (SigLIP) do not pass on to the attention function. The chosen attentions get a copy of the config that
names our function; it adds the prefix and calls the function the model is set to at that moment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cl_prompts.backbones.structure import Structure, attention_norm, eager_attention, projection_names
from cl_prompts.interfaces import Prefix, PrefixKV


ATTENTION = "cl_prompts"
KEYWORD = "cl_prompts_prefix"


@dataclass
class Handed:
    """A prefix on its way to its attention function, and where to note which one was used."""

    prefix: Prefix
    block_input: Tensor
    layer: int
    used: dict[int, PrefixKV]
    learning: bool


class PrefixInjector:
    """Puts prefixes in front of the keys and values of the blocks it is installed in.

    Args:
        model: the model the structure was found in.
        structure: where its parts are.

    Attributes:
        prefixes: prefix by block number, for the passes run while it is set.
        used: what the newest pass used, by block number.
        learning: whether gradients must reach the prefixes.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.prefixes: Mapping[int, Prefix] = {}
        self.used: dict[int, PrefixKV] = {}
        self.learning = False
        self._model = model
        self._structure = structure
        self._installed: dict[int, list[Any]] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that are prepared for prefixes."""
        return tuple(self._installed)

    def install(self, layers: Iterable[int]) -> None:
        """Prepare blocks for prefixes; those that are already prepared stay as they are."""
        for layer in layers:
            if layer in self._installed:
                continue
            block: Any = self._model.get_submodule(self._structure.blocks[layer])
            attention: Any = self._model.get_submodule(self._structure.attentions[layer])
            attention._cl_shared_config = attention.config
            attention._cl_handed = None
            # a tuple, so that the block does not become a child of its attention
            attention._cl_norm = (block, attention_norm(block, attention))
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation_internal = ATTENTION
            block._cl_layer = layer
            self._installed[layer] = [
                block.register_forward_pre_hook(self._give, with_kwargs=True),
                attention.register_forward_pre_hook(self._take, with_kwargs=True),
                attention.register_forward_hook(self._forget),
            ]

    def clear(self) -> None:
        """Add nothing from now on and let go of recorded tensors."""
        self.prefixes = {}
        self.used = {}
        self.learning = False

    def uninstall(self, keep: Iterable[int] = ()) -> None:
        """Take the hooks off all blocks but those to `keep`, and give their attentions their config back."""
        for layer in set(self._installed) - set(keep):
            for handle in self._installed.pop(layer):
                handle.remove()
            attention: Any = self._model.get_submodule(self._structure.attentions[layer])
            attention.config = attention._cl_shared_config
            del attention._cl_shared_config, attention._cl_handed, attention._cl_norm
            del self._model.get_submodule(self._structure.blocks[layer])._cl_layer

    def _give(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = block._cl_layer
        prefix = self.prefixes.get(layer)
        if prefix is None:
            return None
        block_input = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, KEYWORD: Handed(prefix, block_input, layer, self.used, self.learning)}

    def _take(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attention._cl_handed = kwargs.get(KEYWORD)
        return args, {name: value for name, value in kwargs.items() if name != KEYWORD}

    def _forget(self, attention: Any, args: Any, output: Any) -> None:
        attention._cl_handed = None


def prefix_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The model's own attention over [prefix keys; keys] and [prefix values; values]; query [B, H, N, d]."""
    implementation = module._cl_shared_config._attn_implementation
    attend = eager_attention(module) if implementation == "eager" else AttentionInterface()[implementation]
    if getattr(module, "_cl_all", 0):  # the block has only the tokens that are read
        key, value = (unfolded(x, query.shape[1], module._cl_all) for x in (key, value))
    handed: Handed | None = module._cl_handed
    if handed is not None:
        if handed.learning and not torch.is_grad_enabled():
            raise ValueError(
                "the base checkpoints its activations with use_reentrant=True, through which prefixes get no or wrong "
                'gradients: enable it with {"use_reentrant": False}, the default of transformers'
            )
        prefix = handed.prefix if isinstance(handed.prefix, PrefixKV) else handed.prefix(handed.block_input, query)
        handed.used[handed.layer] = prefix
        k, v = _in_head_space(module, prefix, handed.block_input.dtype)
        key = torch.cat([k.to(key.dtype), key], dim=2)
        value = torch.cat([v.to(value.dtype), value], dim=2)
        attention_mask = _mask_with_prefix(attention_mask, prefix, query, k.shape[2])
    return attend(module, query, key, value, attention_mask, **kwargs)


def unfolded(x: Tensor, heads: int, tokens: int) -> Tensor:
    """Keys or values of all tokens [B, heads, tokens, d] from rows that `LastBlock` folded: [B, more heads, read, d]."""
    return x.transpose(1, 2).flatten(1, 2).unflatten(1, (-1, heads))[:, :tokens].transpose(1, 2)


def _in_head_space(module: Any, prefix: PrefixKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, P, d]; rows in the input space go through the block's modules in the dtype of its tokens."""
    if prefix.k.dim() == 4:
        return prefix.k, prefix.v
    names = projection_names(module)
    assert names is not None
    own = (prefix.k.to(dtype), prefix.v.to(dtype))
    if prefix.normed:
        block, name = module._cl_norm
        norm = block.get_submodule(name)
        own = (norm(own[0]), norm(own[1]))
    rows = zip(names[1:], own, strict=True)
    k, v = (getattr(module, name)(x).unflatten(2, (-1, module.head_dim)).transpose(1, 2) for name, x in rows)
    return k, v


def _mask_with_prefix(mask: Tensor | None, prefix: PrefixKV, query: Tensor, length: int) -> Tensor | None:
    """A mask (True or 0.0 where attention is free) that covers the prefix too, with its logit bias."""
    if prefix.logit_bias is None:
        if mask is None:
            return None
        return nn.functional.pad(mask, (length, 0), value=float(mask.dtype == torch.bool))
    bias = prefix.logit_bias.to(query.dtype)
    if mask is None:
        own = bias.new_zeros(()).expand(*bias.shape[:3], query.shape[2])
    elif mask.dtype == torch.bool:
        own = bias.new_zeros(()).expand(mask.shape).masked_fill(~mask, float("-inf"))
    else:
        own = mask.to(bias.dtype)
    return torch.cat([bias, own.expand(*bias.shape[:3], -1)], dim=-1)


AttentionInterface.register(ATTENTION, prefix_attention)
