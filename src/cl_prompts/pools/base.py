"""The contract of a method: what a prompt pool must say and do. One method, one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_prompts.prompts import BackboneShape, PoolInput, Prompts


POOLS: dict[str, type[PromptPool]] = {}


@dataclass
class Observation:
    """What a training step showed, for a pool's statistics. All tensors are without gradient.

    Args:
        ids: prompts the step used, as in `Prompts.ids` or [B, layers, k] for prefixes chosen inside the attention.
        query: un-prompted features [B, D], or None.
        columns: head column of each image's class [B], or None without labels.
        counted: True where an image counts: real, and not counted before in this task [B].
    """

    ids: Tensor | None
    query: Tensor | None
    columns: Tensor | None
    counted: Tensor


class PromptPool(nn.Module, ABC):
    """Base of all methods. A subclass names itself: `class L2PPool(PromptPool, method="l2p")`.

    What is trained now lives in one stacked Parameter per kind of tensor. What the method freezes lives in buffers: a
    zero gradient does not freeze a row under momentum or weight decay.

    Args:
        config: the method's config.
        shape: sizes of the backbone.
    """

    # Parameter name -> group of `parameter_groups`: "prompts", "keys" or "routers".
    roles: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, method: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        POOLS[method] = cls

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.num_tasks = 0

    @property
    def needs_query(self) -> bool:
        """Whether `forward` or `observe` reads the un-prompted feature."""
        return True

    @property
    def layers(self) -> Sequence[int]:
        """Blocks that may get key/value prefixes."""
        return ()

    def begin_task(self, columns: Sequence[int]) -> None:
        """Grow for the next task, whose classes have these head columns. Also replayed to rebuild shapes for loading."""
        self.num_tasks += 1

    def end_task(self) -> None:
        """Close the current task."""

    @abstractmethod
    def forward(self, batch: PoolInput) -> Prompts:
        """Choose and build the prompts of a batch."""

    def observe(self, seen: Observation) -> None:
        """Take statistics of a training step; sums over processes are the pool's business."""

    def update_factors(self) -> dict[str, Tensor]:
        """Factors in [0, 1], by parameter name, that scale the steps an optimizer takes (broadcast to the parameter)."""
        return {}


def initial(init: str, *size: int) -> nn.Parameter:
    """A new trainable tensor.

    Args:
        init: "uniform" U(-1, 1), "small_uniform" U[0, 0.01), "normal" (std 0.02) or "zeros".
        size: its shape.
    """
    values = torch.empty(*size)
    if init == "uniform":
        values.uniform_(-1.0, 1.0)
    elif init == "small_uniform":
        values.uniform_(0.0, 0.01)
    elif init == "normal":
        values.normal_(std=0.02)
    else:
        values.zero_()
    return nn.Parameter(values)
