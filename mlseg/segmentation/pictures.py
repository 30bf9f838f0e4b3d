"""Rows of pictures: what went in, what should have come out, what did."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mlseg.segmentation.data import DatasetSpec

GAP = 4
OPACITY = 0.5
_BAND = 256


def to_rgb(image_CHW: Tensor) -> np.ndarray:
    """A uint8 image of 1 or 3 channels as (H, W, 3)."""
    return image_CHW.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()


def colour(mask_HW: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """A label map as (H, W, 3) in its classes' colours; anything else is mid grey."""
    table = np.full((256, 3), 128, dtype=np.uint8)
    table[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    return table[mask_HW]


def overlay(
    image_HWC: np.ndarray, mask_HW: np.ndarray, palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """The image with every class but the first tinted in its colour and outlined."""
    edge_HW = np.zeros(mask_HW.shape, bool)
    edge_HW[1:] |= mask_HW[1:] != mask_HW[:-1]
    edge_HW[:, 1:] |= mask_HW[:, 1:] != mask_HW[:, :-1]
    made = np.empty((*mask_HW.shape, 3), np.uint8)
    for top in range(0, len(made), _BAND):  # floats of a whole photograph take gigabytes
        rows = slice(top, top + _BAND)
        mask, edge = mask_HW[rows], edge_HW[rows]
        tint = colour(mask, palette).astype(np.float32)
        if len(palette) == 2:  # a white tint can't be seen on skin or on an X-ray
            tint[:] = (255.0, 64.0, 64.0)
        shown = mask > 0
        out = image_HWC[rows].astype(np.float32)
        out[shown] = (1 - OPACITY) * out[shown] + OPACITY * tint[shown]
        out[edge] = tint[edge]
        made[rows] = out.round()
    return made


def comparison(
    images: Tensor, truths: Tensor, predictions: Tensor, spec: DatasetSpec
) -> np.ndarray:
    """A row per image: image, truth, prediction, and the prediction over the image.

    Args:
        images: (N, C, H, W) uint8.
        truths, predictions: (N, H, W) uint8 class indices.

    Returns:
        (H', W', 3) uint8.
    """
    rows = []
    for image, truth, predicted in zip(images, truths, predictions, strict=True):
        rgb = to_rgb(image)
        rows.append(
            [
                rgb,
                colour(truth.cpu().numpy(), spec.palette),
                colour(predicted.cpu().numpy(), spec.palette),
                overlay(rgb, predicted.cpu().numpy(), spec.palette),
            ]
        )
    return tiles(rows)


def tiles(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Pictures of one size in rows and columns, with white gaps."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    canvas = np.full(
        (len(rows) * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, dtype=np.uint8
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            canvas[top : top + height, left : left + width] = picture
    return canvas
