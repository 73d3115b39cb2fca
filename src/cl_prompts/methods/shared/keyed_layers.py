"""Prefix layers with a pool of prompts and keys each, of a fixed size, shared by all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from cl_prompts.interfaces import BackboneShape
from cl_prompts.methods.pool import Observation, PromptPool
from cl_prompts.methods.shared.history import ActivationHistory
from cl_prompts.methods.shared.initialization import initial


class KeyedLayers(PromptPool):
    """Base of L2P with prefixes and VQ-Prompt: the tensors, and the counts of selected prompts.

    Tensors: `prompts` [layers, M, Lp, D], `keys` [layers, M, D], `history.counts` [tasks, layers, M].
    """

    roles: ClassVar[dict[str, str]] = {"prompts": "prompts", "keys": "keys"}

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        depth, size, width = len(config.layers), config.pool_size, shape.width
        self.prompts = initial(config.prompt_init, depth, size, config.prompt_length, width)
        self.keys = initial(config.key_init, depth, size, width)
        self.history = ActivationHistory((depth,), size)

    @property
    def layers(self) -> Sequence[int]:
        """The config's `layers`."""
        return tuple(self.config.layers)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add a row of counts."""
        super().begin_task(class_indices)
        self.history.begin_task()

    def prompt_table(self) -> Tensor:
        """[layers, M, Lp, D]."""
        return self.prompts

    def key_table(self) -> Tensor | None:
        """[layers, M, D]."""
        return self.keys

    def observe(self, seen: Observation) -> None:
        """Count the prompts that the images of this task use, by layer."""
        if seen.ids is not None and self.num_tasks:
            self.history.add(seen.ids, seen.first_seen)
