"""Gaussians of the features of each class. They are kept in place of old images; drift compensation moves them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from cl_prompts.heads.drift import FeatureMap


KINDS = ("full", "shared", "diagonal", "centroids")


class ClassGaussians(nn.Module):
    """Means and covariances of features, for each class of each task. A class that returns has one Gaussian per task.

    Args:
        width: size D of the features.
        kind: "full" (one covariance [D, D] per class), "shared" (one for all), "diagonal" (variances [D] per class) or
            "centroids" (means and variances of `centroids` clusters per class).
        centroids: number of clusters of a class, for "centroids".
        save: whether the tensors are saved. If not, they have no rows until `make_room`.

    Raises:
        ValueError: an unknown kind.
        ImportError: "centroids" without scikit-learn.

    Attributes:
        mean: [rows, K, D] for K clusters; K = 1 except for "centroids".
        spread: covariances [rows, 1, D, D], or [D, D] if shared, or variances [rows, K, D].
        count: number of images [rows, K].
        class_indices: class index of each row.
    """

    mean: Tensor
    spread: Tensor
    count: Tensor

    def __init__(self, width: int, kind: str = "full", centroids: int = 10, *, save: bool = True) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {KINDS}")
        if kind == "centroids" and find_spec("sklearn") is None:
            raise ImportError("kind='centroids' needs scikit-learn: pip install 'cl-prompts[train]'")
        self.kind, self.width, self.save = kind, width, save
        self.clusters = centroids if kind == "centroids" else 1
        self.register_buffer("mean", torch.zeros(0, self.clusters, width), persistent=save)
        sizes = {"shared": (width if save else 0, width), "full": (0, 1, width, width)}
        self.register_buffer("spread", torch.zeros(*sizes.get(kind, (0, self.clusters, width))), persistent=save)
        self.register_buffer("count", torch.zeros(0, self.clusters, dtype=torch.int64), persistent=save)
        self.class_indices: list[int] = []
        self._newest = slice(0, 0)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add a row for each of the next task's classes, `class_indices`."""
        self._newest = slice(len(self.class_indices), len(self.class_indices) + len(class_indices))
        self.class_indices += list(class_indices)
        if self.save or self.count.shape[0]:
            self.make_room()

    def make_room(self) -> None:
        """Allocate rows for all classes."""
        rows = len(self.class_indices) - self.count.shape[0]
        self.mean = torch.cat([self.mean, self.mean.new_zeros(rows, *self.mean.shape[1:])])
        self.count = torch.cat([self.count, self.count.new_zeros(rows, self.clusters)])
        if self.kind == "shared":
            rows = self.width - self.spread.shape[0]
        self.spread = torch.cat([self.spread, self.spread.new_zeros(rows, *self.spread.shape[1:])])

    @torch.no_grad()
    def move(self, change: FeatureMap) -> None:
        """Apply x -> x A + b of `change` to all rows but the newest task's, whose features are after the change."""
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
    def add(self, features: Tensor, targets: Tensor, seed: int = 0) -> None:
        """Compute the newest task's rows.

        Args:
            features: of its images [n, D].
            targets: class index of each image [n].
            seed: of the initial clusters.
        """
        before, scatter = int(self.count.sum()), self.spread.double() * int(self.count.sum())
        for row in range(self._newest.start, self._newest.stop):
            own = features[targets == self.class_indices[row]].double()
            for cluster, part in enumerate(self._clusters(own, seed + row)):
                self.count[row, cluster] = part.shape[0]
                if not part.shape[0]:
                    continue
                self.mean[row, cluster] = part.mean(0).to(self.mean)
                centered = part - part.mean(0)
                if self.kind == "shared":
                    scatter += centered.T @ centered
                elif self.kind == "full":
                    self.spread[row, cluster] = (centered.T @ centered / max(part.shape[0] - 1, 1)).to(self.spread)
                else:
                    self.spread[row, cluster] = (centered.square().sum(0) / max(part.shape[0] - 1, 1)).to(self.spread)
        if self.kind == "shared" and int(self.count.sum()) > before:
            self.spread.copy_(scatter / int(self.count.sum()))

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

    def covariances(self, own: float, spherical: float) -> Tensor:
        """Regularized covariances of all rows with images, float64 [rows, D, D]; [1, D, D] if shared.

        Friedman, "Regularized Discriminant Analysis", JASA 1989: S_c <- own * S_c + (1 - own) * pooled, then
        (1 - g) S_c + g * mean variance * identity.

        Args:
            own: weight of a class's own covariance; the pooled one has the rest.
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
        """Draw features of every class with images.

        Args:
            images: number per row; clusters get shares in proportion to their images.
            generator: on the CPU.
            own: as for `covariances`; not used for clusters and variances.
            spherical: as for `covariances`; not used for clusters and variances.

        Returns:
            features [rows * images, D] in float32, and their class indices [rows * images].
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
        targets = torch.tensor([self.class_indices[row] for row in rows], device=device)
        return drawn.flatten(0, 1).float(), targets.repeat_interleave(images)
