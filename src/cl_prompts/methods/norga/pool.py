"""NoRGa: Non-linear Residual Gates (Le et al., "Mixture of Experts Meets Prompt-Based Continual Learning", NeurIPS 2024).

HiDe-Prompt (`methods/hide/pool.py`) with a gate on the attention logit z = q . k / sqrt(d) of each prefix key:

    z  ->  z + gate(z * a) * b

a and b are scalars of a layer for all tasks, trained in the first task and then frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_prompts.interfaces import BackboneShape, Prefix, PrefixKV
from cl_prompts.methods.hide.pool import HidePool
from cl_prompts.methods.shared.prefixes import prefix_of


GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


@dataclass
class GatedPrefix:
    """One layer's prefix with the gate as a bias of its attention logits; called inside the attention.

    Args:
        prefix: keys and values [B, H, P, d].
        scale: a and b [2].
        gate: name of the activation.
    """

    prefix: PrefixKV
    scale: Tensor
    gate: str

    def __call__(self, block_input: Tensor, queries: Tensor) -> PrefixKV:
        """The prefix for attention queries [B, H, N, d]. The gate is computed in float32."""
        with torch.autocast(queries.device.type, enabled=False):
            logits = queries.float() @ self.prefix.k.mT * queries.shape[-1] ** -0.5
            return replace(self.prefix, logit_bias=GATES[self.gate](logits * self.scale[0]) * self.scale[1])


class NorgaPool(HidePool):
    """The NoRGa pool: HiDe-Prompt's tensors and `gate_scale` [layers, 2], a Parameter in the first task, then a buffer."""

    # The gate has the learning rate of the prompts, as in the released code, unless `parameter_groups(routers=...)` is
    # given.
    roles: ClassVar[dict[str, str]] = {**HidePool.roles, "gate_scale": "routers"}
    gate_scale: Tensor

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self.gate_scale = nn.Parameter(torch.ones(len(config.layers), 2))

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """As for HiDe-Prompt; the second task freezes the gate."""
        if self.num_tasks == 1:
            learned = self.gate_scale.detach().clone()
            del self.gate_scale
            self.register_buffer("gate_scale", learned)
        super().begin_task(class_indices)

    def prefix(self, row: int, keys: Tensor, values: Tensor) -> Prefix:
        """The gated prefix of the pool's layer number `row`, for `keys` [B, Lp, D] and `values` [B, Lp, D]."""
        return GatedPrefix(prefix_of(keys, values, self.shape.num_heads), self.gate_scale[row], self.config.gate)
