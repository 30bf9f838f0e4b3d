"""Where an image lies among the pixels that a network takes, and what fills the rest."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Fit = Literal["stretch", "pad"]

# Of the two greys that `to_float` maps nearest to 0, alike near, the one that `to_uint8` makes of 0
# and that pictures show ignored pixels in.
PADDING = 128


def placed(native: tuple[int, int], size: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """(h, w) of an image within `size`, at the top left.

    Args:
        native: (H', W') of its file, pixels.
        size: (H, W) to put it in.
        fit: "stretch" fills `size`. "pad" keeps the shape, up to rounding: one scale for both axes,
            the largest that fits, but none above 1.
    """
    if fit == "stretch":
        return size
    scale = min(1.0, size[0] / native[0], size[1] / native[1])
    return max(1, round(native[0] * scale)), max(1, round(native[1] * scale))


def padded(array: NDArray[Any], size: tuple[int, int], value: int | None) -> NDArray[Any]:
    """(..., h, w) to (..., H, W): itself at the top left, `value` to its right and below.

    Args:
        value: may be None where the array has the size already.
    """
    height, width = array.shape[-2:]
    if (height, width) == size:
        return array
    assert value is not None, "nothing to pad with"
    around = [(0, 0)] * (array.ndim - 2) + [(0, size[0] - height), (0, size[1] - width)]
    return np.pad(array, around, constant_values=value)
