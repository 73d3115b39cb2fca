"""The trained classifier: a layer with one logit per class, which grows when new classes come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.interfaces import IGNORE_INDEX


class IncrementalHead(nn.Module):
    """Linear or cosine classifier over the classes known so far, in the order in which they came.

    Args:
        width: size D of the features it reads.
        cosine_scale: None for w.x + b; s for s * cos(w, x), without a bias.
        layer_norm: with a scale, x enters with mean 0 and variance 1 (a layer norm without weights) in place of length 1.

    Attributes:
        weight: [C, D]. New rows are drawn from a normal of std 0.02 cut at two, as timm's head in the released L2P code.
        bias: [C], new entries 0; None for the cosine classifier.
        current: True for the classes of the current task [C].
    """

    bias: nn.Parameter | None
    sorted_ids: Tensor
    sorted_indices: Tensor
    current: Tensor

    def __init__(self, width: int, cosine_scale: float | None = None, *, layer_norm: bool = False) -> None:
        super().__init__()
        self.cosine_scale, self.layer_norm = cosine_scale, layer_norm
        self.weight = nn.Parameter(torch.empty(0, width))
        self.bias = nn.Parameter(torch.empty(0)) if cosine_scale is None else None
        # Class ids in ascending order, and the index of the logit of each: a lookup table for any integers. They follow
        # from the learner's tasks, so they are not saved.
        self.register_buffer("sorted_ids", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("sorted_indices", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("current", torch.empty(0, dtype=torch.bool), persistent=False)

    def expand(self, known: Sequence[int], current: Sequence[int]) -> None:
        """Grow to more classes.

        Args:
            known: all class ids; those known before come first, in their order.
            current: class ids of the current task.
        """
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
        # The lookup tables are made on the CPU, also under a meta device (PEFT's low_cpu_mem_usage): no file fills them.
        order = torch.tensor(sorted(range(len(known)), key=known.__getitem__), dtype=torch.int64, device="cpu")
        ids = torch.tensor(list(known), dtype=torch.int64, device="cpu")
        members = set(current)
        mask = torch.tensor([c in members for c in known], dtype=torch.bool, device="cpu")
        target = "cpu" if device.type == "meta" else device
        self.sorted_ids, self.sorted_indices, self.current = ids[order].to(target), order.to(target), mask.to(target)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, C], in float32."""
        features = self.read(features)
        if self.cosine_scale is None:
            return F.linear(features, self.weight, self.bias)
        return self.cosine_scale * F.linear(features, F.normalize(self.weight, dim=1))

    def read(self, features: Tensor) -> Tensor:
        """What the weights are multiplied by, for features [B, D]."""
        features = features.float()
        if self.cosine_scale is None:
            return features
        return F.layer_norm(features, features.shape[1:]) if self.layer_norm else F.normalize(features, dim=1)

    def to_targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The index of the logit of each label's class.

        Args:
            labels: class ids [B]; -100 for padding.

        Returns:
            indices [B] int64, -100 for padding and unknown classes; and a mask of the labels of unknown classes [B].
        """
        position = torch.searchsorted(self.sorted_ids, labels).clamp_max(len(self.sorted_ids) - 1)
        found = self.sorted_ids[position] == labels
        targets = torch.where(found, self.sorted_indices[position], IGNORE_INDEX)
        return targets, ~found & (labels != IGNORE_INDEX)
