"""The last block computes only the tokens that are read: else a twelfth of a ViT's work is spent on what nobody looks at.

Keys and values need all tokens; queries, output projection and MLP only those that are read. So the block gets these as
its whole input, and its key and value projections all tokens, behind the block's norm. Where a block takes more than its
tokens (rotary embeddings, position biases, masks), or a trial on random tokens does not give the plain block's numbers, it
runs as it is.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.backbones.prefix import PrefixInjector
from cl_prompts.backbones.structure import Structure, attention_norm, projection_names
from cl_prompts.backbones.tokens import TokenInjector
from cl_prompts.interfaces import PrefixKV


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the trial; half precisions:
COARSE = 3e-2


class LastBlock:
    """Narrows the last block to the tokens that are `read`.

    Args:
        model: the model the structure was found in.
        structure: where its parts are.
        tokens, prefixes: what else acts on its passes; the last block must be prepared for prefixes.
    """

    def __init__(self, model: nn.Module, structure: Structure, tokens: TokenInjector, prefixes: PrefixInjector) -> None:
        self._rows: slice | None = None
        self._model, self._structure = model, structure
        self._tokens, self._prefixes = tokens, prefixes
        self._normed: Tensor | None = None  # all tokens behind the block's norm
        self._hooked: list[nn.Module] = []  # the key and the value projection
        self._waiting: set[nn.Module] = set()  # those that have not had all tokens yet
        self._proven: dict[Any, bool] = {}
        self._handles: list[Any] = []
        self.install()

    @property
    def block(self) -> Any:
        """The last block."""
        return self._model.get_submodule(self._structure.blocks[-1])

    @property
    def attention(self) -> Any:
        """Its attention."""
        return self._model.get_submodule(self._structure.attentions[-1])

    def _projections(self) -> list[nn.Module]:
        names = projection_names(self.attention)
        assert names is not None
        return [getattr(self.attention, name) for name in names[1:]]

    def install(self) -> None:
        """Put the hooks on the model."""
        self._prefixes.install([len(self._structure.blocks) - 1])
        self.attention._cl_all = 0
        self._hooked = self._projections()
        self._handles = [
            self.block.register_forward_pre_hook(self._narrow, with_kwargs=True),
            *(projection.register_forward_pre_hook(self._give_all) for projection in self._hooked),
            *(projection.register_forward_hook(self._fold) for projection in self._hooked),
        ]

    def uninstall(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        del self.attention._cl_all

    def read(self, start: int, length: int = 1) -> None:
        """Narrow the passes until `clear` to these tokens of the sequence, if the block is known to allow it."""
        self._rows = slice(start, start + length) if self._proven.get(self._state, False) else None

    def prove(self) -> None:
        """Try whether the block can be narrowed, once for an attention function and dtype; nothing may be inserted yet."""
        if self._state not in self._proven:
            self._proven[self._state] = self._try(next(self.block.parameters()))

    @property
    def _state(self) -> Any:
        weight = next(self.block.parameters())
        return self.attention._cl_shared_config._attn_implementation, weight.dtype, weight.device.type

    def clear(self) -> None:
        """Narrow nothing from now on and let go of recorded tensors."""
        self._rows = self._normed = None
        self._waiting = set()
        self._tokens.narrowed = False

    @torch.no_grad()
    def _try(self, like: Tensor) -> bool:
        """Whether the narrowed block gives the plain block's numbers for two of five random tokens."""
        numbers = torch.randn(2, 5, self._structure.shape.width, generator=torch.Generator().manual_seed(0))
        hidden, rows = numbers.to(like), slice(1, 3)
        asked = {"attention_mask": None} if "attention_mask" in signature(self.block.forward).parameters else {}
        try:
            with torch.autocast(like.device.type, enabled=False):
                plain = _first(self.block(hidden, **asked))[:, rows]
                self._rows = rows
                self.block(hidden, **asked)
                own = self._tokens.hidden
        except Exception:  # whatever a block wants beside its tokens, this one is no candidate
            return False
        finally:
            self.clear()
            self._tokens.hidden = self._tokens.prompt_hidden = None
        near = TOLERANCE.get(like.dtype, COARSE) * float(plain.abs().max())
        return own is not None and own.shape == plain.shape and bool((own - plain).abs().max() <= near)

    def _narrow(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._tokens.narrowed, self.attention._cl_all = False, 0
        if self._rows is None or not self._allowed(block, args, kwargs):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        self._normed = block.get_submodule(attention_norm(block, self.attention))(hidden)
        self._waiting = set(self._hooked)
        inserted = self._tokens.tokens
        self._tokens.narrowed, self.attention._cl_all = True, hidden.shape[1]
        self._tokens.length = hidden.shape[1] - (0 if inserted is None else inserted.shape[1])
        read = hidden[:, self._rows]
        return ((read, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": read})

    def _allowed(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        prefix = self._prefixes.prefixes.get(len(self._structure.blocks) - 1)
        # A prefix that is made from the block's tokens needs them all, and a recomputed block would not find them.
        if prefix is not None and not (isinstance(prefix, PrefixKV) and prefix.logit_bias is None):
            return False
        if block.training and getattr(block, "gradient_checkpointing", False):
            return False
        if self._projections() != self._hooked:  # copies of `modules_to_save` took their place
            return False
        others = [*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")]
        return not any(_holds_tensor(value) for value in others)

    def _give_all(self, projection: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self._normed,) if projection in self._waiting else None

    def _fold(self, projection: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Keys or values of all N tokens [B, N, D] as rows of as many as are read, which the block cuts into heads.

        `prefix.unfolded` undoes it. Rows of a prefix that pass the projection later are left alone.
        """
        if self._rows is None or projection not in self._waiting:
            return None
        self._waiting.remove(projection)
        read = self._rows.stop - self._rows.start
        return F.pad(output, (0, 0, 0, -output.shape[1] % read)).unflatten(1, (read, -1)).flatten(2)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(entry) for entry in value)
    return isinstance(value, Tensor)
