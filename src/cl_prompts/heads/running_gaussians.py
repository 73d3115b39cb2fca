"""Gaussians of each class's features, kept while the head is trained, and the head's expected cross entropy on them.

In a task of one class no image shows the head what the class differs from, and a softmax over one class has no gradient.
The head is then trained on the Gaussians of all classes seen so far. No image is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.sampling import FeatureSampler
from cl_prompts.runtime.distributed import sum_over_processes, world_size
from cl_prompts.runtime.gathered import GatheredStatistics


# Older images of a class count as this many, because features change in training.
WINDOW = 256


class RunningGaussians(GatheredStatistics):
    """Running mean and variance of each class's features as the trained head reads them (`IncrementalHead.read`).

    Args:
        width: size D of the features.
        save: whether the tensors are saved.

    Attributes:
        mean: [C, D].
        variance: [C, D].
        count: number of images [C].
        newest: class indices of the current task; not saved.
        num_loaded: number of classes whose head came from a file or state dict without these tensors.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    newest: Tensor

    def __init__(self, width: int, *, save: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(0, width), persistent=save)
        self.register_buffer("variance", torch.zeros(0, width), persistent=save)
        self.register_buffer("count", torch.zeros(0, dtype=torch.int64), persistent=save)
        self.register_buffer("newest", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.num_loaded = 0
        self.register_load_state_dict_pre_hook(_note_missing)

    def expand(self, num_classes: int, newest: Sequence[int]) -> None:
        """Grow to `num_classes` classes; `newest` are the class indices of the current task."""
        added = num_classes - len(self.count)
        self.mean, self.variance = F.pad(self.mean, (0, 0, 0, added)), F.pad(self.variance, (0, 0, 0, added))
        self.count = F.pad(self.count, (0, added))
        # On the CPU also under a meta device (PEFT's low_cpu_mem_usage): no file fills it.
        indices = torch.tensor(list(newest), dtype=torch.int64, device="cpu")
        self.newest = indices if self.count.is_meta else indices.to(self.count.device)

    def seen(self) -> list[bool]:
        """For each class, whether its features are known. Those of classes that were not loaded count as known."""
        loaded: list[int] = self.count[: self.num_loaded].tolist()
        return [*map(bool, loaded), *[True] * (len(self.count) - len(loaded))]

    @torch.no_grad()
    def group_classes(self, groups: ClassGroups) -> None:
        """Keep the rows of the classes in `groups`; merged ones become one Gaussian. Call `expand` afterwards."""
        loaded = sum(min(group) < self.num_loaded for group in groups.members)
        old, mean, variance = self.count, self.mean, self.variance
        self.count, self.mean, self.variance = (groups.reduce(tensor, 0) for tensor in (old, mean, variance))
        for new, group in enumerate(groups.members):
            if len(group) > 1:
                share = (old[group] / old[group].sum().clamp_min(1))[:, None]
                self.mean[new] = (share * mean[group]).sum(0)
                self.variance[new] = (share * (variance[group] + (mean[group] - self.mean[new]).square())).sum(0)
        self.num_loaded = loaded

    def sampler(self) -> FeatureSampler:
        """A sampler of what the head reads of images of every class."""
        indices, deviations = range(len(self.count)), self.variance.sqrt()
        return FeatureSampler(self.mean[:, None], self.count[:, None], indices, deviations=deviations[:, None])

    @torch.no_grad()
    def update(self, head: IncrementalHead, features: Tensor, targets: Tensor) -> None:
        """Add the images of a training step. Those of other processes are added with `gather`.

        What a step adds to a class depends on how many images of it all processes have, so these numbers are summed here.

        Args:
            head: the trained head.
            features: its input [B, D].
            targets: class index of each image [B]; -100 for padding. Images of other tasks are left out.
        """
        member = targets[:, None] == self.newest
        # Relative to the mean when they were gathered, because differences of large squares lose digits.
        moved = head.read(features) - self.mean[targets.clamp_min(0)]
        moved = torch.where(member.any(1, keepdim=True), moved, 0.0)  # padding may be NaN, and 0 * NaN is NaN
        moved = moved if moved.device.type == "mps" else moved.double()
        weights, images = member.to(moved.dtype).T, sum_over_processes(member.sum(0))
        before = self.count[self.newest]
        self.count.index_copy_(0, self.newest, before + images)
        own = torch.cat([weights @ moved, weights @ moved.square()], 1) / images.clamp_min(1)[:, None]
        share = (images / (before.clamp_max(WINDOW) + images).clamp_min(1)).to(moved.dtype)[:, None]
        moments, kept = self.waiting or (torch.zeros_like(own), torch.ones_like(share))
        self.waiting = (torch.lerp(moments, own, share), kept * (1 - share))
        if world_size() == 1:
            self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """See `GatheredStatistics`. Of `waiting`, the moments [C, 2 D] are summed, and what is kept of old ones is not."""
        if self.waiting:
            moments, kept = self.waiting
            self.waiting = ()
            change, squares = sum_over_processes(moments).chunk(2, dim=1)
            variance = kept * self.variance[self.newest] + (squares - change.square()).clamp_min(0)
            self.variance.index_copy_(0, self.newest, variance.to(self.variance.dtype))
            self.mean.index_copy_(0, self.newest, (self.mean[self.newest] + change).to(self.mean.dtype))

    def cross_entropy(self, head: IncrementalHead) -> Tensor:
        """The head's expected cross entropy on the Gaussians of the classes seen, each class with the same weight.

        For a feature x ~ N(mean_c, variance_c) of class c the expectation of log sum_j exp(z_j(x) - z_c(x)) is at most
        log sum_j exp of (mean + variance / 2) of z_j - z_c, with equality for variance 0. The upper bound is what Wang et
        al., "Implicit Semantic Data Augmentation for Deep Networks", NeurIPS 2019, minimize in place of drawing features.

        Returns:
            A scalar with gradient to the head; 0 if fewer than two classes have been seen.
        """
        weight = head.weight if head.cosine_scale is None else head.cosine_scale * F.normalize(head.weight, dim=1)
        logits = F.linear(self.mean, weight, head.bias)
        # variance_c * (w_j - w_c)^2, summed over D
        own = self.variance * weight
        spread = self.variance @ weight.square().T - 2 * own @ weight.T + (own * weight).sum(1, keepdim=True)
        seen = self.count > 0
        bound = (logits + spread / 2).masked_fill(~seen, torch.finfo(logits.dtype).min).logsumexp(1) - logits.diagonal()
        return torch.where(seen, bound, 0.0).sum() / seen.sum().clamp_min(1)


def _note_missing(gaussians: RunningGaussians, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Hook of `load_state_dict`: remember whether the state has the tensors; it need not have them."""
    if f"{prefix}count" not in state_dict:
        gaussians.num_loaded = len(gaussians.count)
