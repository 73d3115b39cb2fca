"""Key/value prefixes inside attention modules that look up no attention function, but compute attention themselves.

While the forward of such a module runs with a prefix, a `TorchFunctionMode` sees its calls of torch. Where it calls
`scaled_dot_product_attention` (timm, Data2Vec), keys, values and mask get the prefix there. Where it multiplies (BLIP,
FLAVA), the keys get it in the first product of queries and keys, the logits get the prefix's bias in the softmax, and the
values get it in the second product. Attention in windows has its own mode (`cl_prompts.backbones.window_products`). A
module that does something else is left alone, and is refused by the trial of `cl_prompts.backbones.trial`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cl_prompts.backbones.prefix import BLOCK, BlockPlan, added_to_cls, joined, prefix_of, probe
from cl_prompts.backbones.tokens import widened
from cl_prompts.backbones.window_products import PRODUCTS, SOFTMAX, JoinWindows
from cl_prompts.interfaces import PrefixKV


def forward_with_prefix(attention: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an attention module that computes attention itself, with the block's part of the plan."""
    block = BLOCK.get()
    forward = type(attention).forward
    if block is None or (block.prefix is None and block.inserted is None and not block.record.beside):
        return forward(attention, *args, **kwargs)
    windowed = attention._cl_norm[0]._cl_block.windowed
    with JoinWindows(attention, block) if windowed else _JoinPrefix(attention, block):
        return forward(attention, *args, **kwargs)


class _JoinPrefix(TorchFunctionMode):
    """Lets a prefix join the keys and values of one call of an attention.

    Args:
        attention: the module.
        block: its block's part of the pass.
    """

    def __init__(self, attention: nn.Module, block: BlockPlan) -> None:
        super().__init__()
        self.attention = attention
        self.block = block
        self.joined: tuple[PrefixKV, Tensor, Tensor] | None = None  # prefix, keys, values; once queries are known

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if self.block.prefix is not None and args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            if function in PRODUCTS and len(args) == 2:
                return function(args[0], self._second_factor(*args))
            if function in SOFTMAX and self.joined is not None:
                return function(self._biased(args[0]), *args[1:], **kwargs)
        return function(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`scaled_dot_product_attention` with the prefix, and a mask that covers prompt tokens."""
        if attn_mask is not None and self.block.inserted is not None and attn_mask.shape[-1] != key.shape[2]:
            attn_mask = widened(attn_mask, *self.block.inserted)
        if self.block.prefix is not None:
            scale = kwargs.get("scale")
            key, value, attn_mask = joined(self.attention, self.block, query, key, value, attn_mask, scale)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def _second_factor(self, first: Tensor, second: Tensor) -> Tensor:
        """Transposed keys [B, H, d, P + N] in the product with queries, values [B, H, P + N, d] in the one behind it."""
        if self.joined is None:
            self.joined = prefix, k, _ = prefix_of(self.attention, self.block, first)
            key = torch.cat([k.to(second.dtype), added_to_cls(second.transpose(2, 3), prefix.cls_k)], dim=2)
            probe(self.attention, self.block, prefix, first, key, None, None)
            return key.transpose(2, 3)
        prefix, _, v = self.joined
        return torch.cat([v.to(second.dtype), added_to_cls(second, prefix.cls_v)], dim=2)

    def _biased(self, logits: Tensor) -> Tensor:
        """Logits [B, H, N, P + N] with the prefix's bias."""
        assert self.joined is not None
        bias = self.joined[0].logit_bias
        if bias is None:
            return logits
        return logits + nn.functional.pad(bias.to(logits.dtype), (0, logits.shape[-1] - bias.shape[-1]))
