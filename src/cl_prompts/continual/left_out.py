"""Training images that no prompt is trained on, for the calibration of scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cl_prompts.continual.streams.loading import Rows


def left_out(labels: Rows, share: float) -> NDArray[np.bool_]:
    """Which of a task's images to leave out of its training: every k-th image of each class, with k = 1 / share.

    Args:
        labels: class of each image [n].
        share: up to 0.5; 0: none.

    Returns:
        [n]; none of a class with fewer than k images.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels) if share else ():
        (rows,) = np.nonzero(labels == label)
        last = np.floor(share * np.arange(1, len(rows) + 1) + 1e-9)
        chosen[rows[np.diff(last, prepend=0) > 0]] = True
    return chosen
