"""PackNet."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.baselines.masked_linear import computing, masked_linear_layers, with_masks
from cl_prompts.baselines.task_networks import TaskNetworks
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.learner.nested_tensors import below, prefixed
from cl_prompts.learner.protocol import Images
from cl_prompts.runtime.distributed import sum_over_processes


class PackNet(TaskNetworks):
    """Each task keeps its largest weights; the others are set to zero and left to later tasks.

    Mallya & Lazebnik, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning", CVPR 2018, section 3. When
    a task has been trained, in each linear layer of the blocks the smallest `prune` of the weights that no earlier task
    kept become zero and free; the kept ones are trained for `retrain_epochs` more and never change again:

        w_i is used by task t iff owner_i <= t,  and trained in task t iff it is free

    All other parameters of the backbone are trained in the first task and then frozen. An optimizer step on a frozen weight
    is undone, so that weight decay and momentum do not move it either.

    Where it differs: retraining is by SGD with momentum 0.9 on un-augmented images, in `consolidate`.

    Args:
        backbone: see `Baseline`.
        prune: share of the free weights that a task gives back, 0.5 to 0.75 in the paper.
        retrain_epochs: epochs after pruning; the paper trains half as long as before.
        retrain_rate: their learning rate.
        options: see `Baseline`.

    Attributes:
        owners: by name of a layer, 1 + number of the task that keeps each weight, 0 for a free one [out, in].
    """

    name = "packnet"
    needs_consolidation = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        prune: float = 0.5,
        retrain_epochs: int = 2,
        retrain_rate: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.prune, self.retrain_rate = self.number("prune", prune), self.number("retrain_rate", retrain_rate)
        self.retrain_epochs = int(self.number("retrain_epochs", retrain_epochs))
        if not 0 < prune < 1:
            raise ValueError(f"prune={prune} must be between 0 and 1: the share of free weights that a task gives back")
        self.layers = masked_linear_layers(self.features)
        weights = {name: layer.weight for name, layer in self.layers.items() if layer.weight.requires_grad}
        self.owners = {name: torch.zeros_like(weight, dtype=torch.int16) for name, weight in weights.items()}

    def network(self, task: int) -> AbstractContextManager[None]:
        """The weights that `task` and earlier ones keep, and for the newest task the free ones."""
        if task == self.num_tasks - 1:
            return nullcontext()
        owned = {self.layers[name]: (owner > 0) & (owner <= task + 1) for name, owner in self.owners.items()}
        return computing(with_masks({layer: mask.to(layer.weight.device) for layer, mask in owned.items()}))

    def update_factors(self) -> dict[str, Tensor]:
        """Free weights are trained, before pruning; those that the task keeps, after it."""
        pruned = any((owner == self.num_tasks).any() for owner in self.owners.values())
        trained = self.num_tasks if pruned else 0
        first = torch.tensor(float(self.num_tasks == 1))
        factors = {name: first for name in self.trained() if name.startswith("features.")}
        factors |= {f"features.base.{name}.weight": (owner == trained).float() for name, owner in self.owners.items()}
        return factors | self.current_rows()

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Prune, and train what is left on the task's `images`; `memory` is not used."""
        with torch.no_grad():
            for name, owner in self.owners.items():
                weight = self.layers[name].weight
                owner = owner.to(weight.device)
                free = owner == 0
                order = weight[free].abs().argsort(stable=True)
                kept = torch.full_like(order, self.num_tasks, dtype=owner.dtype)
                kept[order[: round(self.prune * len(order))]] = 0
                owner[free] = kept
                weight[owner == 0] = 0.0
                self.owners[name] = owner
        self._retrain(images)

    @torch.enable_grad()
    def _retrain(self, images: Images) -> None:
        optimizer = torch.optim.SGD(self.parameter_groups(self.retrain_rate), momentum=0.9)
        self.attach_optimizer(optimizer)
        parameters = list(self.trained().values())
        for _ in range(self.retrain_epochs):
            for batch in images:
                targets, _ = self.head.to_targets(batch["labels"])
                logits = self.masked(self.logits_of(self.features_of(batch)))
                total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
                loss = total / sum_over_processes((targets >= 0).sum()).clamp_min(1)
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = sum_over_processes(gradient)
                optimizer.step()
                optimizer.zero_grad()
        self.detach_optimizer()

    def extra_tensors(self) -> dict[str, Tensor]:
        """Which task keeps each weight."""
        return super().extra_tensors() | prefixed("owner.", self.owners)

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore it."""
        super().load_extra_tensors(tensors)
        self.owners = below("owner.", tensors)
