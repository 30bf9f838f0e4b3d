"""The 95th percentile of the Hausdorff distance between label maps, in pixels."""

import math

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
PERCENTILE = 95.0


def hd95(prediction_HW: Mask, target_HW: Mask) -> float:
    """HD95 of two regions, in pixels.

    A region's boundary are its pixels with a neighbour (of four) outside it or beyond the image's
    edge. From each boundary pixel of one region the distance to the nearest of the other; of these
    the 95th percentile, linearly interpolated; the larger of the two directions. MONAI's
    ``compute_hausdorff_distance(percentile=95)`` is defined alike.

    Both empty: 0. One empty: the image's diagonal, the largest distance that there can be, so that
    the figure is always finite.

    Args:
        prediction_HW, target_HW: of one shape.
    """
    if not prediction_HW.any() or not target_HW.any():
        one_empty = bool(prediction_HW.any() or target_HW.any())
        return math.hypot(*prediction_HW.shape) if one_empty else 0.0
    from scipy.spatial import cKDTree  # here, for it takes long to load

    predicted, true = (_boundary(mask) for mask in (prediction_HW, target_HW))
    there, _ = cKDTree(true).query(predicted)
    back, _ = cKDTree(predicted).query(true)
    return float(max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE)))


def class_hd95(
    prediction_HW: NDArray[np.integer],
    target_HW: NDArray[np.integer],
    num_classes: int,
    ignore_index: int | None = None,
) -> float:
    """HD95 of an image: of class 1 for two classes, else the mean over the classes that occur.

    Ignored pixels belong to no class, in truth and prediction. 0 for an image of nothing else.
    """
    ignored = None if ignore_index is None else target_HW == ignore_index
    found = []
    for index in range(1 if num_classes == 2 else 0, num_classes):
        predicted, true = prediction_HW == index, target_HW == index
        if ignored is not None:
            predicted = predicted & ~ignored
        if num_classes == 2 or predicted.any() or true.any():
            found.append(hd95(predicted, true))
    return float(np.mean(found)) if found else 0.0


def _boundary(mask_HW: Mask) -> NDArray[np.intp]:
    """(N, 2) coordinates."""
    from scipy.ndimage import binary_erosion

    rows, columns = (np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0))
    # Only the bounding box, which is often small: what lies around it is empty.
    top, left = rows[0], columns[0]
    box = mask_HW[top : rows[-1] + 1, left : columns[-1] + 1]
    return np.argwhere(box & ~binary_erosion(box)) + np.array([top, left])
