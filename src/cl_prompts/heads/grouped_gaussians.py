"""Gaussians of classes after some were forgotten or merged, as if the labels had always been the new ones.

Means, counts, and covariances of one class are exact. A pooled covariance is a sum over the images of all classes, of which
no single class's part is kept: see `_pooled`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.low_rank import leading_factor, prior_weight
from cl_prompts.heads.regularized import cholesky


@torch.no_grad()
def group_gaussians(gaussians: ClassGaussians, groups: ClassGroups) -> None:
    """Forget and merge classes. Classes of one task are merged into one Gaussian; those of several tasks keep one for each.

    Args:
        gaussians: on a device with float64. Its tensors are replaced.
        groups: of the old classes.

    Raises:
        ValueError: clusters cannot be merged.
    """
    g = gaussians
    by_row = groups.of_rows([(number, index) for number, task in enumerate(groups.tasks) for index in task])
    rows = list(by_row.values())
    merged = {new: group for new, group in enumerate(rows) if len(group) > 1}
    if merged and g.kind == "centroids":
        raise ValueError('alignment="centroids" keeps clusters, which cannot be merged: use alignment="covariance"')
    old_count, old_mean = g.count[:, 0].double(), g.mean[:, 0].double()
    old = {name: getattr(g, name) for name in g.by_row}
    g.class_indices = [index for _, index in by_row]
    g.forget_newest()
    if not len(old_count):  # loaded without its statistics
        return
    first = [group[0] for group in rows]
    for name, tensor in old.items():
        setattr(g, name, tensor[first])
    between: dict[int, Tensor] = {}  # sqrt(n) (mean - common mean) of the rows that are merged [rows, D]
    for new, group in merged.items():
        counts = old_count[group]
        mean = (counts @ old_mean[group]) / counts.sum().clamp_min(1)
        between[new] = counts.sqrt()[:, None] * (old_mean[group] - mean)
        g.count[new, 0], g.mean[new, 0] = int(counts.sum()), mean.to(g.mean)
    if g.pools:
        g.spread = _pooled(g, old, rows, list(between.values())).to(g.spread)
    for new, group in merged.items():
        counts = old_count[group]
        if g.kind == "low_rank":
            factor, rest = _merged_factor(g, old, counts, group, between[new])
            g.factor[new], g.rest[new] = factor.to(g.factor), rest
        elif g.kind in ("full", "diagonal"):
            within = torch.tensordot((counts - 1).clamp_min(0), old["spread"][group, 0].double(), 1)
            x = between[new]
            within = within + (x.T @ x if g.kind == "full" else x.square().sum(0))
            g.spread[new, 0] = (within / (counts.sum() - 1).clamp_min(1)).to(g.spread)


def _pooled(g: ClassGaussians, old: dict[str, Tensor], rows: Sequence[Sequence[int]], between: Sequence[Tensor]) -> Tensor:
    """The pooled covariance after the change, float64 [D, D].

    What lies between merged means is added exactly. Of a forgotten class's covariance the directions of its factor are
    taken out exactly; the rest of it, of which only the size is known, is taken to be shaped like the average, and that of
    "shared" as a whole. So the average stays as it was, up to these directions.
    """
    counts = old["count"][:, 0].double()
    low_rank = g.kind == "low_rank"
    weights = (counts - int(low_rank)).clamp_min(0)
    images = float(weights.sum())
    scatter = g.spread.double() * images
    kept = {row for group in rows for row in group}
    for row in set(range(len(counts))) - kept:
        if not low_rank or not float(weights[row]):
            continue
        factor, rest = _own(old, row)
        scatter.addmm_(factor.T, factor, alpha=-float(weights[row]))
        images -= float(weights[row]) * (1 - rest)
    if not float(weights[sorted(kept)].sum()):  # as before the first class of more than one image
        return torch.zeros_like(scatter)
    for x in between:
        scatter.addmm_(x.T, x)
        images += (len(x) - 1) * int(low_rank)
    return scatter / images


def _own(old: dict[str, Tensor], row: int) -> tuple[Tensor, float]:
    """Factor and rest of a class's covariance before it was shrunk towards the pooled one; of two images or more."""
    prior = prior_weight(int(old["count"][row, 0]))
    return old["factor"][row].double() / (1 - prior) ** 0.5, max(0.0, float(old["rest"][row]) - prior) / (1 - prior)


def _merged_factor(
    g: ClassGaussians, old: dict[str, Tensor], counts: Tensor, group: Sequence[int], between: Tensor
) -> tuple[Tensor, float]:
    """Factor and rest of several rows: exact up to what their own factors left out."""
    known, left_out = [between], 0.0
    for row, images in zip(group, counts.tolist(), strict=True):
        if images > 1:
            factor, rest = _own(old, row)
            known.append((images - 1) ** 0.5 * factor)
            left_out += (images - 1) * rest
    root = cholesky(g.pooled(0.1))
    return leading_factor(torch.cat(known), root, g.factor.shape[1], images=int(counts.sum()), left_out=left_out)
