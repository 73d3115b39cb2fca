"""Gaussians of the features of each class: what is kept of old images, and what drift compensation moves."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from cl_prompts.heads.drift import FeatureMap


KINDS = ("full", "shared", "diagonal", "centroids")


class ClassGaussians(nn.Module):
    """Means and covariances of features, for each class of each task; a class that comes back has one for each visit.

    Args:
        width: size D of the features.
        kind: "full" (a covariance for each, D * D numbers), "shared" (one for all), "diagonal" (D numbers for each) or
            "centroids" (means and variances of `centroids` clusters of each).
        centroids: clusters of a class, for "centroids".
        save: whether the numbers are saved along. If not, there are no rows until `make_room`.

    Raises:
        ValueError: an unknown kind.
        ImportError: "centroids" without scikit-learn.

    Attributes:
        mean: [rows, K, D], K clusters (1 but for "centroids").
        spread: covariances [rows, 1, D, D], or [D, D] if shared, or variances [rows, K, D].
        count: images in each [rows, K].
        columns: head column of each row.
    """

    mean: Tensor
    spread: Tensor
    count: Tensor

    def __init__(self, width: int, kind: str = "full", centroids: int = 10, *, save: bool = True) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {KINDS}")
        if kind == "centroids" and find_spec("sklearn") is None:
            raise ImportError("centroids are found by scikit-learn: pip install 'cl-prompts[train]'")
        self.kind, self.width, self.save = kind, width, save
        self.clusters = centroids if kind == "centroids" else 1
        self.register_buffer("mean", torch.zeros(0, self.clusters, width), persistent=save)
        sizes = {"shared": (width if save else 0, width), "full": (0, 1, width, width)}
        self.register_buffer("spread", torch.zeros(*sizes.get(kind, (0, self.clusters, width))), persistent=save)
        self.register_buffer("count", torch.zeros(0, self.clusters, dtype=torch.int64), persistent=save)
        self.columns: list[int] = []
        self._newest = slice(0, 0)

    def begin_task(self, columns: Sequence[int]) -> None:
        """Open a row for each class of the next task, whose head columns are `columns`."""
        self._newest = slice(len(self.columns), len(self.columns) + len(columns))
        self.columns += list(columns)
        if self.save or len(self.count):
            self.make_room()

    def make_room(self) -> None:
        """Allocate rows for all classes begun."""
        rows = len(self.columns) - len(self.count)
        self.mean = torch.cat([self.mean, self.mean.new_zeros(rows, *self.mean.shape[1:])])
        self.count = torch.cat([self.count, self.count.new_zeros(rows, self.clusters)])
        if self.kind == "shared":
            rows = self.width - len(self.spread)
        self.spread = torch.cat([self.spread, self.spread.new_zeros(rows, *self.spread.shape[1:])])

    @torch.no_grad()
    def move(self, change: FeatureMap) -> None:
        """Carry all rows but the newest task's into the feature space after it, x -> x A + b of `change`, exactly."""
        old = slice(0, self._newest.start)
        matrix = change.matrix
        self.mean[old] = (self.mean[old].double() @ matrix + change.shift).to(self.mean)
        if self.kind == "full":
            self.spread[old] = (matrix.T @ self.spread[old].double() @ matrix).to(self.spread)
        elif self.kind == "shared":
            self.spread.copy_(matrix.T @ self.spread.double() @ matrix)
        else:
            self.spread[old] = (self.spread[old].double() @ matrix.square()).to(self.spread)

    @torch.no_grad()
    def add(self, features: Tensor, columns: Tensor, seed: int = 0) -> None:
        """Fill the newest task's rows with the `features` [n, D] and the head `columns` [n] of its images.

        `seed` draws where clusters start.
        """
        before, scatter = int(self.count.sum()), self.spread.double() * int(self.count.sum())
        for row in range(self._newest.start, self._newest.stop):
            own = features[columns == self.columns[row]].double()
            for cluster, part in enumerate(self._clusters(own, seed + row)):
                self.count[row, cluster] = len(part)
                if not len(part):
                    continue
                self.mean[row, cluster] = part.mean(0).to(self.mean)
                centred = part - part.mean(0)
                if self.kind == "shared":
                    scatter += centred.T @ centred
                elif self.kind == "full":
                    self.spread[row, cluster] = (centred.T @ centred / max(len(part) - 1, 1)).to(self.spread)
                else:
                    self.spread[row, cluster] = (centred.square().sum(0) / max(len(part) - 1, 1)).to(self.spread)
        if self.kind == "shared" and int(self.count.sum()) > before:
            self.spread.copy_(scatter / int(self.count.sum()))

    def _clusters(self, features: Tensor, seed: int) -> list[Tensor]:
        if self.clusters == 1 or len(features) <= self.clusters:
            return [features, *([features[:0]] * (self.clusters - 1))]
        from sklearn.cluster import KMeans  # an optional dependency

        found = KMeans(self.clusters, n_init=1, random_state=seed).fit_predict(features.cpu().numpy())
        labels = torch.as_tensor(found, device=features.device)
        return [features[labels == cluster] for cluster in range(self.clusters)]

    @property
    def seen(self) -> list[int]:
        """Rows with images."""
        return self.count.sum(1).nonzero().flatten().tolist()

    def covariances(self, own: float, spherical: float) -> Tensor:
        """Regularised covariances of all rows with images [rows, D, D], or [1, D, D] if shared, in float64 (Friedman,
        "Regularized Discriminant Analysis", JASA 1989): S_c <- own * S_c + (1 - own) * pooled, then
        (1 - g) S_c + g * mean variance * identity.

        Args:
            own: weight of a class's own covariance against the pooled one.
            spherical: g.
        """
        identity = torch.eye(self.width, dtype=torch.float64, device=self.mean.device)
        if self.kind == "shared":
            mixed = self.spread.double()[None]
        else:
            each = self.spread[self.seen].double()
            each = each[:, 0] if self.kind == "full" else torch.diag_embed(each[:, 0])
            counts = self.count[self.seen].sum(1).double()
            pooled = torch.einsum("r,rde->de", counts / counts.sum(), each)
            mixed = own * each + (1 - own) * pooled
        variance = mixed.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        return (1 - spherical) * mixed + spherical * variance.clamp_min(1e-12) * identity

    def sample(self, images: int, generator: torch.Generator, own: float, spherical: float) -> tuple[Tensor, Tensor]:
        """Draw features of every class seen: [rows * images, D] float32 and their head columns.

        Args:
            images: of each row; clusters in proportion to their images.
            generator: on the CPU.
            own: as for `covariances`; clusters and variances are taken as they are.
            spherical: likewise.
        """
        rows = self.seen
        noise = torch.randn(len(rows), images, self.width, generator=generator, dtype=torch.float64)
        weights = self.count[rows].double().cpu()
        which = torch.multinomial(weights, images, replacement=True, generator=generator)
        device = self.mean.device
        noise, which = noise.to(device), which.to(device)
        pick = torch.arange(len(rows), device=device)[:, None]
        means = self.mean[rows].double()[pick, which]
        if self.kind in ("full", "shared"):
            drawn = means + noise @ torch.linalg.cholesky(self.covariances(own, spherical)).mT
        else:
            drawn = means + noise * self.spread[rows].double()[pick, which].sqrt()
        columns = torch.tensor([self.columns[row] for row in rows], device=device)
        return drawn.flatten(0, 1).float(), columns.repeat_interleave(images)
