"""Prompts in attention modules that compute attention in windows themselves (Swin v2).

Such a module adds a position bias and a mask of fixed size to its logits. So it gets the logits of its own tokens only;
those of prompts are kept aside, scaled like its own, and join them in the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cl_prompts.backbones import windows
from cl_prompts.backbones.prefix import BlockPlan, prefix_of


PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax)
SCALES = ("mul", "__mul__", "div", "__truediv__")


class JoinWindows(TorchFunctionMode):
    """Lets a prefix and prompt tokens join the windows of one call of an attention.

    Of n own tokens, P prompt tokens and a prefix of R rows, the logits are [B W, H, P + n, R + P + n], and the module sees
    the last n rows and columns.

    Args:
        attention: the module.
        block: its block's part of the pass.
    """

    def __init__(self, attention: Any, block: BlockPlan) -> None:
        super().__init__()
        self.attention, self.block = attention, block
        self.beside = block.record.beside.get(block.layer)
        self.cosines = False
        self.own: Tensor | None = None  # logits of the module's tokens, until they are more than scaled
        self.aside: tuple[Tensor, Tensor] | None = None  # logits of the prompts' rows, and of the others' first columns
        self.values: list[Tensor] = []  # of prefix and prompt tokens
        self.bias: Tensor | None = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.normalize:
            self.cosines = True
        elif function in PRODUCTS and args[0].dim() == 4:
            return self._logits(*args) if self.aside is None else self._attended(*args)
        elif self.own is not None and args and args[0] is self.own and function.__name__ in SCALES:
            assert self.aside is not None
            top, left = self.aside
            self.own, self.aside = function(*args), (function(top, args[1]), function(left, args[1]))
            return self.own
        elif function in SOFTMAX and self.aside is not None:
            return function(self._joined(args[0]), *args[1:], **kwargs)
        return function(*args, **kwargs)

    def _logits(self, query: Tensor, transposed: Tensor) -> Tensor:
        """Products of the module's queries [B W, H, n, d] and keys [B W, H, d, n]; those of prompts are kept aside."""
        rows = 0
        keys = [transposed.transpose(2, 3)]
        if self.beside is not None:
            rows = self.beside.shape[1]
            count = windows.number(self.attention, query, self.block.block_input)
            q, k, v = windows.projected_tokens(self.attention, self.beside, count)
            query, keys, self.values = torch.cat([self._unit(q), query], 2), [self._unit(k), *keys], [v]
        if self.block.prefix is not None:
            prefix, k, v = prefix_of(self.attention, self.block, query)
            keys, self.values, self.bias = [self._unit(k.to(query.dtype)), *keys], [v, *self.values], prefix.logit_bias
        logits = query @ torch.cat(keys, 2).transpose(2, 3)
        columns = logits.shape[3] - transposed.shape[3]
        self.aside = logits[:, :, :rows], logits[:, :, rows:, :columns]
        self.own = logits[:, :, rows:, columns:]
        return self.own

    def _unit(self, rows: Tensor) -> Tensor:
        return nn.functional.normalize(rows, dim=-1) if self.cosines else rows

    def _joined(self, own: Tensor) -> Tensor:
        """All logits, from the module's own [B W, H, n, n] behind position bias and mask."""
        assert self.aside is not None
        top, left = self.aside
        logits = torch.cat([top, torch.cat([left.to(own.dtype), own], 3)], 2)
        if self.bias is None:
            return logits
        return logits + nn.functional.pad(self.bias.to(logits.dtype), (0, logits.shape[3] - self.bias.shape[3]))

    def _attended(self, weights: Tensor, value: Tensor) -> Tensor:
        """Outputs of the module's tokens [B W, H, n, d]; those of prompt tokens leave beside it."""
        outputs = weights @ torch.cat([*(v.to(value.dtype) for v in self.values), value], 2)
        if self.beside is None:
            return outputs
        own = self.beside.shape[1]
        behind = windows.behind_block(self.attention, self.beside, outputs[:, :, :own])
        self.block.record.beside[self.block.layer + 1] = behind
        return outputs[:, :, own:]
