"""Embeddings, and blocks below the lowest prompt, run once: the prompted pass takes their output from the un-prompted one.

Frozen, in eval mode and on the same images they would only compute the same numbers again. Where a caller has kept what
leaves the blocks, these need not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.structure import Structure


class LowerBlocks:
    """Keeps what leaves embeddings and blocks in one pass, and gives it instead of running them in the next.

    Args:
        model: the model the structure was found in.
        structure: where its parts are.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model, self._structure = model, structure
        self._kept: dict[nn.Module, Any] = {}
        self._below = 0
        self._forms: dict[Any, tuple[bool, torch.dtype]] = {}

    def blocks(self, below: int) -> list[Any]:
        """The blocks below a number."""
        return [self._model.get_submodule(name) for name in self._structure.blocks[:below]]

    def may_skip(self, below: int) -> bool:
        """Whether nothing that runs before block `below` is trained, compiled or hooked (as Accelerate does)."""
        behind = {id(p) for name in self._structure.blocks[below:] for p in self._model.get_submodule(name).parameters()}
        backbone = self._model.get_submodule(self._structure.inner)
        trained = any(p.requires_grad and id(p) not in behind for p in backbone.parameters())
        return not trained and not any("forward" in vars(module) for module in (self._model, *self.blocks(below)))

    @property
    def embeddings(self) -> nn.Module:
        """What comes before block 0."""
        return self._model.get_submodule(self._structure.inner).get_submodule("embeddings")

    def may_share_embeddings(self) -> bool:
        """Whether they are frozen, and neither they nor the model compiled or hooked (as Accelerate does)."""
        trained = any(p.requires_grad for p in self.embeddings.parameters())
        return not trained and not any("forward" in vars(m) for m in (self._model, *self.embeddings.modules()))

    @contextmanager
    def keep(self, below: int) -> Iterator[None]:
        """Keep what leaves the embeddings, and what enters block `below` if it is not 0, in the pass that runs inside."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._kept[module] = output

        with ExitStack() as hooks:
            for module in (*([self.embeddings] if self.may_share_embeddings() else []), *self.blocks(below)[-1:]):
                hooks.callback(module.register_forward_hook(note).remove)
            yield
        self._below = below

    @property
    def states(self) -> Tensor:
        """What was kept for the lowest prompted block: [B, N, D]."""
        kept = self._kept[self.blocks(self._below)[-1]]
        states: Tensor = kept[0] if isinstance(kept, tuple) else kept
        return states

    def take(self, below: int, states: Tensor, compute: Callable[[], Any]) -> None:
        """Keep states [B, N, D] of a caller instead of those of a pass, as what enters block `below`.

        Args:
            below: number of the block.
            states: as `states` gave them in an earlier pass over the same images.
            compute: runs an un-prompted pass over the images; the first states of a model and precision are compared with
                what it gives.

        Raises:
            ValueError: they are not what enters that block.
        """
        kind, last = states.device.type, self.blocks(below)[-1]
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        situation = (below, next(self._model.parameters()).dtype, autocast)
        if situation not in self._forms:
            with self.keep(below):
                compute()
            own = self.states.float()
            if own.shape != states.shape or not (states.float() - own).norm() <= 0.05 * own.norm():
                raise ValueError(
                    f"hidden, {list(states.shape)}, is not what enters block {below} for these images, {list(own.shape)}: "
                    "take it from extract_hidden_states of this model"
                )
            self._forms[situation] = isinstance(self._kept[last], tuple), self.states.dtype
        in_tuple, dtype = self._forms[situation]
        self._kept[last] = (states.to(dtype),) if in_tuple else states.to(dtype)
        self._below = below

    def skip(self) -> None:
        """Have the next passes begin with what was kept, until `clear`; without anything kept they run as they are."""
        for module, output in self._kept.items():
            module.forward = _giver(output)
        if self._below:
            *lower, last = self.blocks(self._below)
            in_tuple = isinstance(self._kept[last], tuple)
            for block in lower:
                block.forward = _passes_on_in_tuple if in_tuple else _passes_on

    def clear(self) -> None:
        """Forget what was kept; everything runs."""
        for module in (*self._kept, *self.blocks(self._below)):
            vars(module).pop("forward", None)
        self._kept, self._below = {}, 0


def _giver(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _passes_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _passes_on_in_tuple(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (hidden_states,)
