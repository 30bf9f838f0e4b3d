"""Slices of DICOM and NIfTI: read within the bound on pixels that images have; masks beside them.

Needs the extra ``medical`` (pydicom, nibabel). What greys mean is taken from the file: DICOM's
modality transformation and its first window (PS3.3, C.11.2.1), NIfTI's scaling and its
``cal_min`` and ``cal_max``. Without a window bytes are taken as they are, and other numbers from
the slice's lowest to its highest.
"""

from __future__ import annotations

import gzip
import importlib
import logging
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
from mlseg.files import replacing, require_file, writing
from mlseg.segmentation.data import decode

DICOM, NIFTI = (".dcm", ".dicom"), (".nii", ".nii.gz")
SOFTWARE = "mlseg predict"
_HEADER = 540  # bytes of NIfTI-2's; NIfTI-1's are 348
_LARGEST_OFFSET = 2**20
_GEOMETRY = (
    "SpecificCharacterSet",
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SliceThickness",
    "SpacingBetweenSlices",
    "SliceLocation",
    "Laterality",
    "PatientOrientation",
)


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


def read_slice(path: Path, channels: int) -> Slice:
    """A slice as an image of 1 or 3 channels.

    Raises:
        UserError: it is no such file or damaged, has no pixels, too many or several slices, or the
            extra is missing.
    """
    read = _read_dicom if suffix(path) in DICOM else _read_nifti
    name = "pydicom" if read is _read_dicom else "nibabel"
    library = _library(name, path)
    with decode.decoding(path), _silent():
        picture, header = read(path, library)
        if not picture.size:
            raise UserError(f"{path}: no pixels in it")
        return Slice(decode.as_array(Image.fromarray(picture), channels, path), header)


def write_mask(mask_HW: NDArray[np.uint8], like: Slice, path: Path) -> None:
    """The mask of a slice in its format, with its place and spacing: class numbers as 8 bits.

    Raises:
        RunError: it can't be written.
    """
    with writing(path), replacing(path) as temporary, _silent():
        if suffix(path) in DICOM:
            _write_dicom(mask_HW, like.header, temporary)
        else:
            temporary.write_bytes(_nifti_bytes(mask_HW, like.header, path))


def is_own(path: Path) -> bool:
    """Whether such a file is a mask that an earlier call has written."""
    try:
        if suffix(path) in DICOM:
            with _silent():
                pydicom = _library("pydicom", path)
                _require_plain(path, pydicom)
                found = pydicom.dcmread(path, stop_before_pixels=True)
            return str(found.get("SoftwareVersions")) == SOFTWARE
        header, _ = _nifti_header(path, _library("nibabel", path))
        return bytes(header["descrip"]).rstrip(b"\0") == SOFTWARE.encode()
    except Exception:  # noqa: BLE001, somebody's file may be anything
        return False


@contextmanager
def _silent() -> Iterator[None]:
    """Within this block the libraries say nothing of files that they forgive much."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{path}: reading it needs {name}, of the extra 'medical'; install it with uv pip "
            "install '.[medical]' in the checkout"
        ) from None


def _require_few(rows: int, columns: int, path: Path) -> None:
    if rows < 1 or columns < 1:
        raise UserError(f"{path}: no pixels in it")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and rows * columns > most:
        raise Image.DecompressionBombError


# ----------------------------------------------------------------------------------------- DICOM


def _require_plain(path: Path, pydicom: Any) -> None:
    """Refuse what would have to be unpacked as a whole before its size is known."""
    require_file(path, 32 * (Image.MAX_IMAGE_PIXELS or 2**30))
    meta = pydicom.filereader.read_file_meta_info(path)
    syntax = meta.get("TransferSyntaxUID")
    if syntax is not None and pydicom.uid.UID(syntax).is_transfer_syntax and syntax.is_deflated:
        raise UserError(f"{path}: a deflated DICOM; save it with another transfer syntax")


def _read_dicom(path: Path, pydicom: Any) -> tuple[NDArray[np.uint8], Any]:
    _require_plain(path, pydicom)
    head = pydicom.dcmread(path, stop_before_pixels=True)
    rows, columns = int(head.get("Rows") or 0), int(head.get("Columns") or 0)
    if not (rows and columns):
        raise UserError(f"{path}: a DICOM without pixels")
    frames = int(head.get("NumberOfFrames") or 1)
    if frames > 1:
        raise UserError(f"{path}: {frames} frames in one file; save each slice as a file")
    _require_few(rows, columns, path)
    whole = pydicom.dcmread(path)
    if "PixelData" not in whole:
        raise UserError(f"{path}: a DICOM without pixels")
    values = whole.pixel_array
    if values.shape[:2] != (rows, columns) or values.ndim not in (2, 3):
        raise UserError(f"{path}: pixels of shape {values.shape}; one slice is expected")
    kind = str(whole.get("PhotometricInterpretation"))
    if kind == "PALETTE COLOR":
        values = pydicom.pixels.apply_color_lut(values, whole)
        values = (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
    if values.ndim == 3:
        if values.dtype != np.uint8 or values.shape[2] != 3:
            raise UserError(f"{path}: colours of {values.dtype}; 8 bits for each of three channels")
        return values, head
    grey = _windowed(values, whole, pydicom, path)
    return (255 - grey if kind == "MONOCHROME1" else grey), head


def _windowed(values: NDArray[Any], whole: Any, pydicom: Any, path: Path) -> NDArray[np.uint8]:
    meant = np.asarray(pydicom.pixels.apply_modality_lut(values, whole))
    if whole.get("WindowCenter") is None or whole.get("WindowWidth") is None:
        if whole.get("VOILUTSequence"):
            table = whole.VOILUTSequence[0]
            looked = np.asarray(pydicom.pixels.apply_voi_lut(meant, whole))
            return _to_bytes(looked, 0.0, 2.0 ** int(table.LUTDescriptor[2]) - 1, path)
        return _by_range(meant, path)
    centre, width = (
        float(np.ravel(whole[key].value)[0]) for key in ("WindowCenter", "WindowWidth")
    )
    how = str(whole.get("VOILUTFunction") or "LINEAR")
    if not (np.isfinite([centre, width]).all() and width > (1 if how == "LINEAR" else 0)):
        raise UserError(f"{path}: a window of centre {centre:g} and width {width:g}")
    if how == "SIGMOID":
        scaled = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (meant - centre) / width, -700, 700)))
        return _to_bytes(scaled, 0.0, 1.0, path)
    if how == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return _to_bytes(meant, centre - width / 2, centre + width / 2, path)


def _write_dicom(mask_HW: NDArray[np.uint8], head: Any, path: Path) -> None:
    pydicom = importlib.import_module("pydicom")
    uid, made = pydicom.uid, pydicom.Dataset()
    for key in _GEOMETRY:
        if key in head:
            made[key] = head[key]
    origin = str(head.get("SOPInstanceUID") or "")
    made.SOPClassUID = uid.SecondaryCaptureImageStorage
    made.SOPInstanceUID = uid.generate_uid(entropy_srcs=[origin, SOFTWARE, "instance"])
    made.SeriesInstanceUID = uid.generate_uid(
        entropy_srcs=[str(head.get("SeriesInstanceUID") or origin), SOFTWARE, "series"]
    )
    made.InstanceNumber = head.get("InstanceNumber")
    made.SeriesNumber = head.get("SeriesNumber")
    made.Modality, made.ConversionType = "OT", "WSD"
    made.SeriesDescription, made.SoftwareVersions = "segmentation: class numbers", SOFTWARE
    made.ImageType = ["DERIVED", "SECONDARY"]
    made.Rows, made.Columns = mask_HW.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
    made.PixelRepresentation = 0
    data = mask_HW.tobytes()
    made.PixelData = data + b"\0" * (len(data) % 2)
    made["PixelData"].VR = "OB"
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, made, enforce_file_format=True)


# ----------------------------------------------------------------------------------------- NIfTI


def _opened(path: Path) -> Any:
    require_file(path)
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _nifti_header(path: Path, nibabel: Any) -> tuple[Any, type[Any]]:
    """Of a file in one piece; nothing beyond is read."""
    with _opened(path) as file:
        start = file.read(_HEADER)
    second = start[:4] in (_HEADER.to_bytes(4, "little"), _HEADER.to_bytes(4, "big"))
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    return kind.header_class(start[: kind.header_class.sizeof_hdr]), kind


def _read_nifti(path: Path, nibabel: Any) -> tuple[NDArray[np.uint8], Any]:
    header, kind = _nifti_header(path, nibabel)
    shape = tuple(int(side) for side in header.get_data_shape())
    if len(shape) < 2 or any(side != 1 for side in shape[2:]):
        raise UserError(
            f"{path}: {' x '.join(map(str, shape))} voxels; a slice is expected, two axes longer "
            "than 1 (save each slice of a volume as a file)"
        )
    _require_few(shape[1], shape[0], path)
    offset = int(header.get_data_offset())
    if not 0 <= offset <= _LARGEST_OFFSET:
        raise UserError(f"{path}: not a readable image (its pixels begin at byte {offset})")
    wanted = offset + shape[0] * shape[1] * header.get_data_dtype().itemsize
    with _opened(path) as file:
        image = kind.from_bytes(file.read(wanted))
    stored = np.asanyarray(image.dataobj.get_unscaled()).reshape(shape[:2])
    if stored.dtype.names is not None:  # colours
        if stored.dtype.names[:3] != ("R", "G", "B"):
            raise UserError(f"{path}: values of type {stored.dtype}; greys or RGB are expected")
        picture = np.stack([stored[name] for name in "RGB"], -1).astype(np.uint8)
        return np.ascontiguousarray(picture.transpose(1, 0, 2)), (header, image.affine, kind)
    if stored.dtype.kind not in "uif":
        raise UserError(f"{path}: values of type {stored.dtype}; real numbers are expected")
    plain = image.dataobj.slope == 1 and image.dataobj.inter == 0
    values = stored if plain else np.asanyarray(image.dataobj).reshape(shape[:2])
    low, high = float(header["cal_min"]), float(header["cal_max"])
    grey = _to_bytes(values, low, high, path) if high > low else _by_range(values, path)
    return np.ascontiguousarray(grey.T), (header, image.affine, kind)


def _nifti_bytes(mask_HW: NDArray[np.uint8], like: tuple[Any, Any, type[Any]], path: Path) -> bytes:
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


# ---------------------------------------------------------------------------------------- greys


def _by_range(values: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    return _to_bytes(values, float(values.min()), float(values.max()), path)


def _to_bytes(values: NDArray[Any], low: float, high: float, path: Path) -> NDArray[np.uint8]:
    """``low`` as 0 and ``high`` as 255; what lies beyond is cut."""
    if not (np.isfinite([low, high]).all() and np.isfinite(values).all()):
        raise UserError(f"{path}: values that are NaN or infinite")
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
