"""RanPAC's closed-form head (McDonnell et al., NeurIPS 2023): ridge regression on random ReLU features.

    h = relu(x P),  P [D, M] random and fixed;   G = sum of h h',  B = sum of h y' over all images so far
    logits = h W,   W = (G + ridge * I)^-1 B

G and B are sums, so W does not depend on the order of tasks, and no image is kept. The ridge is the candidate with the
smallest squared error on every fifth image of the newest task, when fitted to all other images so far. With fewer than five
images it is the largest candidate.

If features change from task to task, sums of old features are out of date. Then each class has a Gaussian that follows the
drift, and G, B and the held-out features are drawn from the Gaussians of all classes (ours).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.heads.base import FeatureClassifier
from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.sampling import FeatureSampler


# Candidates for the ridge, in units of the mean diagonal of G.
RELATIVE_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT_EVERY = 5


Parts = Iterable[tuple[Tensor, Tensor]]  # features [n, D] and targets [n] of some images at a time


class RidgeClassifier(FeatureClassifier):
    """Ridge regression from random ReLU features to the classes: RanPAC's head, McDonnell et al., NeurIPS 2023.

    h = relu(x P), logits = h (G + ridge I)^-1 B, where G is the sum of h h' and B that of h y' over all images so far.

    Args:
        width: size D of the features.
        projection_size: M; 0: no projection, h = (x, 1).
        ridge: None: chosen on held-out training images.
        drift: "none": exact sums, for features that do not change. "shift" or "affine": sums over features drawn from the
            Gaussians of all classes, which follow the drift (ours).
        seed: of the projection and, with drift, of the drawn features.
        samples: features drawn from each class, with drift.
        kind: of `ClassGaussians`, with drift.
        rank: of `ClassGaussians` of kind "low_rank".
        save_statistics: save what learning further tasks needs (G alone has M * M numbers).

    Attributes:
        projection: P [D, M].
        solution: W [M, C].
        gram, sums: G [M, M] and B [M, C] in float64 (float32 on Apple's devices); without rows if they are not available.
        chosen_ridge: the ridge of the solution.
    """

    # Both chosen on held-out training images: the second of CIFAR-100 mini and of four data sets in a row.
    score_width = 0.1
    temperature_power = -0.22

    projection: Tensor
    solution: Tensor
    gram: Tensor
    sums: Tensor
    chosen_ridge: Tensor

    def __init__(
        self,
        width: int,
        *,
        projection_size: int = 5000,
        ridge: float | None = None,
        drift: str = "affine",
        seed: int = 0,
        samples: int = 100,
        kind: str = "low_rank",
        rank: int | None = None,
        save_statistics: bool = False,
    ) -> None:
        super().__init__(save_statistics=save_statistics, drift=drift)
        self.width, self.size, self.ridge = width, projection_size or width + 1, ridge
        self.seed, self.samples = seed, samples
        projection = torch.empty(width, projection_size)
        if projection.device.type != "meta":  # where only shapes are needed
            generator = torch.Generator().manual_seed(seed)
            projection.copy_(torch.randn(width, projection_size, generator=generator, device="cpu"))
        self.register_buffer("projection", projection)
        self.register_buffer("solution", torch.zeros(self.size, 0))
        self.register_buffer("chosen_ridge", torch.zeros((), dtype=torch.float64))
        saved = save_statistics and drift == "none"
        rows = self.size if saved else 0
        self.register_buffer("gram", torch.zeros(rows, rows, dtype=torch.float64), persistent=saved)
        self.register_buffer("sums", torch.zeros(rows, 0, dtype=torch.float64), persistent=saved)
        if drift != "none":
            self.gaussians = ClassGaussians(width, kind, rank=rank, save=save_statistics)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep sums in float64 when a model is cast, except on Apple's devices, which have no float64."""
        sums = ("gram", "sums", "chosen_ridge")
        if fn(self.fitted).device.type == "mps":
            for name in sums:
                setattr(self, name, getattr(self, name).float())
            return super()._apply(fn, recurse)
        super()._apply(fn, recurse)
        for name in sums:
            setattr(self, name, getattr(self, name).double())
        return self

    @property
    def statistics(self) -> str:  # type: ignore[override]
        """What `save_statistics` saves."""
        return "Gram matrix and class sums" if self.drift == "none" else "class means and covariances"

    @property
    def lighter(self) -> str:  # type: ignore[override]
        """Settings with which a class's statistics take less memory."""
        return "a smaller projection_size" + (f", or {super().lighter}" if self.drift != "none" else "")

    @property
    def bytes_to_learn(self) -> int:
        """Bytes of a second G, of a Cholesky factor, and of the sums and Gaussians that have no room."""
        sums = self.size * self.num_classes - self.sums.numel()
        return 8 * (3 * self.size**2 - self.gram.numel() + sums) + super().bytes_to_learn

    @property
    def bytes_per_class(self) -> int:
        """Bytes of a column of W and of B, and of a Gaussian."""
        return self.size * (4 + 8 * (self.drift == "none")) + super().bytes_per_class

    def make_room(self) -> None:
        """Allocate G and B, or the rows of the Gaussians."""
        if self.drift != "none":
            self.gaussians.make_room()
        elif not self.gram.shape[0]:
            self._new_sums()

    def _new_sums(self) -> None:
        self.gram, self.sums = self.gram.new_zeros(self.size, self.size), self.sums.new_zeros(self.size, self.num_classes)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add columns for the task's classes."""
        super().begin_task(class_indices)
        added = self.num_classes - self.solution.shape[1]
        self.solution = F.pad(self.solution, (0, added))
        self.sums = F.pad(self.sums, (0, added))
        if self.drift != "none":
            self.gaussians.begin_task(class_indices)

    def _fit(self, features: Tensor, targets: Tensor, before: Tensor | None, head: IncrementalHead | None) -> None:
        if self.drift == "none":
            self.gram, self.sums = self.gram.clone(), self.sums.clone()
            held = torch.zeros(features.shape[0], dtype=torch.bool, device=features.device)
            if self.ridge is None:
                held[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
            self._add(_in_parts(features[~held], targets[~held]))
            ridge = self._choose(_in_parts(features[held], targets[held]))
            self._add(_in_parts(features[held], targets[held]))
        else:
            if before is not None and int(self.fitted):
                self.gaussians.move(self._map(before, features))
            self.gaussians.add(features, targets)
            ridge = self._draw_sums()
        self._set_solution(ridge)

    def _draw_sums(self) -> float:
        """Compute G and B from drawn features. Returns the ridge."""
        self._new_sums()
        sampler = self.gaussians.sampler(own=0.5, spherical=1e-4)
        self._add(self._drawn(sampler, 0))
        return self._choose(self._drawn(sampler, 1))

    def _group(self, groups: ClassGroups, head: IncrementalHead) -> None:
        # W is linear in B, so columns can be added. G stays: it is a sum over the images of all classes.
        self.sums, self.solution = groups.reduce(self.sums, 1), groups.reduce(self.solution, 1)
        if self.drift != "none" and self.gaussians.count.shape[0]:
            self._set_solution(self._draw_sums())

    def _set_solution(self, ridge: float) -> None:
        self.chosen_ridge = torch.full_like(self.chosen_ridge, ridge)
        # Contiguous as after loading: products with a column-major matrix differ in the last bit.
        self.solution = self._solve(ridge).float().contiguous()
        if self.drift != "none":  # they are drawn again after the next task
            self.gram, self.sums = self.gram.new_zeros(0, 0), self.sums.new_zeros(0, self.num_classes)

    def _drawn(self, sampler: FeatureSampler, stream: int) -> Parts:
        generator = torch.Generator().manual_seed(2 * (self.seed * 1_000_003 + self.num_tasks) + stream)
        return sampler.by_class(self.samples, generator)

    def _hidden(self, features: Tensor) -> Tensor:
        """h [n, M] in the type of `features`."""
        if self.projection.shape[1]:
            return (features @ self.projection.to(features.dtype)).relu()
        return F.pad(features, (0, 1), value=1.0)

    def _add(self, parts: Parts) -> None:
        for features, targets in parts:
            hidden = self._hidden(features.double())
            self.gram.addmm_(hidden.T, hidden)
            self.sums.index_add_(1, targets, hidden.T)

    def _scale(self) -> float:
        return float(self.gram.diagonal().mean()) or 1.0  # 0 where all features are

    def _choose(self, parts: Parts) -> float:
        """The candidate with the smallest squared error on held-out features, given in `parts`."""
        if self.ridge is not None:
            return self.ridge
        candidates = [relative * self._scale() for relative in RELATIVE_RIDGES]
        solutions = torch.cat([self._solve(ridge) for ridge in candidates], 1)
        errors = self.sums.new_zeros(len(candidates))
        images = 0
        for features, targets in parts:
            target = F.one_hot(targets, self.num_classes).double()
            found = (self._hidden(features.double()) @ solutions).unflatten(1, (len(candidates), -1))
            errors += (found - target[:, None]).square().sum((0, 2))
            images += len(features)
        return candidates[int(errors.argmin())] if images else candidates[-1]

    def _solve(self, ridge: float) -> Tensor:
        diagonal = self.gram.diagonal().clone()  # in place of a copy of G
        self.gram.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(self.gram)
        self.gram.diagonal().copy_(diagonal)
        if failed:
            raise ValueError(f"ridge={ridge:g} is too small to solve for {self.size} random features: choose a larger one")
        return torch.cholesky_solve(self.sums, factor)

    def forward(self, features: Tensor) -> Tensor:
        """h W for `features` [B, D]: [B, C]."""
        self.check_fitted()
        # A class without images has zero weights; so have all classes where all features are 0.
        empty = (self.solution == 0).all(0)
        return (self._hidden(features.float()) @ self.solution).masked_fill(empty & ~empty.all(), float("-inf"))


def _in_parts(features: Tensor, targets: Tensor) -> Parts:
    return zip(features.split(1024), targets.split(1024), strict=True) if len(features) else ()
