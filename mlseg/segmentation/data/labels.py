"""What a mask's file says of each pixel: class numbers as stored, or what its colours show.

Pillow shows pictures. It scales greys of few bits up to 255, turns those whose zero is white
around, and keeps 8 of 16 bits a colour; so it is asked first how a file holds its numbers, and a
file whose numbers can't be had with certainty is refused.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlseg.errors import UserError

# Darkest grey that a lossy file may hold where the mask is empty.
_NOISE = 32
# Lightest grey that 0 and 1 may become in one.
_FAINT = 4
_PHOTOMETRIC, _SUBFILE = 262, 254  # TIFF tags
_PREVIEW_OR_MASK = 1 | 4  # bits of the latter

Numbers = NDArray[Any]


@dataclass(frozen=True)
class Storage:
    """How a file holds its numbers.

    Attributes:
        highest: number that stands for white, where Pillow scales a grey up to 255 or 65535.
        white_is_zero: 0 stands for white.
        wide: 16 bits a colour, of which Pillow keeps the upper 8.
        lossy: its compression changes values.
    """

    highest: int | None = None
    white_is_zero: bool = False
    wide: bool = False
    lossy: bool = False


def storage(image: Image.Image, path: Path) -> Storage:
    """How an open file that isn't loaded yet holds its numbers."""
    tiles = getattr(image, "tile", None)
    decoder, arguments = (tiles[0][0], tiles[0][3]) if tiles else ("", "")
    many = arguments if isinstance(arguments, (tuple, list)) else (arguments,)
    raw, *more = many or ("",)
    raw = str(raw)
    highest: int | None = {"L;2": 3, "L;4": 15}.get(raw[:3])
    if decoder.startswith("ppm") and image.mode in ("L", "I"):
        highest = int(more[-1])
    return Storage(
        highest=highest,
        white_is_zero=white_is_zero(image) or (image.format == "PPM" and raw == "1;I"),
        wide=";16" in raw and image.mode in ("LA", "RGB", "RGBA", "RGBX", "CMYK"),
        lossy=_is_lossy(image, path),
    )


def white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF's 0 stands for white."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags.get(_PHOTOMETRIC) == 0


def _is_lossy(image: Image.Image, path: Path) -> bool:
    if image.format == "WEBP":
        with path.open("rb") as file:
            return b"VP8L" not in file.read()
    jpeg = image.format == "TIFF" and "jpeg" in str(image.info.get("compression"))
    return jpeg or image.mode == "LAB" or image.format in ("JPEG", "MPO", "JPEG2000")


def pictures(image: Image.Image) -> int:
    """How many pictures an open file holds, if more than the one and its previews; else 1."""
    number = getattr(image, "n_frames", 1)
    if number == 1 or image.format == "MPO":  # a photograph, and what a phone adds to it
        return 1
    if image.format != "TIFF":
        return int(number)
    first, *others = (_is_beside(image, page) for page in range(number))
    image.seek(0)
    return 1 if all(others) and not first else int(number)


def _is_beside(image: Image.Image, page: int) -> bool:
    """Whether a page of a TIFF is a preview or a transparency mask of another."""
    image.seek(page)
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return bool(int(tags.get(_SUBFILE, 0)) & _PREVIEW_OR_MASK)


# ------------------------------------------------------------------------------ class numbers


def class_numbers(image: Image.Image, how: Storage, path: Path, known: Collection[int]) -> Numbers:
    """(H, W) numbers as the file stores them; of a palette the indices.

    Args:
        known: numbers that mean something.

    Raises:
        UserError: there are none, or they can't be had.
    """
    if how.lossy:
        raise UserError(f"{path}: compressed with loss, which changes class numbers; a mask of "
                        "several classes, or with an ignore index, is PNG or the like")  # fmt: skip
    if how.white_is_zero:
        raise UserError(f"{path}: a grey picture whose zero is white, so that its numbers can be "
                        "read in two ways; save it with black as zero, as PNG does")  # fmt: skip
    if how.wide:
        raise _too_wide(path)
    if image.mode == "P":
        indices = np.asarray(image)
        _check_greys(indices, _palette(image), known, path)
        return indices
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode == "L" or image.mode.startswith("I"):
        return _unscaled(np.asarray(image), how)
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values) & (values == np.rint(values))).all():
            raise UserError(f"{path}: values that aren't whole numbers; a mask of several classes "
                            "holds class numbers")  # fmt: skip
        # Beyond 64 bits there is no class, but the number to be named.
        return values.astype(np.int64) if np.abs(values).max(initial=0) < 2**63 else values
    if image.mode not in ("LA", "La", "RGB", "RGBA", "RGBa"):
        raise _coloured(path)
    array = np.asarray(
        converted(image, "RGBA" if image.mode.lower().endswith("a") else "RGB", path)
    )
    numbers = array[..., 0]
    if (array[..., :3] != numbers[..., None]).any():
        raise _coloured(path)
    if array.shape[2] == 4 and np.ptp(array[..., 3]) > 0:
        _require_agreement(numbers > 0, array[..., 3] > 127, path)
    return numbers


def _check_greys(
    indices: Numbers, palette: NDArray[np.uint8], known: Collection[int], path: Path
) -> None:
    """Refuse a palette whose greys are class numbers too, other ones than its indices.

    A program that makes files small turns grey into such a palette, ordered in its own way.
    """
    level = palette[:, 0]
    grey = (palette == level[:, None]).all(1) & np.isin(level, list(known))
    if not (grey & (level != np.arange(256))).any():
        return
    used = np.bincount(indices.ravel(), minlength=256) > 0
    if grey[used].all() and (level != np.arange(256))[used].any():
        raise UserError(f"{path}: a palette of greys that are class numbers, but not those of the "
                        "indices; save the mask as grey")  # fmt: skip


def _palette(image: Image.Image) -> NDArray[np.uint8]:
    """(256, 3); black where the file has no colour."""
    palette = np.zeros((256, 3), np.uint8)
    colours = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    palette[: len(colours)] = colours
    return palette


def known_classes(num_classes: int, ignore_index: int | None) -> set[int]:
    """The numbers that a mask may hold."""
    return set(range(num_classes)) | ({ignore_index} if ignore_index is not None else set())


def check_classes(
    numbers: Numbers, num_classes: int, ignore_index: int | None, path: Path
) -> NDArray[np.uint8]:
    """Class numbers as uint8.

    Raises:
        UserError: one is neither a class nor the ignore index.
    """
    known = list(known_classes(num_classes, ignore_index))
    if numbers.dtype == np.uint8:
        table = np.zeros(256, bool)
        table[known] = True
        fits = table[numbers]
    else:
        fits = np.isin(numbers, known)
    if not fits.all():
        allowed = f"0 to {num_classes - 1}"
        allowed += "" if ignore_index is None else f" and {ignore_index} (ignored)"
        raise UserError(
            f"{path}: mask value {numbers[~fits].min()} is none of the {num_classes} classes "
            f"({allowed})"
        )
    return numbers.astype(np.uint8)


def remapped(
    numbers: Numbers, remap: Mapping[int, int], ignore_index: int | None
) -> NDArray[np.uint8]:
    """Classes by the file's numbers; all others have the ignore index."""
    assert ignore_index is not None, "a set with remapped labels has an ignore index"
    found = np.full(numbers.shape, ignore_index, np.uint8)
    for value, index in remap.items():
        found[numbers == value] = index
    return found


def union(parts: list[NDArray[np.uint8]], paths: tuple[Path, ...]) -> NDArray[np.uint8]:
    """The masks of one image in one; 0 is background.

    Raises:
        UserError: two say different classes of one pixel.
    """
    whole = parts[0]
    for part, path in zip(parts[1:], paths[1:], strict=True):
        if ((whole > 0) & (part > 0) & (whole != part)).any():
            raise UserError(f"{path}: says another class than {paths[0].name} of the same pixels; "
                            "masks that are united may overlap in one class only")  # fmt: skip
        whole = np.maximum(whole, part)
    return whole


# --------------------------------------------------------------------- background, foreground


def foreground(image: Image.Image, how: Storage, path: Path, nonzero: bool) -> NDArray[np.uint8]:
    """(H, W) 0 or 1 by what is shown: light is foreground, or, with `nonzero`, all but black.

    An object may be in the transparency instead, where the colour is everywhere the same or both
    say the same.

    Raises:
        UserError: the picture doesn't show two sides.
    """
    if how.wide:
        raise _too_wide(path)
    if nonzero and how.lossy:
        raise UserError(f"{path}: compressed with loss, which leaves little of what is 0; a mask "
                        "whose foreground is all but 0 is PNG or the like")  # fmt: skip

    def decided(values: Numbers, lossy: bool = how.lossy) -> NDArray[np.uint8]:
        return _above_zero(values, path) if nonzero else _cut(values, path, lossy)

    if not image.has_transparency_data:
        return decided(_shown(image, how, path))
    rgba = np.asarray(converted(image, "RGBA", path))
    colours, alpha = rgba[..., :3], rgba[..., 3]
    varied = bool((colours != colours[:1, :1]).any())
    if np.ptp(alpha) == 0:
        if alpha.max(initial=0) == 0 and varied:
            raise UserError(f"{path}: wholly transparent, over colours that differ; save the mask "
                            "without transparency")  # fmt: skip
        return decided(colours) if alpha.max(initial=0) else np.zeros(alpha.shape, np.uint8)
    by_alpha = decided(alpha)
    if varied:
        _require_agreement(decided(colours) > 0, by_alpha > 0, path)
    return by_alpha


def _shown(image: Image.Image, how: Storage, path: Path) -> Numbers:
    """(H, W) or (H, W, 3): levels of grey or colours, 1 to 0 where a file holds no others."""
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8) * 255
    if image.mode in ("L", "F") or image.mode.startswith("I"):
        values = np.asarray(image)
        stored = _unscaled(values, how)
        return stored if stored.max(initial=0) <= 1 else values
    if image.mode == "P":
        return _palette(image)[np.asarray(image)]
    return np.asarray(converted(image, "RGB", path))


def _above_zero(values: Numbers, path: Path) -> NDArray[np.uint8]:
    if values.min(initial=0) < 0:
        raise UserError(f"{path}: mask value {values.min()} is below 0")
    return (_lightest(values) > 0).astype(np.uint8)


def _lightest(values: Numbers) -> Numbers:
    return values if values.ndim == 2 else np.asarray(values.max(-1))


def _cut(values: Numbers, path: Path, lossy: bool) -> NDArray[np.uint8]:
    """Cut at half the range: 1, 255 or 65535, the smallest that holds the values."""
    light = _lightest(values)
    lowest, highest = light.min(initial=0), light.max(initial=0)
    if lowest < 0 or highest > 65535 or not np.isfinite(highest):
        raise UserError(f"{path}: mask value {lowest if lowest < 0 else highest} is neither "
                        "background nor foreground")  # fmt: skip
    if lossy and 0 < highest <= _FAINT:
        raise UserError(f"{path}: values up to {highest}, compressed with loss: either nothing or "
                        "a mask of 0 and 1; save it as PNG")  # fmt: skip
    top = next(limit for limit in (1, 255, 65535) if highest <= limit)
    found = light > top / 2
    # Antialiased borders have many greys; 1 beside 255 and no other is a class beside void.
    if top == 255 and not lossy and (light == 1).any() and np.isin(light, (0, 1, 255)).all():
        raise UserError(
            f"{path}: holds 0, 1 and 255; if 255 doesn't count, set data.ignore_index to 255, "
            "otherwise save the mask with two values"
        )
    if not found.any() and highest > 0 and not (lossy and highest <= _NOISE):
        raise UserError(
            f"{path}: mask value {highest} is neither background nor foreground; a binary mask "
            f"holds 0 and 1, or 0 and {top if top > 1 else 255}"
        )
    if found.all() and _extent(values) > (_NOISE if lossy else 0):
        raise UserError(
            f"{path}: all of it is foreground, though not of one colour; a binary mask holds 0 and "
            "1, or 0 and 255, the background being 0"
        )
    return found.astype(np.uint8)


def _extent(values: Numbers) -> float:
    """From the darkest to the lightest, of the channel where that is most."""
    return max(float(np.ptp(channel)) for channel in np.moveaxis(np.atleast_3d(values), -1, 0))


# ---------------------------------------------------------------------------------- of both


def converted(image: Image.Image, mode: str, path: Path) -> Image.Image:
    """The image in another of Pillow's modes.

    Raises:
        UserError: there is no way from its own.
    """
    try:
        return image.convert(mode)
    except ValueError as error:
        raise UserError(
            f"{path}: a picture of the kind {image.mode}, which can't be read as {mode} ({error}); "
            "save it as grey or RGB"
        ) from None


def _unscaled(values: Numbers, how: Storage) -> Numbers:
    if how.highest is None:
        return values
    top = 255 if values.dtype == np.uint8 else 65535
    return np.rint(values * (how.highest / top)).astype(np.int64)


def _require_agreement(by_colour: Numbers, by_alpha: Numbers, path: Path) -> None:
    if (by_colour != by_alpha).any():
        raise UserError(
            f"{path}: its colours and its transparency show different objects; save the mask "
            "without transparency"
        )


def _coloured(path: Path) -> UserError:
    return UserError(f"{path}: a colour picture; a mask of several classes holds indices")


def _too_wide(path: Path) -> UserError:
    return UserError(f"{path}: 16 bits a colour; save the mask as grey, of 8 or 16 bits")
