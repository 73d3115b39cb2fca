"""No prompts: the features of the frozen backbone as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_prompts.interfaces import PoolInput, Prompts
from cl_prompts.methods.pool import PromptPool


class NoPrompts(PromptPool, method="none"):
    """A pool without prompts."""

    @property
    def needs_query(self) -> bool:
        """One pass."""
        return False

    def prompt_table(self) -> Tensor:
        """Nothing [0, 0, 0, D]."""
        return torch.zeros(0, 0, 0, self.shape.width)

    def forward(self, batch: PoolInput) -> Prompts:
        """Nothing to put in."""
        return Prompts()

    def fill_prompts(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Raise ValueError: there is nothing to start."""
        raise ValueError('method "none" has no prompts to start from images')
