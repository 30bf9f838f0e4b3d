"""Image and mask files of a few pixels, for tests of the data and of the commands."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlseg.segmentation.data import DataSettings


def write_image(path: Path, value: int | NDArray[Any], mode: str | None = None) -> Path:
    """An image file from an array, or of one grey and 10 rows of 12."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((10, 12), value, np.uint8) if isinstance(value, int) else value
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def half_mask(shape: tuple[int, int] = (10, 12), value: int = 255) -> NDArray[np.uint8]:
    """The left half is foreground."""
    mask = np.zeros(shape, np.uint8)
    mask[:, : shape[1] // 2] = value
    return mask


def own(folder: Path, **changes: Any) -> DataSettings:
    """Of a folder of one's own, at 16x16."""
    settings: dict[str, Any] = {
        "name": "folder",
        "root": str(folder),
        "train": 4,
        "val": 2,
        "test": 3,
    }
    return DataSettings(**(settings | {"image_size": 16} | changes))
