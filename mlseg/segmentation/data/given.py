"""Images that a program has in memory, as arrays like those that `read_image` makes of files."""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor

from mlseg.errors import UserError
from mlseg.files import reachable
from mlseg.segmentation.data import decode, labels
from mlseg.segmentation.data.pixels import as_array, decoding

KINDS = (
    "a path, a PIL image, an array (H, W) or (H, W, 3), a tensor (C, H, W) or (B, C, H, W), or a "
    "list of such"
)


def as_image(given: Any, channels: int, name: str = "the image") -> NDArray[np.uint8]:
    """An image in any form as (channels, H, W) uint8.

    Arrays hold 0 to 255 (uint8), 16-bit values (uint16, scaled as those of files), or floats from 0
    to 1, which are rounded to 255ths: as of a file of 8 bits. Grey is repeated for three channels,
    colour turned to grey (ITU-R BT.601) for one.

    Args:
        given: path, PIL image, array (H, W), (H, W, 1) or (H, W, 3), tensor (1 or 3, H, W).
        channels: 1 or 3.
        name: of the image, for errors.

    Raises:
        UserError: it is no image, can't be read, or holds values of another kind or range.
    """
    if isinstance(given, str | PathLike):
        return decode.read_image(reachable(Path(given)), channels)
    if isinstance(given, Image.Image):
        return from_pillow(given, channels, name)
    if isinstance(given, Tensor):
        if given.ndim != 3 or given.shape[0] not in (1, 3):
            raise UserError(
                f"{name}: a tensor of shape {tuple(given.shape)}; (C, H, W) or (B, C, H, W) with "
                "one channel or three is expected"
            )
        host = given.detach().cpu()
        host = host.float() if host.dtype == torch.bfloat16 else host
        return _from_array(host.movedim(0, -1).numpy(), channels, name)
    if isinstance(given, np.ndarray):
        if given.ndim not in (2, 3) or (given.ndim == 3 and given.shape[2] not in (1, 3)):
            raise UserError(
                f"{name}: an array of shape {given.shape}; (H, W) or (H, W, 3) is expected"
                + ("; drop the transparency: image[..., :3]" if given.shape[2:] == (4,) else "")
            )
        return _from_array(given, channels, name)
    raise UserError(f"{name}: a {type(given).__name__}; {KINDS} is expected")


def from_pillow(image: Image.Image, channels: int, name: str = "the image") -> NDArray[np.uint8]:
    """A picture of Pillow's as (channels, H, W) uint8, as `read_image` reads its file.

    Raises:
        UserError: it can't be decoded, has too many pixels, or is one of several in its file.
    """
    path = Path(getattr(image, "filename", "") or name)
    with decoding(path):
        if min(image.size) < 1:
            raise UserError(f"{path}: no pixels")
        decode.require_few_pixels(image)
        if isinstance(image, ImageFile.ImageFile):
            inverted = labels.white_is_zero(image)
            decode.require_one(image, path)
            if image.tile:  # not loaded yet
                image._size = decode.stored_size(image)
            image.load()
            decode.require_black_zero(image, inverted, path)
        return as_array(decode.eight_bits(image, path), channels, path)


def _from_array(values: NDArray[Any], channels: int, name: str) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 1 or 3)."""
    if not values.size:
        raise UserError(f"{name}: no pixels (its shape is {values.shape})")
    if values.dtype == np.uint16:
        values = decode.to_8_bits(values, name)
    elif np.issubdtype(values.dtype, np.floating):
        values = _from_floats(values, name)
    elif values.dtype != np.uint8:
        raise UserError(
            f"{name}: values of type {values.dtype}; uint8, uint16 or floats from 0 to 1 are "
            "expected"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    picture = Image.fromarray(np.ascontiguousarray(values))
    return as_array(picture, channels, Path(name))


def _from_floats(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    lowest, highest = float(values.min()), float(values.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):  # of a NaN both are NaN
        raise UserError(f"{name}: holds NaN or infinite values")
    if lowest < 0 or highest > 1:
        raise UserError(
            f"{name}: floats from {lowest:g} to {highest:g}; those of an image lie between 0 and 1 "
            "(divide by 255, or give uint8)"
        )
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)


def resized(image_CHW: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image at another size (H, W), channel by channel as `read_image` does it."""
    if image_CHW.shape[1:] == size:
        return image_CHW
    height, width = size
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in image_CHW
    ]
    return np.stack(channels)
