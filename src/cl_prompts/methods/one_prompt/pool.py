"""OnePrompt (Huang et al., "OVOR", ICLR 2024): one set of prefixes for all tasks and images. Nothing is selected.

Each chosen block has rows of keys and values, of length `g_length` or `e_length`, trained by every task. There is no query
pass and no prompt loss. Virtual outlier regularization is a stage of the head (`cl_prompts.heads.outliers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from cl_prompts.interfaces import BackboneShape, PoolInput, Prompts
from cl_prompts.methods.pool import PromptPool
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.prefixes import split_prefix


class OnePromptPool(PromptPool):
    """The pool. Tensors: `g_prompts` [G-layers, rows, D], `e_prompts` [E-layers, rows, D]."""

    roles: ClassVar[dict[str, str]] = {"g_prompts": "prompts", "e_prompts": "prompts"}

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self.g_prompts = initial(config.prompt_init, len(config.g_layers), config.g_length, shape.width)
        self.e_prompts = initial(config.prompt_init, len(config.e_layers), config.e_length, shape.width)

    @property
    def needs_query(self) -> bool:
        """False: nothing is selected."""
        return False

    @property
    def layers(self) -> Sequence[int]:
        """G-layers and E-layers."""
        return (*self.config.g_layers, *self.config.e_layers)

    def forward(self, batch: PoolInput) -> Prompts:
        """The prefixes, the same for every image."""
        rows = dict(zip(self.layers, (*self.g_prompts, *self.e_prompts), strict=True))
        images = batch.batch_size
        return Prompts(prefixes={n: split_prefix(own.expand(images, -1, -1), self.heads) for n, own in rows.items()})

    def prompt_table(self) -> Tensor:
        """Prefixes of the E-layers [E-layers, 1, rows, D]."""
        return self.e_prompts[:, None]
