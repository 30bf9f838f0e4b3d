"""What readers of images share: a file's faults in one line, the bound on pixels, greys."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlseg.errors import UserError
from mlseg.segmentation.data import labels

Numbers = NDArray[Any]
Axes = NDArray[np.float64]
"""(2, 3): unit vectors to the right and down a slice, in the patient: to its right, front, head."""


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Within this block a file is decoded; whatever fails is one line about it."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError:
        millions = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(
            f"{path}: more than {millions:.0f} million pixels; make it smaller, or raise the limit "
            "(data.max_megapixels in a config, --max-megapixels)"
        ) from None
    except Exception as error:  # a damaged file makes decoders fail in any way
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception, what: str = "") -> UserError:
    """The error for a file that can't be decoded."""
    reason = " ".join(str(error).replace(repr(str(path)), "the file").split())
    return UserError(f"{path}: not a readable image ({what}{reason or type(error).__name__})")


def require_few(rows: int, columns: int, path: Path) -> None:
    """Raise what :func:`decoding` tells of a file without pixels, or with too many."""
    if rows < 1 or columns < 1:
        raise UserError(f"{path}: no pixels in it")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and rows * columns > most:
        raise Image.DecompressionBombError


def as_array(
    image: Image.Image, channels: int, path: Path, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """(channels, H, W), at another size if one is given."""
    image = labels.converted(image, "L" if channels == 1 else "RGB", path)
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def by_range(values: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """Bytes as they are, other numbers from the lowest as 0 to the highest as 255."""
    if values.dtype == np.uint8:
        return values
    return to_bytes(values, float(values.min()), float(values.max()), path)


def to_bytes(values: NDArray[Any], low: float, high: float, path: Path) -> NDArray[np.uint8]:
    """``low`` as 0 and ``high`` as 255; what lies beyond is cut."""
    if not (np.isfinite([low, high]).all() and np.isfinite(values).all()):
        raise UserError(f"{path}: values that are NaN or infinite")
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
