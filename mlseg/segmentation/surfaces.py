"""How far apart the boundaries of two label maps are: HD95 and the normalized surface Dice."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
PERCENTILE = 95.0
TOLERANCE = 2.0
"""Pixels within which a boundary counts as met."""


class Apart(NamedTuple):
    """Of two regions' boundaries.

    Attributes:
        hd95: the 95th percentile of the Hausdorff distance, in pixels.
        nsd: the normalized surface Dice at :data:`TOLERANCE`, in [0, 1].
    """

    hd95: float
    nsd: float


def apart(prediction_HW: Mask, target_HW: Mask) -> Apart:
    """Of two regions.

    A region's boundary are its pixels with a neighbour (of four) outside it or beyond the image's
    edge. From each boundary pixel of one region the distance to the nearest of the other, both
    ways. HD95 is the 95th percentile, linearly interpolated, the larger of the two ways; MONAI's
    ``compute_hausdorff_distance(percentile=95)`` is defined alike. The normalized surface Dice is
    the share of all these distances that is at most the tolerance: Nikolov et al., J Med Internet
    Res 2021, Multimedia Appendix, with boundary pixels in place of surface elements, as MONAI's
    ``compute_surface_dice``.

    Both empty: 0 and 1. One empty: the image's diagonal, the largest distance that there can be, so
    that the figure is always finite, and 0.

    Args:
        prediction_HW, target_HW: of one shape.
    """
    if not prediction_HW.any() or not target_HW.any():
        one_empty = bool(prediction_HW.any() or target_HW.any())
        return Apart(math.hypot(*prediction_HW.shape), 0.0) if one_empty else Apart(0.0, 1.0)
    from scipy.spatial import cKDTree  # here, for it takes long to load

    predicted, true = (_boundary(mask) for mask in (prediction_HW, target_HW))
    there, _ = cKDTree(true).query(predicted)
    back, _ = cKDTree(predicted).query(true)
    furthest = max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE))
    met = np.concatenate([there, back]) <= TOLERANCE
    return Apart(float(furthest), float(met.mean()))


def classes_apart(
    prediction_HW: NDArray[np.integer],
    target_HW: NDArray[np.integer],
    num_classes: int,
    ignore_index: int | None = None,
) -> Apart:
    """Of an image: of class 1 for two classes, else the means over the classes that occur.

    Ignored pixels belong to no class, in truth and prediction. 0 and 1 for an image of nothing
    else.
    """
    ignored = None if ignore_index is None else target_HW == ignore_index
    found = []
    for index in range(1 if num_classes == 2 else 0, num_classes):
        predicted, true = prediction_HW == index, target_HW == index
        if ignored is not None:
            predicted = predicted & ~ignored
        if num_classes == 2 or predicted.any() or true.any():
            found.append(apart(predicted, true))
    return Apart(*np.mean(found, 0).tolist()) if found else Apart(0.0, 1.0)


def _boundary(mask_HW: Mask) -> NDArray[np.intp]:
    """(N, 2) coordinates."""
    from scipy.ndimage import binary_erosion

    rows, columns = (np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0))
    # Only the bounding box, which is often small: what lies around it is empty.
    top, left = rows[0], columns[0]
    box = mask_HW[top : rows[-1] + 1, left : columns[-1] + 1]
    return np.argwhere(box & ~binary_erosion(box)) + np.array([top, left])
