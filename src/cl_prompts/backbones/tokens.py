"""Prompt tokens: into the sequence before block 0, out of it behind the last block.

What leaves the last block has its original length, so every head and pooler of the model works unchanged; the prompts'
outputs are kept aside. Hooks are bound methods: `copy.deepcopy` binds them to the copy.

Some models bring an attention mask or a position bias that must cover the prompts too. Where they were inserted travels
with each block's keyword arguments, so that gradient checkpointing finds it again when it recomputes the block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.structure import Structure


KEYWORD = "cl_prompts_inserted"


class TokenInjector:
    """Inserts `tokens` in the passes run while it is set, and records what leaves the last block.

    Args:
        model: the model the structure was found in.
        structure: where its parts are.

    Attributes:
        tokens: prompt tokens [B, P, D] to insert, or None.
        index: position of the first one in the sequence.
        hidden: output of the last block without the prompts [B, N, D] (if `narrowed`, what is read), of the newest pass.
        prompt_hidden: outputs of the prompt tokens [B, P, D], or None.
        pooled: the model's own pooled feature [B, D], or None.
        narrowed: whether the last block of this pass has only the tokens that are read (`LastBlock`).
        length: how many tokens the model then expects behind it.
        keep_embeddings: whether to record `embeddings`, what enters block 0 without the prompts [B, N, D].
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.tokens: Tensor | None = None
        self.index = 0
        self.hidden: Tensor | None = None
        self.prompt_hidden: Tensor | None = None
        self.pooled: Tensor | None = None
        self.narrowed = False
        self.length = 0
        self.keep_embeddings = False
        self.embeddings: Tensor | None = None
        self._model = model
        self._structure = structure
        self._handles: list[Any] = []
        self.install()

    def install(self) -> None:
        """Put the hooks on the model."""
        model, structure = self._model, self._structure
        first, last = (model.get_submodule(structure.blocks[i]) for i in (0, -1))
        self._handles = [
            first.register_forward_pre_hook(self._insert, with_kwargs=True),
            last.register_forward_hook(self._remove),
            *(
                model.get_submodule(name).register_forward_pre_hook(self._announce, with_kwargs=True)
                for name in structure.blocks
            ),
            *(
                model.get_submodule(name).register_forward_pre_hook(widen_mask, with_kwargs=True)
                for name in structure.attentions
            ),
        ]
        if structure.pooler:
            self._handles.append(model.get_submodule(structure.pooler).register_forward_hook(self._keep_pooled))

    def clear(self) -> None:
        """Insert nothing from now on and let go of recorded tensors."""
        self.tokens = self.hidden = self.prompt_hidden = self.pooled = self.embeddings = None

    def uninstall(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _insert(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.tokens is None and not self.keep_embeddings:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.keep_embeddings:
            self.embeddings = hidden
        if self.tokens is None:
            return None
        tokens = self.tokens.to(hidden.dtype)
        hidden = torch.cat([hidden[:, : self.index], tokens, hidden[:, self.index :]], dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _remove(self, block: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if self.narrowed:
            self.hidden = self.prompt_hidden = hidden
            # Heads and poolers behind, whose answers nobody reads, get their number of tokens all the same.
            whole = hidden[:, :1].expand(-1, self.length, -1)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole
        if self.tokens is None:
            self.hidden, self.prompt_hidden = hidden, None
            return output
        start, stop = self.index, self.index + self.tokens.shape[1]
        self.prompt_hidden = hidden[:, start:stop]
        self.hidden = torch.cat([hidden[:, :start], hidden[:, stop:]], dim=1)
        return (self.hidden, *output[1:]) if isinstance(output, tuple) else self.hidden

    def _announce(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.tokens is None:
            return None
        return args, {**kwargs, KEYWORD: (self.index, self.tokens.shape[1])}

    def _keep_pooled(self, pooler: nn.Module, args: Any, output: Tensor) -> None:
        self.pooled = output


def widen_mask(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook: let every token see the prompts and the prompts see every token, where the model brings a mask or bias."""
    if KEYWORD not in kwargs:
        return None
    kwargs = dict(kwargs)
    inserted = kwargs.pop(KEYWORD)
    if len(args) > 1 and isinstance(args[1], Tensor):
        args = (args[0], _widened(args[1], *inserted), *args[2:])
    elif isinstance(kwargs.get("attention_mask"), Tensor):
        kwargs["attention_mask"] = _widened(kwargs["attention_mask"], *inserted)
    return args, kwargs


def _widened(mask: Tensor, index: int, length: int) -> Tensor:
    for dim in (-1, -2):
        if mask.shape[dim] > 1:  # a size of 1 is broadcast over the queries
            size = list(mask.shape)
            size[dim] = length
            free = torch.full(size, mask.dtype == torch.bool, dtype=mask.dtype, device=mask.device)
            before, behind = mask.tensor_split([index], dim=dim)
            mask = torch.cat([before, free, behind], dim=dim)
    return mask
