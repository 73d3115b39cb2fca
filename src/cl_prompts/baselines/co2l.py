"""Co2L: contrastive continual learning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.backbones.feature_extractor import FeatureExtractor
from cl_prompts.baselines.base import Baseline
from cl_prompts.baselines.batch import Batch
from cl_prompts.baselines.views import second_view
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.features import record
from cl_prompts.learner.nested_tensors import below, prefixed
from cl_prompts.learner.protocol import Images
from cl_prompts.runtime.distributed import gather_with_gradient
from cl_prompts.runtime.precision import device_of_float64


class Co2L(Baseline):
    """Features are learned by a contrastive loss and held by their similarities; a linear head is fitted after each task.

    Cha, Lee & Shin, "Co2L: Contrastive Continual Learning", ICCV 2021. With z the projected features of two views of each
    image, of length 1, S the views of the current task's images and P_i the other views of the class of view i:

        contrastive = mean over i in S of -1/|P_i| sum over j in P_i of
                      log( exp(z_i z_j / temperature) / sum over k != i of exp(z_i z_k / temperature) )   (equation 2)
        distillation = mean over i of -sum over j != i of p_ij(before) log p_ij(now),
                       p_ij = softmax over j != i of z_i z_j / kappa   (equations 3 to 5)

    Remembered images are no anchors, but positives and negatives of others, also where their classes come back, as in a new
    domain. Only in a batch of nothing but remembered images, as when a task brings all of them again, each one is. "Before"
    is the model at the end of the earlier task. The head is decoupled: it is fitted to the features of the task's and of
    the remembered images, with the same weight for each class, and no gradient of it reaches the backbone.

    Where it differs: the second view is a random crop, the first the image as the stream gives it; the head is fitted to
    the end with a little weight decay, in place of 100 epochs of SGD. With gradient accumulation, views are compared
    within one part of a batch.

    Args:
        backbone: see `Baseline`.
        temperature: of the contrastive loss, 0.5 as for split CIFAR-10 in the paper.
        strength: weight of the distillation, 1 in the paper.
        teacher_temperature: kappa before, 0.01 in the paper.
        student_temperature: kappa now, 0.2 in the paper.
        projection_size: of z, 128 in the paper.
        options: see `Baseline`.

    Attributes:
        snapshot: backbone and projector at the end of the earlier task; None in the first.
        stored_numbers: `sample_ids` of the remembered images [n].
        steps: number of optimizer steps so far.
    """

    name = "co2l"
    replay = "mixed"
    needs_memory = True
    needs_consolidation = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.5,
        strength: float = 1.0,
        teacher_temperature: float = 0.01,
        student_temperature: float = 0.2,
        projection_size: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.strength = self.number("strength", strength)
        temperatures = {
            "temperature": temperature,
            "teacher_temperature": teacher_temperature,
            "student_temperature": student_temperature,
        }
        for name, value in temperatures.items():
            if self.number(name, value) == 0:
                raise ValueError(f"{name}=0 would divide by zero: choose a positive number")
        self.temperature, self.kappa_before, self.kappa_now = temperatures.values()
        self.head.requires_grad_(False)
        self.projector = make_projector(self.features.width, int(self.number("projection_size", projection_size)))
        self.snapshot: Snapshot | None = None
        self.stored_numbers = torch.zeros(0, dtype=torch.int64)
        self.steps = 0

    def groups(self) -> dict[str, list[nn.Module]]:
        """The backbone, and the projector with the rate of a head."""
        return {"base": [self.features], "head": [self.projector]}

    def before_task(self, classes: Sequence[int]) -> None:
        """Copy the model as it is, before a task of `classes`."""
        if self.classes:
            self.snapshot = Snapshot(self.features, self.projector)

    def after_step(self) -> None:
        """Count the step."""
        self.steps += 1

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """The contrastive loss and, from the second task on, the distillation."""
        other = second_view(batch.pixel_values, batch.numbers, self.steps)
        features = [batch.features, self.compute_features(other, **batch.inputs)]
        rows = gather_with_gradient(torch.cat([F.normalize(self.projector(f), dim=1) for f in features], 1))
        new = ~torch.isin(batch.numbers, self.stored_numbers.to(batch.numbers.device))
        known = torch.stack([batch.valid.float(), batch.targets.clamp_min(0).float(), new.float()], 1)
        valid, targets, anchors = gather_with_gradient(known).unbind(1)
        valid, columns = valid > 0, targets.long()
        anchors = (anchors > 0) | ~(anchors[valid] > 0).any()
        views = torch.cat(rows[valid].chunk(2, 1))
        loss = asymmetric_contrastive_loss(views, columns[valid].repeat(2), anchors[valid].repeat(2), self.temperature)
        parts = {"contrastive": LossPart(loss, "batch")}
        if self.snapshot is not None:
            before = [self.snapshot(images, **batch.inputs) for images in (batch.pixel_values, other)]
            seen = gather_with_gradient(torch.cat(before, 1))[valid]
            taught = log_relations(torch.cat(seen.chunk(2, 1)), self.kappa_before)
            own = log_relations(views, self.kappa_now)
            parts["distillation"] = LossPart(-self.strength * (taught.exp() * own).sum(1).mean(), "batch")
        return parts

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Fit the head to the features of the task's `images` and of those in `memory`.

        Raises:
            ValueError: no images are stored.
        """
        if memory is None:
            raise ValueError('"co2l" needs remembered images: set memory_size or memory_per_class')
        new, kept = record(self.features_of, images), record(self.features_of, memory)
        self.stored_numbers = kept.ids
        old = ~torch.isin(kept.ids, new.ids)
        features, labels = torch.cat([new.features, kept.features[old]]), torch.cat([new.labels, kept.labels[old]])
        targets, _ = self.head.to_targets(labels)
        weight, bias = fit_balanced(features, targets, len(self.classes))
        with torch.no_grad():
            self.head.weight.copy_(weight)
            assert self.head.bias is not None
            self.head.bias.copy_(bias)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Head, snapshot, numbers of the remembered images, and number of steps."""
        head = {name: p.detach() for name, p in self.head.named_parameters()}
        snapshot = {} if self.snapshot is None else self.snapshot.tensors()
        own = {"numbers": self.stored_numbers, "steps": torch.tensor(self.steps)}
        return prefixed("head.", head) | prefixed("snapshot.", snapshot) | own

    @torch.no_grad()
    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        for name, value in below("head.", tensors).items():
            self.head.get_parameter(name).copy_(value)
        found = below("snapshot.", tensors)
        self.snapshot = Snapshot(self.features, self.projector) if found else None
        for name, own in self.snapshot.tensors().items() if self.snapshot is not None else ():
            own.copy_(found[name])
        self.stored_numbers = tensors.get("numbers", self.stored_numbers)  # older files have none
        self.steps = int(tensors["steps"])


class Snapshot(nn.Module):
    """A frozen copy of backbone and projector, always in eval mode.

    Args:
        features, projector: copied.
    """

    def __init__(self, features: FeatureExtractor, projector: nn.Module) -> None:
        super().__init__()
        trained = [f"features.{name}" for name, p in features.named_parameters() if p.requires_grad]
        self.names = trained + [f"projector.{name}" for name, _ in projector.named_parameters()]
        self.features = copy.deepcopy(features).requires_grad_(False)
        self.projector = copy.deepcopy(projector).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Snapshot:
        """Always in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Projected features [B, P] of length 1 of images [B, 3, H, W]; `kwargs` are further inputs of the backbone."""
        return F.normalize(self.projector(self.features(pixel_values, **kwargs)), dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Copied tensors by name, without those of the backbone that are never trained."""
        return {name: self.get_parameter(name) for name in self.names}


def make_projector(width: int, size: int) -> nn.Sequential:
    """An MLP of one hidden layer, features [B, width] -> [B, size]."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size))


def log_relations(views: Tensor, temperature: float) -> Tensor:
    """Log of the softmax of each view's similarities to the others [n, n], for views [n, P] of length 1; 0 at itself."""
    own = torch.eye(len(views), dtype=torch.bool, device=views.device)
    similarities = (views @ views.T / temperature).masked_fill(own, float("-inf"))
    return similarities.log_softmax(1).masked_fill(own, 0.0)


def asymmetric_contrastive_loss(views: Tensor, labels: Tensor, anchors: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss of the anchors among views, a scalar (equation 2).

    Args:
        views: of length 1 [n, P].
        labels: classes of the views [n].
        anchors: which views are anchors [n].
        temperature: of the similarities.
    """
    own = torch.eye(len(views), dtype=torch.bool, device=views.device)
    positives = ((labels[:, None] == labels[None]) & ~own).float()
    each = -(positives * log_relations(views, temperature)).sum(1) / positives.sum(1).clamp_min(1)
    return torch.where(anchors, each, 0.0).sum() / anchors.sum().clamp_min(1)


def fit_balanced(features: Tensor, targets: Tensor, classes: int, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] with the smallest mean cross entropy over classes, each of which counts the same.

    Args:
        features: [n, D].
        targets: index of each image's class [n].
        classes: number C of classes.
        decay: times the squared norm of weight and bias joins the loss, in units of standardized features.
    """
    home, work = features.device, device_of_float64(features.device)
    rows, targets = features.to(work).double(), targets.to(work)
    center, spread = rows.mean(0), rows.std(0, unbiased=False).clamp_min(1e-6)
    rows = (rows - center) / spread
    shares = 1.0 / torch.bincount(targets, minlength=classes).clamp_min(1)[targets].double()
    shares /= shares.sum()
    found = torch.zeros(classes, rows.shape[1] + 1, dtype=torch.float64, device=rows.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(rows, found[:, :-1], found[:, -1])
        loss = (shares * F.cross_entropy(logits, targets, reduction="none")).sum() + decay * found.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight = found.detach()[:, :-1] / spread
    return weight.float().to(home), (found.detach()[:, -1] - weight @ center).float().to(home)
