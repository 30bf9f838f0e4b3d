"""Files to uint8 arrays of one size, with every fault of a file told in one line.

Images are resized by antialiased bilinear interpolation, masks by nearest neighbour: by an
interpolating filter and truncation they would lose part of their foreground. Shapes are stretched
or padded, never cropped. What a mask's pixels mean is decided on all of its file, in `labels`.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mlseg.errors import UserError
from mlseg.files import require_file
from mlseg.segmentation.data import labels, medical
from mlseg.segmentation.data.entry import RawFormat
from mlseg.segmentation.data.pixels import as_array, decoding, unreadable

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What files may be, whatever their names say: none for which Pillow starts another program."""
MEGAPIXELS = 89.0
"""Millions of pixels that an image or mask may have: Pillow's own limit; see `limit_pixels`."""
_ORIENTATION = 0x0112  # EXIF tag


def limit_pixels(megapixels: float) -> None:
    """Set how many millions of pixels an image or mask may have, in this whole process.

    It is Pillow's limit, beyond which it warns; here such files are refused before decoding.
    """
    Image.MAX_IMAGE_PIXELS = int(megapixels * 1e6)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def read_image(
    path: Path, channels: int, size: tuple[int, int] | None = None, raw: RawFormat | None = None
) -> NDArray[np.uint8]:
    """An image as (channels, H, W) uint8.

    Grey files are repeated for three channels, colour is turned to grey (ITU-R BT.601) for one.
    16-bit files are scaled by the smallest of 8, 10, 12, 14 and 16 bits that holds their values.
    Turned upright where the file says how (EXIF). Slices of DICOM and NIfTI: see `medical`.

    Args:
        path: of the file.
        channels: 1 or 3.
        size: (H, W) to resize to; None: the file's own.
        raw: format of files without a header, where `path` has its suffix.

    Raises:
        UserError: the file isn't a readable image, or has too many pixels.
    """
    return as_array(_open_image(path, raw), channels, path, size)


def to_8_bits(values: NDArray[Any], name: str | Path) -> NDArray[np.uint8]:
    """Whole numbers, scaled by the smallest of 8, 10, 12, 14 and 16 bits that holds them.

    Raises:
        UserError: one is below 0.
    """
    lowest, highest = int(values.min(initial=0)), int(values.max(initial=0))
    if lowest < 0:
        raise UserError(f"{name}: values below 0 ({lowest}); scale them to 8 or 16 bits")
    top = next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if highest < 2**bits), highest)
    return np.rint(values * (255 / top)).astype(np.uint8)


def read_mask(
    path: Path,
    kind: str,
    num_classes: int,
    ignore_index: int | None = None,
    size: tuple[int, int] | None = None,
    remap: Mapping[int, int] | None = None,
) -> NDArray[np.uint8]:
    """A mask as (H, W) uint8: class indices, or the ignore index; turned upright as images are.

    A text file holds a row of integers per line (Stanford Background), slices of DICOM and NIfTI
    the numbers that `medical` says.

    Args:
        kind: "binary" (by colour or transparency: 0 and 1, or 0 and 255 with a cut at half the
            range; 16 bits alike), "nonzero" (all but black is foreground), "index" (the numbers as
            stored, or a palette's indices).
        size: (H, W) to resize to; None: the file's own.
        remap: classes by the file's values, for "index"; others have the ignore index.

    Raises:
        UserError: the file isn't readable or holds values that aren't classes.
    """
    found = _read_labels(path, kind, num_classes, ignore_index, remap)
    if size is None or found.shape == size:
        return found
    resized = Image.fromarray(found).resize(size[::-1], Image.Resampling.NEAREST)
    return np.asarray(resized, dtype=np.uint8)


def _read_labels(
    path: Path,
    kind: str,
    num_classes: int,
    ignore_index: int | None,
    remap: Mapping[int, int] | None,
) -> NDArray[np.uint8]:
    """A mask at its own size."""
    image, how = _load_mask(path)
    if kind != "index":
        return labels.foreground(image, how, path, nonzero=kind == "nonzero")
    known = labels.known_classes(num_classes, ignore_index) if remap is None else remap.keys()
    numbers = labels.class_numbers(image, how, path, known)
    if remap is not None:
        return labels.remapped(numbers, remap, ignore_index)
    return labels.check_classes(numbers, num_classes, ignore_index, path)


def _load_mask(path: Path) -> tuple[Image.Image, labels.Storage]:
    if medical.suffix(path):
        return medical.read_numbers(path)
    if path.suffix.lower() == ".txt":
        return _load_text(path), labels.Storage()
    image, how = _load(path)
    return _upright(image, path), how


def image_size(path: Path, raw: RawFormat | None = None) -> tuple[int, int]:
    """(H, W) of an image file as it is shown, without decoding it.

    Raises:
        UserError: it isn't a readable image.
    """
    if _is_raw(path, raw):
        assert raw is not None
        return raw.height, raw.width
    if medical.suffix(path):
        return medical.image_size(path)
    if path.suffix.lower() == ".txt":
        width, height = _load_text(path).size
        return height, width
    with _opened(path) as image:
        width, height = stored_size(image)
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _open_image(path: Path, raw: RawFormat | None) -> Image.Image:
    """Upright, of 8 bits a channel."""
    if _is_raw(path, raw):
        assert raw is not None
        return Image.fromarray(_read_raw(path, raw))
    if medical.suffix(path):
        return medical.read_picture(path)
    image, _ = _load(path)
    return eight_bits(image, path)


def eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Upright, of 8 bits a channel."""
    if image.mode == "F":
        raise UserError(f"{path}: an image of floating-point values; 8 or 16 bits are expected")
    image = _upright(image, path)
    if image.mode.startswith("I"):
        return Image.fromarray(to_8_bits(np.asarray(image).astype(np.int64), path))
    return image


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(W, H) of a file's rows and columns, of which Pillow's size of a TIFF may be the turned."""
    tags: Mapping[int, int] = getattr(image, "tag_v2", {})
    return tags.get(256, image.width), tags.get(257, image.height)


def _upright(image: Image.Image, path: Path) -> Image.Image:
    """Turned and mirrored as the file says (EXIF)."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # which way up it is, is part of the image
        raise unreadable(path, error, "its EXIF data are damaged: ") from error


def _load(path: Path) -> tuple[Image.Image, labels.Storage]:
    """The one picture of a file, as it lies there, and how its numbers are stored."""
    with _opened(path) as image:
        require_one(image, path)
        how = labels.storage(image, path)
        # Pillow unpacks a TIFF without compression by the size that it will be turned to.
        image._size = stored_size(image)
        image.load()
    require_black_zero(image, how.white_is_zero, path)
    return image, how


def require_one(image: Image.Image, path: Path) -> None:
    """Raise UserError for one of several pictures in its file."""
    number = labels.pictures(image)
    if number > 1:
        raise UserError(
            f"{path}: {number} pictures in one file (a stack or an animation); save each as a file"
        )


def require_black_zero(image: Image.Image, white_is_zero: bool, path: Path) -> None:
    """Raise UserError for wide greys that Pillow doesn't invert."""
    if white_is_zero and image.mode.startswith("I"):
        raise UserError(f"{path}: 16 bits of grey whose zero is white; save it with black as zero")


def require_few_pixels(image: Image.Image) -> None:
    """Raise what :func:`decoding` tells, beyond the limit of :func:`limit_pixels`."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise Image.DecompressionBombError


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image of which only the head is read; what fails in the block is the file's fault."""
    with decoding(path):
        require_file(path)
        with Image.open(path, formats=FORMATS) as image:
            require_few_pixels(image)
            yield image


def _load_text(path: Path) -> Image.Image:
    """A text file of integers, a row per line, as an image of 32 bits."""
    try:
        require_file(path, 4 * (Image.MAX_IMAGE_PIXELS or 2**30))
        values = np.loadtxt(path, dtype=np.int32, ndmin=2)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not values.size:
        raise UserError(f"{path}: no labels in it")
    return Image.fromarray(values)


def _is_raw(path: Path, raw: RawFormat | None) -> bool:
    return raw is not None and path.suffix.lower() == f".{raw.suffix.lower()}"


def _read_raw(path: Path, raw: RawFormat) -> NDArray[np.uint8]:
    wanted = raw.height * raw.width * 2
    try:
        require_file(path)
        size = path.stat().st_size
        if size != wanted:
            raise UserError(
                f"{path}: {size} bytes, but {raw.height}x{raw.width} pixels of 16 bits are {wanted}"
            )
        values = np.fromfile(path, dtype=">u2")
    except OSError as error:
        raise unreadable(path, error) from None
    top = 2**raw.bits - 1
    grey = np.minimum(values.reshape(raw.height, raw.width), top).astype(np.float64) / top
    return np.rint(255 * (1 - grey if raw.white_is_zero else grey)).astype(np.uint8)
