"""Slices of DICOM and NIfTI, for tests of the data and of the commands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")


def dicom(path: Path, values: np.ndarray | None, **tags: Any) -> Path:
    """A DICOM file of a grey or coloured slice."""
    made = pydicom.Dataset()
    made.SOPClassUID = pydicom.uid.CTImageStorage
    made.SOPInstanceUID = "1.2.3.4"
    made.StudyInstanceUID, made.SeriesInstanceUID = "1.2.3", "1.2.3.5"
    made.PatientID, made.Modality = "somebody", "CT"
    made.PixelSpacing, made.SliceThickness = [0.5, 0.75], 3
    made.ImagePositionPatient, made.ImageOrientationPatient = [1, 2, 3], [1, 0, 0, 0, 1, 0]
    if values is not None:
        bits = 8 * values.dtype.itemsize
        made.Rows, made.Columns = values.shape[:2]
        made.SamplesPerPixel = 3 if values.ndim == 3 else 1
        made.PhotometricInterpretation = "RGB" if values.ndim == 3 else "MONOCHROME2"
        made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
        made.PixelRepresentation = int(values.dtype.kind == "i")
        if values.ndim == 3:
            made.PlanarConfiguration = 0
        data = values.tobytes()
        made.PixelData = data + b"\0" * (len(data) % 2)
        made["PixelData"].VR = "OW" if bits > 8 else "OB"
    for key, value in tags.items():
        setattr(made, key, value)
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, made, enforce_file_format=True)
    return path


def nifti(path: Path, values: np.ndarray, **header: Any) -> Path:
    made = nibabel.Nifti1Image(values, np.diag([0.5, 0.75, 3.0, 1.0]))
    for key, value in header.items():
        made.header[key] = value
    made.to_filename(path)
    return path
