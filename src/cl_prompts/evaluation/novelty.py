"""How well a novelty score tells images of known classes from those of classes that nobody has taught."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class NoveltyMeasures:
    """Measures in percent.

    Args:
        auroc: area under the ROC curve: how often an unknown image has the higher novelty than a known one. Chance: 50.
        fpr95: share of unknown images that are taken for known ones where 95 % of the known ones are accepted.
        false_alarms: share of known images beyond the learner's threshold; None without a threshold.
        found: share of unknown images beyond it; None without a threshold.

    Raises:
        ValueError: a measure is not from 0 to 100.
    """

    auroc: float
    fpr95: float
    false_alarms: float | None = None
    found: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (type(value) in (int, float) and 0 <= value <= 100):
                raise ValueError(f"{name}={value!r} is no share in percent, from 0 to 100")

    @classmethod
    def of(cls, known: ArrayLike, unknown: ArrayLike, threshold: float | None = None) -> NoveltyMeasures:
        """The measures of novelty scores.

        Args:
            known: of images of known classes [n].
            unknown: of images of other classes [m].
            threshold: of the learner, or None.

        Raises:
            ValueError: one of the two has no image.
        """
        seen, new = np.asarray(known, dtype=np.float64), np.asarray(unknown, dtype=np.float64)
        beyond = [None, None] if threshold is None else [100 * float((part > threshold).mean()) for part in (seen, new)]
        return cls(auroc(seen, new), fpr_at_95(seen, new), *beyond)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoveltyMeasures:
        """The measures of `values`, which `dataclasses.asdict` returned.

        Raises:
            ValueError: a part is missing or invalid.
        """
        return cls(values["auroc"], values["fpr95"], values.get("false_alarms"), values.get("found"))


def auroc(known: ArrayLike, unknown: ArrayLike) -> float:
    """Area under the ROC curve, in percent: how often an unknown image scores higher; ties count half.

    Args:
        known: novelty of images of known classes [n].
        unknown: novelty of images of other classes [m].

    Raises:
        ValueError: one of the two has no image.
    """
    seen, new = _scores(known, unknown)
    ordered = np.sort(seen)
    below = np.searchsorted(ordered, new, "left") + np.searchsorted(ordered, new, "right")
    return 100 * float(below.mean()) / (2 * len(seen))


def fpr_at_95(known: ArrayLike, unknown: ArrayLike) -> float:
    """Share of unknown images taken for known where 95 % of the known ones are accepted, in percent.

    Args:
        known: novelty of images of known classes [n].
        unknown: novelty of images of other classes [m].

    Raises:
        ValueError: one of the two has no image.
    """
    seen, new = _scores(known, unknown)
    return 100 * float((new <= np.quantile(seen, 0.95, method="inverted_cdf")).mean())


def _scores(known: ArrayLike, unknown: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    seen, new = np.asarray(known, dtype=np.float64).ravel(), np.asarray(unknown, dtype=np.float64).ravel()
    if not len(seen) or not len(new):
        raise ValueError(f"images of known and of unknown classes are needed, got {len(seen)} and {len(new)}")
    return seen, new
