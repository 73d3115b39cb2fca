"""Blocks below the lowest prompt run once: the prompted pass takes their output from the un-prompted pass before it.

Frozen, in eval mode and on the same images they would only compute the same numbers again. Where a caller has kept these
numbers, they need not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.structure import Structure


class LowerBlocks:
    """Keeps what leaves a block in one pass, and runs none up to it in the next.

    Args:
        model: the model the structure was found in.
        structure: where its parts are.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model, self._structure = model, structure
        self._kept: Any = None
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

    @contextmanager
    def keep(self, below: int) -> Iterator[None]:
        """Keep what enters block `below` in the pass that runs inside; 0 keeps nothing."""
        if not below:
            yield
            return

        def note(block: nn.Module, args: Any, output: Any) -> None:
            self._kept = output

        handle = self.blocks(below)[-1].register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()
        self._below = below

    @property
    def states(self) -> Tensor:
        """What was kept: [B, N, D]."""
        kept: Tensor = self._kept[0] if isinstance(self._kept, tuple) else self._kept
        return kept

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
        kind = states.device.type
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
            self._forms[situation] = isinstance(self._kept, tuple), self.states.dtype
        in_tuple, dtype = self._forms[situation]
        self._kept = (states.to(dtype),) if in_tuple else states.to(dtype)
        self._below = below

    def skip(self) -> None:
        """Have the next pass begin with what was kept, until `clear`; without anything kept it runs as it is."""
        if self._kept is None:
            return
        kept = self._kept

        def begin_here(*args: Any, **kwargs: Any) -> Any:
            return kept

        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if isinstance(kept, tuple) else hidden_states

        blocks = self.blocks(self._below)
        for block in blocks:
            block.forward = begin_here if block is blocks[-1] else pass_on

    def clear(self) -> None:
        """Forget what was kept; all blocks run."""
        if self._kept is not None:
            for block in self.blocks(self._below):
                vars(block).pop("forward", None)
        self._kept, self._below = None, 0
