"""No prompts: the features of the frozen backbone."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_prompts.interfaces import PoolInput, Prompts
from cl_prompts.methods.pool import PromptPool


class NoPrompts(PromptPool):
    """A pool without prompts."""

    @property
    def needs_query(self) -> bool:
        """False: one pass is enough."""
        return False

    def prompt_table(self) -> Tensor:
        """Empty: [0, 0, 0, D]."""
        return torch.zeros(0, 0, 0, self.shape.width)

    def forward(self, batch: PoolInput) -> Prompts:
        """No prompts."""
        return Prompts()

    def fill_prompts(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """There is nothing to fill.

        Raises:
            ValueError: always.
        """
        raise ValueError('method "none" has no prompts to initialize from images')
