"""A slice of NIfTI: its greys as a picture, or the numbers of a mask; and a mask as such a file."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlseg.errors import UserError
from mlseg.files import require_file
from mlseg.segmentation.data.dicom import SOFTWARE
from mlseg.segmentation.data.labels import Storage
from mlseg.segmentation.data.pixels import Axes, Numbers, by_range, require_few, to_bytes

Like = tuple[Any, Any, type[Any]]
"""Header, affine and class of nibabel's image."""

_HEADER = 540  # bytes of NIfTI-2's; NIfTI-1's are 348
_LARGEST_OFFSET = 2**20
_LARGEST_REST = 64  # MiB that may follow the pixels


def is_own(path: Path, nibabel: Any) -> bool:
    """Whether it says that :func:`file_of` made it."""
    header, _ = _header(path, nibabel)
    return bytes(header["descrip"]).rstrip(b"\0") == SOFTWARE.encode()


def head(path: Path, nibabel: Any) -> Any:
    """The header; UserError where it isn't one of a slice."""
    return _slice_header(path, nibabel)[0]


def size(header: Any) -> tuple[int, int]:
    """(H, W): the first axis goes to the right, the second down."""
    width, height, *_ = header.get_data_shape()
    return int(height), int(width)


def axes(header: Any) -> Axes | None:
    """Where its right and its bottom lie in the patient, or None where nobody has said.

    A header without a code says nothing, nor does the matrix that arrays get who come from nowhere:
    a positive diagonal, at the origin.
    """
    if not (header["sform_code"] or header["qform_code"]):
        return None
    affine = header.get_best_affine()
    diagonal = np.diag(np.diag(affine))
    if np.array_equal(affine, diagonal) and (np.diag(affine) > 0).all():
        return None
    columns = affine[:3, :2].T
    length = np.linalg.norm(columns, axis=1, keepdims=True)
    return columns / length if np.isfinite(length).all() and length.all() else None


def picture(path: Path, nibabel: Any) -> tuple[NDArray[np.uint8], Like]:
    """(H, W) or (H, W, 3) as it is to be shown, and what its mask takes over."""
    image, stored, header, kind = _voxels(path, nibabel)
    like = (header, image.affine, kind)
    if stored.dtype.names is not None:  # colours
        if stored.dtype.names[:3] != ("R", "G", "B"):
            raise UserError(f"{path}: values of type {stored.dtype}; greys or RGB are expected")
        shown = np.stack([stored[name] for name in "RGB"], -1).astype(np.uint8)
        return np.ascontiguousarray(shown.transpose(1, 0, 2)), like
    values = _scaled(image, stored, path)
    low, high = float(header["cal_min"]), float(header["cal_max"])
    grey = to_bytes(values, low, high, path) if high > low else by_range(values, path)
    return np.ascontiguousarray(grey.T), like


def numbers(path: Path, nibabel: Any) -> tuple[Numbers, Storage]:
    """(H, W) values, scaled as the header says, and how they are stored."""
    image, stored, _, _ = _voxels(path, nibabel)
    if stored.dtype.names is not None:
        raise UserError(f"{path}: a NIfTI of colours; a mask holds one number a pixel")
    return _scaled(image, stored, path).T, Storage()


def _scaled(image: Any, stored: NDArray[Any], path: Path) -> NDArray[Any]:
    if stored.dtype.kind not in "uif":
        raise UserError(f"{path}: values of type {stored.dtype}; real numbers are expected")
    if image.dataobj.slope == 1 and image.dataobj.inter == 0:
        return stored
    return np.asanyarray(image.dataobj).reshape(stored.shape)


def _voxels(path: Path, nibabel: Any) -> tuple[Any, NDArray[Any], Any, type[Any]]:
    """nibabel's image, its values as stored (W, H), its header and its class."""
    header, kind = _slice_header(path, nibabel)
    shape = tuple(int(side) for side in header.get_data_shape())
    offset = int(header.get_data_offset())
    if not 0 <= offset <= _LARGEST_OFFSET:
        raise UserError(f"{path}: not a readable image (its pixels begin at byte {offset})")
    wanted = offset + shape[0] * shape[1] * header.get_data_dtype().itemsize
    with _opened(path) as file:
        image = kind.from_bytes(file.read(wanted))
        if path.name.lower().endswith(".gz"):
            _require_sound(file, path)
    stored = np.asanyarray(image.dataobj.get_unscaled()).reshape(shape[:2])
    return image, stored, header, kind


def _require_sound(file: Any, path: Path) -> None:
    """Read on to the checksum, which stands at the end: gzip compares it there, and raises."""
    for _ in range(_LARGEST_REST):
        if not file.read(2**20):
            return
    raise UserError(f"{path}: more than {_LARGEST_REST} MiB behind its pixels")


def _slice_header(path: Path, nibabel: Any) -> tuple[Any, type[Any]]:
    header, kind = _header(path, nibabel)
    shape = tuple(int(side) for side in header.get_data_shape())
    if len(shape) < 2 or any(side != 1 for side in shape[2:]):
        raise UserError(
            f"{path}: {' x '.join(map(str, shape))} voxels; a slice is expected, two axes longer "
            "than 1 (save each slice of a volume as a file: volume.slicer[:, :, k:k + 1] of "
            "nibabel)"
        )
    require_few(shape[1], shape[0], path)
    return header, kind


def _opened(path: Path) -> Any:
    require_file(path)
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _header(path: Path, nibabel: Any) -> tuple[Any, type[Any]]:
    """Of a file in one piece; nothing beyond is read."""
    with _opened(path) as file:
        start = file.read(_HEADER)
    second = start[:4] in (_HEADER.to_bytes(4, "little"), _HEADER.to_bytes(4, "big"))
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    return kind.header_class(start[: kind.header_class.sizeof_hdr]), kind


def file_of(mask_HW: NDArray[np.uint8], like: Like, path: Path) -> bytes:
    """A mask with the header, place and spacing of its slice."""
    header, affine, kind = like
    shape = header.get_data_shape()
    made = kind(np.ascontiguousarray(mask_HW.T).reshape(shape), affine, header)
    made.header.set_data_dtype(np.uint8)
    made.header.set_slope_inter(1, 0)
    made.header["descrip"] = SOFTWARE.encode()
    made.header["cal_min"] = made.header["cal_max"] = 0
    made.header.extensions.clear()
    data: bytes = made.to_bytes()
    # Without a time in its head, so that the same mask gives the same file.
    return gzip.compress(data, mtime=0) if path.name.lower().endswith(".gz") else data
