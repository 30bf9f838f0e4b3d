"""A slice of DICOM: its greys as a picture, or the numbers of a mask; and a mask as such a file."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlseg.errors import UserError
from mlseg.files import require_file
from mlseg.segmentation.data.labels import Storage
from mlseg.segmentation.data.pixels import Axes, Numbers, by_range, require_few, to_bytes

SOFTWARE = "mlseg predict"
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
_OF_FRAMES = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
}
"""Where an enhanced file says of its frames what others say of a slice (PS3.3, C.7.6.16)."""
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_WINDOWS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_LOSSY = ("JPEGBaseline8Bit", "JPEGExtended12Bit", "JPEGLSNearLossless", "JPEG2000", "HTJ2K")


def is_own(path: Path, pydicom: Any) -> bool:
    """Whether it says that :func:`write` made it."""
    _require_plain(path, pydicom)
    found = pydicom.dcmread(path, stop_before_pixels=True)
    return str(found.get("SoftwareVersions")) == SOFTWARE


def head(path: Path, pydicom: Any) -> Any:
    """All of a file but its pixels; UserError where they aren't those of one slice."""
    _require_plain(path, pydicom)
    found = _of_the_frame(pydicom.dcmread(path, stop_before_pixels=True))
    rows, columns = size(found)
    if not (rows and columns):
        raise UserError(f"{path}: a DICOM without pixels")
    frames = int(found.get("NumberOfFrames") or 1)
    if frames > 1:
        raise UserError(f"{path}: {frames} frames in one file; save each slice as a file")
    require_few(rows, columns, path)
    return found


def _of_the_frame(found: Any) -> Any:
    """With what an enhanced file says of its one frame where others say it."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in found.get(groups) or ():
            for sequence, keys in _OF_FRAMES.items():
                for item in group.get(sequence) or ():
                    for key in keys:
                        if key in item and key not in found:
                            found[key] = item[key]
    return found


def size(head: Any) -> tuple[int, int]:
    """(H, W)."""
    return int(head.get("Rows") or 0), int(head.get("Columns") or 0)


def axes(head: Any) -> Axes | None:
    """Where its right and its bottom lie in the patient, or None; DICOM counts to left and back."""
    cosines = head.get("ImageOrientationPatient")
    if cosines is None or len(cosines) != 6:
        return None
    return np.asarray(cosines, np.float64).reshape(2, 3) * (-1, -1, 1)


def picture(path: Path, pydicom: Any) -> tuple[NDArray[np.uint8], Any]:
    """(H, W) or (H, W, 3) as it is to be shown, and its head."""
    values, whole, top = _pixels(path, pydicom)
    kind = str(whole.get("PhotometricInterpretation"))
    if kind == "PALETTE COLOR":
        values = pydicom.pixels.apply_color_lut(values, whole)
        values = (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
    if values.ndim == 3:
        if values.dtype != np.uint8 or values.shape[2] != 3:
            raise UserError(f"{path}: colours of {values.dtype}; 8 bits for each of three channels")
        return values, top
    grey = _windowed(values, whole, pydicom, path)
    return (255 - grey if kind == "MONOCHROME1" else grey), top


def numbers(path: Path, pydicom: Any) -> tuple[Numbers, Storage]:
    """(H, W) values of the modality, without a window, and how they are stored."""
    values, whole, _ = _pixels(path, pydicom)
    kind = str(whole.get("PhotometricInterpretation"))
    if values.ndim != 2 or not kind.startswith("MONOCHROME"):
        raise UserError(f"{path}: a DICOM of colours ({kind}); a mask holds one number a pixel")
    if kind == "MONOCHROME1":
        raise UserError(f"{path}: a mask whose zero is white (MONOCHROME1); save it as MONOCHROME2")
    lossy = _syntax(whole) in [getattr(pydicom.uid, name, None) for name in _LOSSY]
    lossy = lossy or str(whole.get("LossyImageCompression")) == "01"
    return _meant(values, whole, pydicom, path), Storage(lossy=lossy)


def _require_plain(path: Path, pydicom: Any) -> None:
    """Refuse what would have to be unpacked as a whole before its size is known."""
    require_file(path, 32 * (Image.MAX_IMAGE_PIXELS or 2**30))
    meta = pydicom.filereader.read_file_meta_info(path)
    syntax = meta.get("TransferSyntaxUID")
    if syntax is not None and pydicom.uid.UID(syntax).is_transfer_syntax and syntax.is_deflated:
        raise UserError(f"{path}: a deflated DICOM; save it with another transfer syntax")


def _pixels(path: Path, pydicom: Any) -> tuple[NDArray[Any], Any, Any]:
    """Values as stored, (H, W) or (H, W, channels); the whole file; its head."""
    top = head(path, pydicom)
    whole = _of_the_frame(pydicom.dcmread(path))
    if not any(key in whole for key in _PIXELS):
        raise UserError(f"{path}: a DICOM without pixels")
    _require_decoder(path, _syntax(whole), pydicom)
    values = whole.pixel_array
    if values.shape[:2] != size(top) or values.ndim not in (2, 3):
        raise UserError(f"{path}: pixels of shape {values.shape}; one slice is expected")
    return values, whole, top


def _syntax(whole: Any) -> Any:
    return getattr(whole, "file_meta", {}).get("TransferSyntaxUID")


def _require_decoder(path: Path, syntax: Any, pydicom: Any) -> None:
    if syntax is None or not syntax.is_transfer_syntax or not syntax.is_encapsulated:
        return
    try:
        if pydicom.pixels.get_decoder(syntax).is_available:
            return
    except NotImplementedError:
        pass
    raise UserError(
        f"{path}: compressed as {syntax.name}, for which pydicom has no decoder here; install "
        "pylibjpeg with pylibjpeg-libjpeg and pylibjpeg-openjpeg, or save it uncompressed"
    )


def _meant(values: NDArray[Any], whole: Any, pydicom: Any, path: Path) -> NDArray[Any]:
    """Values of the modality: by its table or its rescaling, as stored where there is neither."""
    if not whole.get("ModalityLUTSequence"):
        if not _has_both(whole, "RescaleSlope", "RescaleIntercept", path):
            return values
        slope, intercept = float(whole.RescaleSlope), float(whole.RescaleIntercept)
        if not (np.isfinite([slope, intercept]).all() and slope):
            raise UserError(f"{path}: a rescaling of slope {slope:g} and intercept {intercept:g}")
    return np.asarray(pydicom.pixels.apply_modality_lut(values, whole))


def _has_both(whole: Any, one: str, other: str, path: Path) -> bool:
    """Whether it says both; UserError where it says one alone, which means nothing."""
    has, lacks = (one, other) if whole.get(one) is not None else (other, one)
    if whole.get(has) is None:
        return False
    if whole.get(lacks) is None:
        raise UserError(f"{path}: {has} without {lacks}; write both, or neither")
    return True


def _windowed(values: NDArray[Any], whole: Any, pydicom: Any, path: Path) -> NDArray[np.uint8]:
    meant = _meant(values, whole, pydicom, path)
    if not _has_both(whole, "WindowCenter", "WindowWidth", path):
        if whole.get("VOILUTSequence"):
            table = whole.VOILUTSequence[0]
            looked = np.asarray(pydicom.pixels.apply_voi_lut(meant, whole))
            return to_bytes(looked, 0.0, 2.0 ** int(table.LUTDescriptor[2]) - 1, path)
        return by_range(meant, path)
    centre, width = (
        float(np.ravel(whole[key].value)[0]) for key in ("WindowCenter", "WindowWidth")
    )
    how = str(whole.get("VOILUTFunction") or "LINEAR")
    if how not in _WINDOWS:
        raise UserError(f"{path}: a window of the kind {how}; there are {', '.join(_WINDOWS)}")
    if not (np.isfinite([centre, width]).all() and width > (1 if how == "LINEAR" else 0)):
        raise UserError(f"{path}: a window of centre {centre:g} and width {width:g}")
    if how == "SIGMOID":
        scaled = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (meant - centre) / width, -700, 700)))
        return to_bytes(scaled, 0.0, 1.0, path)
    if how == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return to_bytes(meant, centre - width / 2, centre + width / 2, path)


def write(mask_HW: NDArray[np.uint8], head: Any, path: Path, pydicom: Any) -> None:
    """A mask with the place, spacing and study of the slice whose head that is."""
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
