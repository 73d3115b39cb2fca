"""The growing classifier: a layer whose columns follow the classes in the order they were declared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.interfaces import IGNORE_INDEX


class IncrementalHead(nn.Module):
    """Linear or cosine classifier over the classes known so far.

    Args:
        width: size D of the features it reads.
        cosine_scale: None for w.x + b; s for s * cos(w, x), without a bias.

    `weight` [C, D] and, for the linear one, `bias` [C]; new rows are drawn from a normal of std 0.02 cut at two, biases
    are 0 (timm's head, as in the released L2P code).
    """

    bias: nn.Parameter | None
    ids: Tensor
    columns: Tensor
    current: Tensor

    def __init__(self, width: int, cosine_scale: float | None = None) -> None:
        super().__init__()
        self.cosine_scale = cosine_scale
        self.weight = nn.Parameter(torch.empty(0, width))
        self.bias = nn.Parameter(torch.empty(0)) if cosine_scale is None else None
        # Class ids in ascending order and the column of each: a look-up that works for any integers. They follow from the
        # adapter's state, so they are not saved.
        self.register_buffer("ids", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("columns", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("current", torch.empty(0, dtype=torch.bool), persistent=False)

    def declare(self, known: Sequence[int], task: Sequence[int]) -> None:
        """Grow to the classes `known` (old ones first, in their order) and make `task` the current ones."""
        added = len(known) - len(self.weight)
        device = self.weight.device
        if added:
            rows = torch.empty(added, self.weight.shape[1], device=device, dtype=self.weight.dtype)
            nn.init.trunc_normal_(rows, std=0.02, a=-0.04, b=0.04)
            grad = self.weight.requires_grad
            self.weight = nn.Parameter(torch.cat([self.weight.detach(), rows]), requires_grad=grad)
            if self.bias is not None:
                bias = torch.cat([self.bias.detach(), self.bias.detach().new_zeros(added)])
                self.bias = nn.Parameter(bias, requires_grad=grad)
        # The look-ups are made on the host, where a meta device (PEFT's low_cpu_mem_usage) cannot reach them.
        order = torch.tensor(sorted(range(len(known)), key=known.__getitem__), dtype=torch.int64, device="cpu")
        ids = torch.tensor(list(known), dtype=torch.int64, device="cpu")
        members = set(task)
        current = torch.tensor([c in members for c in known], dtype=torch.bool, device="cpu")
        where = "cpu" if device.type == "meta" else device
        self.ids, self.columns, self.current = ids[order].to(where), order.to(where), current.to(where)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, C], in float32."""
        features = features.float()
        if self.cosine_scale is None:
            return F.linear(features, self.weight, self.bias)
        return self.cosine_scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))

    def to_columns(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of class ids [B] (ignored and unknown ones get -100), and a mask of the unknown ones [B]."""
        position = torch.searchsorted(self.ids, labels).clamp_max(len(self.ids) - 1)
        found = self.ids[position] == labels
        columns = torch.where(found, self.columns[position], IGNORE_INDEX)
        return columns, ~found & (labels != IGNORE_INDEX)
