"""Patch embedding runs once: the prompted pass takes it from the un-prompted pass before it, on the same images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cl_prompts.backbones.structure import Structure


class SharedEmbeddings:
    """Keeps what leaves the embeddings in one pass, and gives it again in the next.

    Args:
        model: the model the structure was found in.
        structure: where its parts are.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model, self._structure = model, structure
        self._kept: Any = None

    @property
    def _embeddings(self) -> nn.Module:
        return self._model.get_submodule(self._structure.inner).get_submodule("embeddings")

    def may_share(self) -> bool:
        """Whether the embeddings are frozen, and neither they nor the model compiled or hooked (as Accelerate does)."""
        embeddings = self._embeddings
        trained = any(p.requires_grad for p in embeddings.parameters())
        return not trained and not any("forward" in vars(module) for module in (self._model, *embeddings.modules()))

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep what leaves the embeddings in the pass that runs inside, if it may be shared."""
        if not self.may_share():
            yield
            return

        def note(embeddings: nn.Module, args: Any, output: Any) -> None:
            self._kept = output

        handle = self._embeddings.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def reuse(self) -> None:
        """Have the next passes take what was kept, until `clear`; without anything kept they run as they are."""
        if self._kept is None:
            return
        kept = self._kept

        def again(*args: Any, **kwargs: Any) -> Any:
            return kept

        self._embeddings.forward = again

    def clear(self) -> None:
        """Forget what was kept."""
        if self._kept is not None:
            vars(self._embeddings).pop("forward", None)
        self._kept = None
