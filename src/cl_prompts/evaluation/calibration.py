"""How far the confidence of answers is from their accuracy: reliability in bins, and the calibration error.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. The confidence of an answer is its probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Sums over images, by the confidence of their answers in bins of equal width.

    Bin k has the confidences from k / bins (not included) to (k + 1) / bins.

    Args:
        images: number of images in each bin [bins].
        hits: number of right answers [bins].
        confidence: sum of the confidences [bins].
        loss: sum over all images of -log of the probability of the right class.

    Raises:
        ValueError: the lists differ in length, or a value is impossible.
    """

    images: list[int]
    hits: list[int]
    confidence: list[float]
    loss: float

    def __post_init__(self) -> None:
        columns = list(zip(self.images, self.hits, self.confidence, strict=True))
        if not columns or not sum(self.images) or not 0 <= self.loss < math.inf:
            raise ValueError(f"a reliability needs bins with images and a finite loss, got a loss of {self.loss!r}")
        if not all(0 <= hits <= images and 0 <= confidence <= images * (1 + 1e-6) for images, hits, confidence in columns):
            raise ValueError("a bin of a reliability has more hits, or more confidence, than images")

    @classmethod
    def of(cls, probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> Reliability:
        """The reliability of answers.

        Args:
            probabilities: of each class [n, C].
            labels: index of each image's class [n].
            bins: number of bins.

        Raises:
            ValueError: the shapes do not fit, a label is out of range, or rows are no probabilities.
        """
        table, wanted = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
        if table.ndim != 2 or wanted.shape != table.shape[:1] or not len(wanted):
            raise ValueError(f"probabilities [n, C] and labels [n] are needed, got {table.shape} and {wanted.shape}")
        if wanted.min() < 0 or wanted.max() >= table.shape[1]:
            raise ValueError(f"labels must be from 0 to {table.shape[1] - 1}")
        if not (table >= 0).all() or not np.allclose(table.sum(1), 1, atol=1e-3):
            raise ValueError("each row of probabilities must be non-negative and have the sum 1")
        confidence, hits = table.max(1), table.argmax(1) == wanted
        number = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        own = table[np.arange(len(wanted)), wanted]
        return cls(
            images=np.bincount(number, minlength=bins).tolist(),
            hits=np.bincount(number[hits], minlength=bins).tolist(),
            confidence=np.bincount(number, confidence, minlength=bins).tolist(),
            loss=float(-np.log(np.maximum(own, 1e-30)).sum()),
        )

    @classmethod
    def total(cls, parts: Sequence[Reliability]) -> Reliability:
        """The reliability on the images of all `parts`, which have the same number of bins."""
        return cls(
            images=[sum(column) for column in zip(*(part.images for part in parts), strict=True)],
            hits=[sum(column) for column in zip(*(part.hits for part in parts), strict=True)],
            confidence=[sum(column) for column in zip(*(part.confidence for part in parts), strict=True)],
            loss=sum(part.loss for part in parts),
        )

    @property
    def expected_calibration_error(self) -> float:
        """Mean over images of the difference between accuracy and mean confidence in their bin, in percent."""
        gaps = [abs(hits - confidence) for hits, confidence in zip(self.hits, self.confidence, strict=True)]
        return 100 * sum(gaps) / sum(self.images)

    @property
    def calibration_error_by_chance(self) -> float:
        """Expected `expected_calibration_error` of a calibrated model on as many images of the same confidence, in percent.

        Of few images: the hits in a bin are then binomial, with the bin's mean confidence as their probability.
        """
        pairs = zip(self.images, self.confidence, strict=True)
        return 100 * sum(_mean_deviation(n, min(1.0, confidence / n)) for n, confidence in pairs if n) / sum(self.images)

    @property
    def negative_log_likelihood(self) -> float:
        """Mean over images of -log of the probability of the right class, in nats."""
        return self.loss / sum(self.images)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reliability:
        """The reliability of `values`, which `to_dict` returned.

        Raises:
            ValueError: a part is invalid.
        """
        images, hits = ([_whole(value) for value in values[name]] for name in ("images", "hits"))
        return cls(images, hits, [float(value) for value in values["confidence"]], float(values["loss"]))


def _mean_deviation(n: int, p: float) -> float:
    """E|X - np| of a binomial X (De Moivre): 2 (1 - p) k P(X = k) for the smallest whole k > np."""
    k = math.floor(n * p) + 1
    if not p or k > n:
        return 0.0
    log_share = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    )
    return 2 * (1 - p) * k * math.exp(log_share)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 2**40:
        raise ValueError(f"{value!r} is no number of images")
    return value


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error in percent: mean difference of accuracy and confidence, over bins of the confidence.

    Args:
        probabilities: of each class [n, C].
        labels: index of each image's class [n].
        bins: number of bins of equal width.

    Raises:
        ValueError: as `Reliability.of`.
    """
    return Reliability.of(probabilities, labels, bins).expected_calibration_error


def negative_log_likelihood(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of -log of the probability of the right class, in nats.

    Args:
        probabilities: of each class [n, C]. Those below 1e-30 count as 1e-30.
        labels: index of each image's class [n].

    Raises:
        ValueError: as `Reliability.of`.
    """
    return Reliability.of(probabilities, labels).negative_log_likelihood
