"""How far a score would move with other images: percentile bootstrap over the images.

Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993, section 13.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 2**22
"""Numbers that are held at once."""

Interval = tuple[float, float]


def of_mean(values: Sequence[float] | NDArray[Any]) -> Interval | None:
    """Where the mean lies in 95 % of samples drawn with replacement; None of fewer than two.

    The draws are the same every time.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return None
    return _bounds(np.concatenate([counts @ array for counts in _draws(len(array))]) / len(array))


def of_pooled_miou(confusion_NKK: NDArray[Any]) -> Interval | None:
    """The same of the mean IoU over the classes of the truth, of counts summed over the images.

    Args:
        confusion_NKK: (N, K, K) counts of each image, rows are the truth.
    """
    number, classes = confusion_NKK.shape[:2]
    if number < 2:
        return None
    hits = confusion_NKK.diagonal(axis1=1, axis2=2)
    sums = [hits, confusion_NKK.sum(2), confusion_NKK.sum(1)]  # all that an IoU is made of
    flat = np.concatenate(sums, axis=1).astype(np.float64)
    found = []
    for counts in _draws(number, 3 * classes):
        hit, true, predicted = np.split(counts @ flat, 3, axis=1)
        union = true + predicted - hit
        shown = true > 0
        iou = np.divide(hit, union, out=np.zeros_like(hit), where=shown)
        found.append(iou.sum(1) / np.maximum(shown.sum(1), 1))
    return _bounds(np.concatenate(found))


def _draws(number: int, width: int = 1) -> Iterator[NDArray[np.float64]]:
    """How often each of ``number`` images is drawn: (R, N), `RESAMPLES` rows in all."""
    generator = np.random.default_rng(0)
    rows = max(1, min(RESAMPLES, _AT_ONCE // max(number, width)))
    for start in range(0, RESAMPLES, rows):
        wanted = min(rows, RESAMPLES - start)
        drawn = (
            generator.integers(0, number, (wanted, number)) + number * np.arange(wanted)[:, None]
        )
        counts = np.bincount(drawn.ravel(), minlength=wanted * number)
        yield counts.reshape(wanted, number).astype(np.float64)


def _bounds(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
