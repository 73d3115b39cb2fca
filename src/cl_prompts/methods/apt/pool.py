"""APT: Additive Prompt Tuning (Chen et al., ICCV 2025).

In each block l, behind the key and value projections, with prompts P_l = (p_k, p_v) that are the same for all images:

    key of CLS    W_k x + b_k + p_k            value of CLS   W_v x + b_v + p_v

Queries and all other tokens are unchanged, and no token is added. Training uses P; the test uses G, an average over tasks:

    after the first task   G = P               later          G = alpha G + (1 - alpha) P

P is neither reset nor set to G. While a task is open, the test uses the G that the end of the task would give (ours). In a
model without a CLS token (p_k, p_v) are key and value of a token of their own (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_prompts.interfaces import BackboneShape, PoolInput, PrefixKV, Prompts
from cl_prompts.methods.pool import PromptPool
from cl_prompts.methods.shared.initialization import initial


class APTPool(PromptPool):
    """The pool.

    Tensors: `prompts` [layers, 2 (key, value), D], trained by every task; `average` G of the ended tasks, of the same
    shape; `pending`, the weight of `prompts` in the prompt at test: 1 before the end of the first task, then 1 - alpha
    during a task and 0 after it.
    """

    roles: ClassVar[dict[str, str]] = {"prompts": "prompts"}
    prompt_buffers: ClassVar[tuple[str, ...]] = ("average",)
    average: Tensor
    pending: Tensor

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self._layers = tuple(range(shape.num_layers) if config.layers is None else config.layers)
        self.prompts = initial(config.prompt_init, len(self._layers), 2, shape.width)
        self.register_buffer("average", torch.zeros(len(self._layers), 2, shape.width))
        self.register_buffer("pending", torch.ones(()))

    @property
    def needs_query(self) -> bool:
        """False: nothing is selected."""
        return False

    @property
    def layers(self) -> Sequence[int]:
        """Blocks with added vectors."""
        return self._layers

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """From the second task on the prompt is averaged with those before."""
        if self.num_tasks:
            self.pending = torch.full_like(self.pending, 1 - self.config.average)
        super().begin_task(class_indices)

    def end_task(self) -> None:
        """Average."""
        self.average = self._averaged()
        self.pending = torch.zeros_like(self.pending)

    def _averaged(self) -> Tensor:
        """The prompt at test, if the task ends now."""
        return (1 - self.pending) * self.average + self.pending * self.prompts.detach()

    def forward(self, batch: PoolInput) -> Prompts:
        """The added vectors, the same for every image."""
        prompts = self.prompts if batch.task is not None else self._averaged()
        rows = prompts.unflatten(2, (self.shape.num_heads, 1, -1))[:, :, None].expand(-1, -1, batch.batch_size, -1, -1, -1)
        if not self.shape.has_cls:
            return Prompts(prefixes={layer: PrefixKV(*own) for layer, own in zip(self.layers, rows, strict=True)})
        none = rows.new_zeros(*rows.shape[2:4], 0, rows.shape[5])
        return Prompts(
            prefixes={n: PrefixKV(none, none, cls_k=k, cls_v=v) for n, (k, v) in zip(self.layers, rows, strict=True)}
        )

    def fill_prompts(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Added vectors are no tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError('method "apt" adds vectors to keys and values; they cannot start as patches of images')

    def prompt_table(self) -> Tensor:
        """[layers, 1, 2, D]."""
        return self.prompts[:, None]
