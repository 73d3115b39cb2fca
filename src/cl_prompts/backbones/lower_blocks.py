"""Blocks below the lowest prompt run once: the prompted pass takes their output from the un-prompted pass before it.

Frozen, in eval mode and on the same images they would only compute the same numbers again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

    def blocks(self, below: int) -> list[Any]:
        """The blocks below a number."""
        return [self._model.get_submodule(name) for name in self._structure.blocks[:below]]

    def may_skip(self, below: int) -> bool:
        """Whether nothing that runs before block `below` is trained or compiled."""
        behind = {id(p) for name in self._structure.blocks[below:] for p in self._model.get_submodule(name).parameters()}
        backbone = self._model.get_submodule(self._structure.inner)
        trained = any(p.requires_grad and id(p) not in behind for p in backbone.parameters())
        return not trained and "forward" not in vars(self._model)

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
