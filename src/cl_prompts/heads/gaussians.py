"""Gaussians of the features of each class. They are kept in place of old images; drift compensation moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from cl_prompts.heads.drift import FeatureMap
from cl_prompts.heads.low_rank import default_rank, leading_factor
from cl_prompts.heads.regularized import cholesky, regularize
from cl_prompts.heads.sampling import FeatureSampler


KINDS = ("low_rank", "full", "shared", "diagonal", "centroids")
COLUMNS = 128  # of a moved covariance at a time: all in float64 would take twice its memory


class ClassGaussians(nn.Module):
    """Means and covariances of features, for each class of each task. A class that returns has one Gaussian per task.

    `move` replaces tensors, and `add` writes into the newest task's rows only, so that a fit can be undone without a second
    copy of all rows: put the tensors of before back, and give `restore_newest` the `newest_rows` of before.

    Args:
        width: size D of the features.
        kind: "low_rank" (one pooled covariance and a factor of rank r per class, `leading_factor`), "full" (one covariance
            [D, D] per class), "shared" (one for all), "diagonal" (variances [D] per class) or "centroids" (means and
            variances of `centroids` clusters per class).
        rank: r, for "low_rank"; None: `default_rank`.
        centroids: number of clusters of a class, for "centroids".
        save: whether the tensors are saved. If not, they have no rows until `make_room`.

    Raises:
        ValueError: an unknown kind.
        ImportError: "centroids" without scikit-learn.

    Attributes:
        mean: [rows, K, D] for K clusters; K = 1 except for "centroids".
        spread: covariances [rows, 1, D, D], or [D, D] if shared or low-rank, or variances [rows, K, D].
        factor: F of each row [rows, r, D], for "low_rank".
        rest: share of the pooled covariance in a row's own covariance [rows], for "low_rank": F'F + rest * pooled.
        count: number of images [rows, K].
        class_indices: class index of each row.
    """

    mean: Tensor
    spread: Tensor
    factor: Tensor
    rest: Tensor
    count: Tensor

    def __init__(
        self, width: int, kind: str = "low_rank", *, rank: int | None = None, centroids: int = 10, save: bool = True
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {KINDS}")
        if kind == "centroids" and find_spec("sklearn") is None:
            raise ImportError("kind='centroids' needs scikit-learn: pip install 'cl-prompts[train]'")
        self.kind, self.width, self.save = kind, width, save
        self.clusters = centroids if kind == "centroids" else 1
        # Whether `spread` is one covariance for all classes.
        self.pools = kind in ("low_rank", "shared")
        self.register_buffer("mean", torch.zeros(0, self.clusters, width), persistent=save)
        sizes = {"full": (0, 1, width, width)} | dict.fromkeys(("low_rank", "shared"), (width if save else 0, width))
        self.register_buffer("spread", torch.zeros(*sizes.get(kind, (0, self.clusters, width))), persistent=save)
        if kind == "low_rank":
            rows = min(default_rank(width) if rank is None else rank, width)
            self.register_buffer("factor", torch.zeros(0, rows, width), persistent=save)
            self.register_buffer("rest", torch.zeros(0), persistent=save)
        self.register_buffer("count", torch.zeros(0, self.clusters, dtype=torch.int64), persistent=save)
        self.class_indices: list[int] = []
        self._newest = slice(0, 0)

    @property
    def by_row(self) -> list[str]:
        """Names of the tensors with a row for each Gaussian."""
        return [name for name in self._buffers if not (name == "spread" and self.pools)]

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a further class."""
        tensors = [getattr(self, name) for name in self.by_row]
        return sum(t[:0].new_empty(1, *t.shape[1:], device="meta").numel() * t.element_size() for t in tensors)

    @property
    def bytes_without_room(self) -> int:
        """Bytes that `make_room` would allocate."""
        pooled = self.width * (self.width - self.spread.shape[0]) * self.spread.element_size() if self.pools else 0
        return (len(self.class_indices) - self.count.shape[0]) * self.bytes_per_row + pooled

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add a row for each of the next task's classes, `class_indices`."""
        self._newest = slice(len(self.class_indices), len(self.class_indices) + len(class_indices))
        self.class_indices += list(class_indices)
        if self.save or self.count.shape[0]:
            self.make_room()

    def forget_newest(self) -> None:
        """Take all rows for those of earlier tasks; only after a change of classes between tasks."""
        self._newest = slice(len(self.class_indices), len(self.class_indices))

    def newest_rows(self) -> dict[str, Tensor]:
        """A copy of the newest task's rows, for `restore_newest`; empty where they are zero, as before `add`."""
        if not self.count[self._newest].any():
            return {}
        return {name: getattr(self, name)[self._newest].clone() for name in self.by_row}

    def restore_newest(self, rows: dict[str, Tensor]) -> None:
        """Write `rows`, which `newest_rows` returned, into the newest task's rows."""
        for name in self.by_row:
            getattr(self, name)[self._newest] = rows.get(name, 0)

    def make_room(self) -> None:
        """Allocate rows for all classes."""
        rows = len(self.class_indices) - self.count.shape[0]
        for name in self.by_row:
            self._append(name, rows)
        if self.pools:
            self._append("spread", self.width - self.spread.shape[0])

    def _append(self, name: str, rows: int) -> None:
        tensor = getattr(self, name)
        setattr(self, name, torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])]))

    @torch.no_grad()
    def move(self, change: FeatureMap) -> None:
        """Apply x -> x A + b of `change` to all rows but the newest task's, whose features are after the change."""
        matrix, old = change.matrix, slice(0, self._newest.start)
        mean = self.mean.clone()
        mean[old] = (mean[old].double() @ matrix + change.shift).to(mean)
        self.mean = mean
        if self.pools:
            half = matrix.T @ self.spread.double()
            self.spread = torch.cat([(half @ part).to(self.spread) for part in matrix.split(COLUMNS, 1)], 1)
        elif self.kind == "full":
            self._move_rows("spread", lambda each: matrix.T @ each @ matrix)
        else:
            spread = self.spread.clone()
            spread[old] = (spread[old].double() @ matrix.square()).to(spread)
            self.spread = spread
        if self.kind == "low_rank":
            self._move_rows("factor", lambda each: each @ matrix)

    def _move_rows(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Replace a tensor by one in which old rows are changed; `change` gets each in float64.

        One row after another: all of them in float64 would take twice their memory.
        """
        moved = getattr(self, name).clone()
        for row in range(self._newest.start):
            moved[row] = change(moved[row].double()).to(moved)
        setattr(self, name, moved)

    @torch.no_grad()
    def add(self, features: Tensor, targets: Tensor, seed: int = 0) -> None:
        """Compute the newest task's rows.

        The covariance of a single image is unknown: it is the pooled one of the classes that have more.

        Args:
            features: of its images [n, D].
            targets: class index of each image [n].
            seed: of the initial clusters.
        """
        # One class after another: float64 copies of all features would take four times their memory.
        scatter = None
        newest = range(self._newest.start, self._newest.stop)
        means = []
        if self.pools:
            scatter = self.spread.to(torch.float64, copy=True).mul_(self._pooled_images(self._newest.start))
        for row in newest:
            clusters = self._clusters(features[targets == self.class_indices[row]].double(), seed + row)
            self.count[row] = torch.tensor([len(cluster) for cluster in clusters])
            means.append(torch.stack([_mean(cluster) for cluster in clusters]))
            self.mean[row] = means[-1].to(self.mean)
            centered = [cluster - mean for cluster, mean in zip(clusters, means[-1], strict=True)]
            if scatter is not None:
                scatter.addmm_(centered[0].T, centered[0])
            else:
                of = _covariance if self.kind == "full" else _variances
                self.spread[row] = torch.stack([of(cluster) for cluster in centered]).to(self.spread)
        if scatter is None:
            if self.kind != "centroids":
                self._fill_single_images()
            return
        total = self._pooled_images(self._newest.stop)
        if total > self._pooled_images(self._newest.start):
            self.spread = scatter.div_(total).to(self.spread)
        del scatter
        if self.kind == "low_rank":
            self._add_factors(features, targets, [mean[0] for mean in means])

    def _pooled_images(self, rows: int) -> int:
        """What the pooled covariance of the first `rows` is divided by."""
        # The covariance of "shared" divides by the number of images, that of "low_rank" is unbiased.
        return int((self.count[:rows, 0] - int(self.kind == "low_rank")).clamp_min(0).sum())

    def _add_factors(self, features: Tensor, targets: Tensor, means: Sequence[Tensor]) -> None:
        """Compute the factors of the newest task, whose classes have these `means`."""
        root = cholesky(self.pooled(0.1))
        for row, mean in zip(range(self._newest.start, self._newest.stop), means, strict=True):
            centered = features[targets == self.class_indices[row]].double().sub_(mean)
            factor, rest = leading_factor(centered, root, self.factor.shape[1])
            self.factor[row], self.rest[row] = factor.to(self.factor), rest

    def _fill_single_images(self) -> None:
        weights = (self.count[:, 0] - 1).clamp_min(0)
        single = [row for row in range(self._newest.start, self._newest.stop) if int(self.count[row, 0]) == 1]
        if single and int(weights.sum()):
            self.spread[single] = self._weighted(weights.double() / weights.sum()).to(self.spread)

    def _weighted(self, weights: Tensor) -> Tensor:
        """Weighted sum of the rows' covariances or variances: float64 [1, D, D] or [K, D]."""
        pooled = torch.zeros_like(self.spread[0], dtype=torch.float64)
        for weight, each in zip(weights.tolist(), self.spread, strict=True):
            pooled.add_(each.double(), alpha=weight)
        return pooled

    def _clusters(self, features: Tensor, seed: int) -> list[Tensor]:
        if self.clusters == 1 or features.shape[0] <= self.clusters:
            return [features, *([features[:0]] * (self.clusters - 1))]
        from sklearn.cluster import KMeans  # optional dependency

        found = KMeans(self.clusters, n_init=1, random_state=seed).fit_predict(features.cpu().numpy())
        labels = torch.as_tensor(found, device=features.device)
        return [features[labels == cluster] for cluster in range(self.clusters)]

    @property
    def seen(self) -> list[int]:
        """Rows with images."""
        return self.count.sum(1).nonzero().flatten().tolist()

    def floor(self) -> float:
        """Smallest mean variance of a covariance: a millionth of that of the class means; 1 if these are equal, too.

        Identical images have no variance of their own. Without a floor, their densities would be infinite.
        """
        means = self.mean[self.seen].double().flatten(0, 1)
        between = float(means.var(0, correction=0).mean())
        return 1e-6 * between or 1.0

    def pooled(self, spherical: float) -> Tensor:
        """The pooled covariance of "shared" and "low_rank", with a share `spherical` of the identity: float64 [D, D]."""
        floor = self.floor()  # before there is the copy
        return regularize(self.spread.to(torch.float64, copy=True), spherical, floor)

    def shares(self, own: float) -> Tensor:
        """Share of the pooled covariance in each row with images if its own has the weight `own`, float64 [rows].

        For "low_rank" only.
        """
        return 1 - own + own * self.rest[self.seen].double()

    def covariances(self, own: float, spherical: float) -> Iterator[Tensor]:
        """Regularized covariances of the rows with images, one after another: float64 [D, D]. One in all if shared.

        Friedman, "Regularized Discriminant Analysis", JASA 1989: S_c <- own * S_c + (1 - own) * pooled, then
        (1 - g) S_c + g * mean variance * identity. For "low_rank" the pooled covariance alone has the share of the
        identity: own * F'F + (1 - own + own * rest) * pooled.

        Args:
            own: weight of a class's own covariance; the pooled one has the rest.
            spherical: g.
        """
        rows, floor = self.seen, self.floor()
        if self.pools:
            pooled = self.pooled(spherical)
            if self.kind == "shared":
                yield pooled
                return
            for row, share in zip(rows, self.shares(own).tolist(), strict=True):
                factor = self.factor[row].double()
                yield torch.addmm(pooled, factor.T, factor, beta=share, alpha=own)
            return
        counts = self.count.sum(1).double()
        pooled = self._weighted(counts / counts.sum())[0]
        for row in rows:
            mixed = own * self.spread[row, 0].double() + (1 - own) * pooled
            yield regularize(mixed if self.kind == "full" else torch.diag(mixed), spherical, floor)

    def sampler(self, own: float, spherical: float) -> FeatureSampler:
        """A sampler of features of every class with images. It keeps the roots of the covariances, in float32.

        Args:
            own: as for `covariances`; not used for clusters and variances.
            spherical: as for `covariances`; not used for clusters and variances.
        """
        rows = self.seen
        indices = [self.class_indices[row] for row in rows]
        sampler = partial(FeatureSampler, self.mean[rows], self.count[rows], indices)
        if self.kind in ("diagonal", "centroids"):
            return sampler(deviations=self.spread[rows].sqrt())
        if self.kind == "low_rank":
            roots = [cholesky(self.pooled(spherical)).float()]
            scales, factors = self.shares(own).sqrt().float(), own**0.5 * self.factor[rows]
            return sampler(roots=torch.stack(roots), scales=scales, factors=factors)
        roots = [torch.linalg.cholesky(each).float() for each in self.covariances(own, spherical)]
        return sampler(roots=torch.stack(roots))

    def sample(self, images: int, generator: torch.Generator, own: float, spherical: float) -> tuple[Tensor, Tensor]:
        """Draw features of every class with images.

        Args:
            images: number per row; clusters get shares in proportion to their images.
            generator: on the CPU.
            own: as for `covariances`; not used for clusters and variances.
            spherical: as for `covariances`; not used for clusters and variances.

        Returns:
            features [rows * images, D] in float32, and their class indices [rows * images].
        """
        return self.sampler(own, spherical).draw(images, generator)


def _mean(features: Tensor) -> Tensor:
    """Mean [D] of features [n, D]; zeros if there are none."""
    return features.sum(0) / max(len(features), 1)


def _covariance(centered: Tensor) -> Tensor:
    return centered.T @ centered / max(len(centered) - 1, 1)


def _variances(centered: Tensor) -> Tensor:
    return centered.square().sum(0) / max(len(centered) - 1, 1)
