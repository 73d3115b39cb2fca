"""VPT: Visual Prompt Tuning (Jia et al., ECCV 2022): one prompt for all tasks and images.

Shallow: P tokens are inserted before block 0 and pass through all blocks. Deep: P new tokens enter each block and replace
the prompt outputs of the block before.

Deep prompts are computed without a longer sequence. A block's prompt tokens influence the others only through its
attention, as further keys and values after the block's norm, and their own outputs are dropped. They are therefore a prefix
in the input space, and their queries and their MLP need not be computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from cl_prompts.interfaces import BackboneShape, PoolInput, PrefixKV, Prompts
from cl_prompts.methods.pool import PromptPool
from cl_prompts.methods.shared.initialization import initial


class VPTPool(PromptPool):
    """The pool. Tensor: `prompts` [layers (1 if shallow), P, D], trained by every task."""

    roles: ClassVar[dict[str, str]] = {"prompts": "prompts"}

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        every = tuple(range(shape.num_layers) if config.layers is None else config.layers)
        self._layers = every if config.deep else ()
        init = "zeros" if config.prompt_init == "xavier" else config.prompt_init
        self.prompts = initial(init, len(every) if config.deep else 1, config.prompt_length, shape.width)
        if config.prompt_init == "xavier":
            bound = math.sqrt(3 / shape.width)
            nn.init.uniform_(self.prompts, -bound, bound)

    @property
    def needs_query(self) -> bool:
        """False: nothing is selected."""
        return False

    @property
    def layers(self) -> Sequence[int]:
        """Blocks with their own prompts; none if shallow."""
        return self._layers

    def forward(self, batch: PoolInput) -> Prompts:
        """The prompt, the same for every image: as tokens, or as each block's prefix."""
        rows = self.prompts[:, None].expand(-1, batch.batch_size, -1, -1)
        if self.config.deep:
            return Prompts(
                prefixes={layer: PrefixKV(own, own, normed=True) for layer, own in zip(self.layers, rows, strict=True)}
            )
        return Prompts(
            tokens=rows[0],
            tokens_after_cls=self.config.position == "after_cls",
            tokens_take_cls_position=self.config.add_cls_position_embedding,
        )

    def prompt_table(self) -> Tensor:
        """[layers (1 if shallow), 1, P, D]."""
        return self.prompts[:, None]
