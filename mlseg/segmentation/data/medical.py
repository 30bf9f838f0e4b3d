"""Slices of DICOM and NIfTI: read within the bound on pixels that images have; masks beside them.

Needs the extra ``medical`` (pydicom, nibabel). What greys mean is taken from the file: DICOM's
modality transformation and its first window (PS3.3, C.11.2.1), NIfTI's scaling and its
``cal_min`` and ``cal_max``. Without a window bytes are taken as they are, and other numbers from
the slice's lowest to its highest. A mask's numbers are those of the transformation or scaling.
"""

from __future__ import annotations

import importlib
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlseg.errors import UserError
from mlseg.files import replacing, writing
from mlseg.segmentation.data import dicom, nifti
from mlseg.segmentation.data.labels import Storage
from mlseg.segmentation.data.pixels import as_array, decoding

DICOM, NIFTI = (".dcm", ".dicom"), (".nii", ".nii.gz")
SOFTWARE = dicom.SOFTWARE


@dataclass(frozen=True)
class Slice:
    """One picture of a medical file.

    Attributes:
        image: (channels, H, W) uint8.
        header: what its mask takes over: a DICOM data set without pixels, or a NIfTI image's header
            and affine.
    """

    image: NDArray[np.uint8]
    header: Any


def suffix(path: Path) -> str:
    """``.dcm`` of DICOM, ``.nii`` or ``.nii.gz`` of NIfTI; empty for anything else."""
    name = path.name.lower()
    return next((end for end in (*DICOM, ".nii.gz", ".nii") if name.endswith(end)), "")


def stem(path: Path) -> str:
    """A file's name without its ending, ``.nii.gz`` being one."""
    end = suffix(path)
    return path.name[: -len(end)] if end else path.stem


def read_slice(path: Path, channels: int) -> Slice:
    """A slice as an image of 1 or 3 channels.

    Raises:
        UserError: it is no such file or damaged, has no pixels, too many or several slices, or the
            extra is missing.
    """
    picture, header = _shown(path)
    return Slice(as_array(Image.fromarray(picture), channels, path), header)


def read_picture(path: Path) -> Image.Image:
    """A slice as a picture of greys or colours of 8 bits; raises as :func:`read_slice`."""
    return Image.fromarray(_shown(path)[0])


def _shown(path: Path) -> tuple[NDArray[np.uint8], Any]:
    module, library = _reader(path)
    with decoding(path), _silent():
        picture, header = module.picture(path, library)
        if not picture.size:
            raise UserError(f"{path}: no pixels in it")
        return picture, header


def read_numbers(path: Path) -> tuple[Image.Image, Storage]:
    """A slice of a mask as Pillow's image of whole numbers, or of floats, and how it was stored.

    Raises:
        UserError: as :func:`read_slice`; it holds colours, or its zero is white.
    """
    module, library = _reader(path)
    with decoding(path), _silent():
        numbers, how = module.numbers(path, library)
        if not numbers.size:
            raise UserError(f"{path}: no pixels in it")
        whole = numbers.astype(np.int32)  # of what doesn't fit, something else
        fits = np.array_equal(whole, numbers)
        return Image.fromarray(whole if fits else numbers.astype(np.float32)), how


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of a slice, without its pixels; raises as :func:`read_slice`."""
    module, library = _reader(path)
    with decoding(path), _silent():
        found: tuple[int, int] = module.size(module.head(path, library))
        return found


def require_same_axes(image: Path, mask: Path) -> None:
    """Raise UserError for a mask that lies otherwise in the patient than its image, if both say."""
    if not (suffix(image) and suffix(mask)):
        return
    found = []
    for path in (image, mask):
        module, library = _reader(path)
        with decoding(path), _silent():
            found.append(module.axes(module.head(path, library)))
    if any(axes is None for axes in found):
        return
    cosines = (found[0] * found[1]).sum(1)
    if not (cosines > 0.5).all():
        raise UserError(
            f"{mask}: its rows or columns run another way through the patient than those of "
            f"{image.name}; save it with its image's orientation"
        )


def write_mask(mask_HW: NDArray[np.uint8], like: Slice, path: Path) -> None:
    """The mask of a slice in its format, with its place and spacing: class numbers as 8 bits.

    Raises:
        RunError: it can't be written.
    """
    with writing(path), replacing(path) as temporary, _silent():
        if suffix(path) in DICOM:
            dicom.write(mask_HW, like.header, temporary, _library("pydicom", path))
        else:
            temporary.write_bytes(nifti.file_of(mask_HW, like.header, path))


def is_own(path: Path) -> bool:
    """Whether such a file is a mask that an earlier call has written."""
    try:
        module, library = _reader(path)
        with _silent():
            found: bool = module.is_own(path, library)
        return found
    except Exception:  # noqa: BLE001, somebody's file may be anything
        return False


def _reader(path: Path) -> tuple[Any, Any]:
    """The module that reads such a file, and the library that it needs."""
    if suffix(path) in DICOM:
        return dicom, _library("pydicom", path)
    return nifti, _library("nibabel", path)


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{path}: reading it needs {name}, of the extra 'medical'; install it with uv pip "
            "install '.[medical]' in the checkout"
        ) from None


class _Silence:
    """Keeps the libraries quiet in any thread: what they forgive, and what they raise anyway.

    What is switched off belongs to the process: the first to come in does it, the last undoes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()
        self._disabled = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._disabled = logging.root.manager.disable
                logging.disable(max(logging.CRITICAL, self._disabled))
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._caught.__exit__(None, None, None)
                    logging.disable(self._disabled)


_silent = _Silence()
