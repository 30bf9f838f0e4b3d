"""Slices of DICOM and NIfTI: what is read of them, their masks, and what is refused."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commanding import one_line, train
from medical_files import dicom, nibabel, nifti, pydicom
from PIL import Image

from mlseg import predict
from mlseg.errors import UserError
from mlseg.segmentation.data import medical

BYTES = np.arange(6 * 7, dtype=np.uint8).reshape(6, 7)
WORDS = (np.arange(6 * 7).reshape(6, 7) * 50 - 1000).astype(np.int16)


def grey(path: Path) -> np.ndarray:
    image = medical.read_slice(path, 1).image
    assert image.dtype == np.uint8
    return image[0]


def test_what_the_greys_of_a_dicom_mean(tmp_path: Path) -> None:
    file = tmp_path / "slice.dcm"
    assert np.array_equal(grey(dicom(file, BYTES)), BYTES)
    inverted = dicom(file, BYTES, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(grey(inverted), 255 - BYTES)
    ranged = (WORDS - WORDS.min()) * (255 / np.ptp(WORDS.astype(int)))
    assert np.array_equal(grey(dicom(file, WORDS)), np.rint(ranged))
    # PS3.3, C.11.2.1.2.1, with values in the units of the modality.
    window = {"WindowCenter": [40, 7], "WindowWidth": [400, 8]}
    meant = WORDS * 2.0 + 10
    linear = np.clip(((meant - 39.5) / 399 + 0.5) * 255, 0, 255)
    rescaled = {"RescaleSlope": 2, "RescaleIntercept": 10}
    assert np.array_equal(grey(dicom(file, WORDS, **window, **rescaled)), np.rint(linear))
    exact = np.clip(((meant - 40) / 400 + 0.5) * 255, 0, 255)
    found = grey(dicom(file, WORDS, **window, **rescaled, VOILUTFunction="LINEAR_EXACT"))
    assert np.array_equal(found, np.rint(exact))
    sigmoid = 255 / (1 + np.exp(-4 * (meant - 40) / 400))
    found = grey(dicom(file, WORDS, **window, **rescaled, VOILUTFunction="SIGMOID"))
    assert np.array_equal(found, np.rint(sigmoid))
    colour = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    found = medical.read_slice(dicom(file, colour), 3).image
    assert np.array_equal(found, colour.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["slice.nii", "slice.nii.gz"])
def test_what_the_greys_of_a_nifti_mean(name: str, tmp_path: Path) -> None:
    """The first axis goes to the right, the second down."""
    file = tmp_path / name
    for shape in ((7, 6), (7, 6, 1), (7, 6, 1, 1)):
        assert np.array_equal(grey(nifti(file, BYTES.T.reshape(shape))), BYTES)
    ranged = np.rint((WORDS - WORDS.min()) * (255 / np.ptp(WORDS.astype(int))))
    assert np.array_equal(grey(nifti(file, WORDS.T)), ranged)
    shown = np.clip((WORDS + 100.0) * (255 / 300), 0, 255)
    assert np.array_equal(grey(nifti(file, WORDS.T, cal_min=-100, cal_max=200)), np.rint(shown))
    scaled = nibabel.Nifti1Image(WORDS.T, np.eye(4))
    scaled.header.set_slope_inter(2, 1)
    scaled.to_filename(file)
    assert np.array_equal(grey(file), ranged)
    other = nibabel.Nifti2Image(BYTES.T, np.eye(4))
    other.to_filename(file)
    assert np.array_equal(grey(file), BYTES)


@pytest.mark.parametrize("name", ["slice.dcm", "slice.nii", "slice.nii.gz"])
def test_masks_keep_place_and_spacing(name: str, tmp_path: Path) -> None:
    make: Any = dicom if name.endswith("dcm") else nifti
    values = WORDS if name.endswith("dcm") else WORDS.T.reshape(7, 6, 1)
    source = make(tmp_path / name, values)
    like = medical.read_slice(source, 3)
    assert like.image.shape == (3, 6, 7)
    mask = (BYTES % 3).astype(np.uint8)
    out = tmp_path / "out" / name
    out.parent.mkdir()
    medical.write_mask(mask, like, out)
    before = out.read_bytes()
    medical.write_mask(mask, like, out)
    assert out.read_bytes() == before, "the same each time"
    assert medical.is_own(out)
    assert not medical.is_own(source)
    if name.endswith("dcm"):
        read, first = pydicom.dcmread(out), pydicom.dcmread(source)
        assert np.array_equal(read.pixel_array, mask)
        for key in ("PixelSpacing", "ImagePositionPatient", "PatientID", "StudyInstanceUID"):
            assert read[key] == first[key], key
        assert read.SOPInstanceUID != first.SOPInstanceUID
        return
    image, first = nibabel.load(out), nibabel.load(source)
    assert image.shape == (7, 6, 1)
    assert image.get_data_dtype() == np.uint8
    assert np.array_equal(np.asanyarray(image.dataobj)[..., 0].T, mask)
    assert np.array_equal(image.affine, first.affine)
    assert image.header.get_zooms() == first.header.get_zooms()


def floats(path: Path, values: Any) -> Path:
    """Pixels of floating point, which have an element of their own."""
    bits = {"BitsStored", "HighBit", "PixelRepresentation", "PixelData"}
    made = pydicom.dcmread(dicom(path, BYTES))
    for key in bits:
        delattr(made, key)
    made.BitsAllocated = 8 * values.dtype.itemsize
    name = "FloatPixelData" if values.dtype == np.float32 else "DoubleFloatPixelData"
    setattr(made, name, values.tobytes())
    pydicom.dcmwrite(path, made, enforce_file_format=True)
    return path


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_pixels_of_floating_point(kind: Any, tmp_path: Path) -> None:
    path = floats(tmp_path / "a.dcm", (BYTES % 3).astype(kind))
    assert np.array_equal(np.asarray(medical.read_numbers(path)[0]), BYTES % 3)
    shown = np.rint((BYTES % 3) * 127.5)
    assert np.array_equal(medical.read_slice(path, 1).image[0], shown)


def test_what_an_enhanced_dicom_says_of_its_frame(tmp_path: Path) -> None:
    """The same as a plain one that says it of its slice; the mask lies where the slice does."""
    said = {"RescaleSlope": 2, "RescaleIntercept": -5, "WindowCenter": 20, "WindowWidth": 60}
    plain = dicom(tmp_path / "plain.dcm", WORDS, **said)
    path = dicom(tmp_path / "enhanced.dcm", WORDS, NumberOfFrames=1)
    made = pydicom.dcmread(path)

    def group(**sequences: dict[str, Any]) -> Any:
        found = pydicom.Dataset()
        for name, values in sequences.items():
            item = pydicom.Dataset()
            for key, value in values.items():
                setattr(item, key, value)
            setattr(found, name, [item])
        return [found]

    plane = made.ImageOrientationPatient
    del made.ImageOrientationPatient
    rescaling = dict(list(said.items())[:2])
    made.SharedFunctionalGroupsSequence = group(
        PixelValueTransformationSequence=rescaling,
        PlaneOrientationSequence={"ImageOrientationPatient": plane},
    )
    made.PerFrameFunctionalGroupsSequence = group(FrameVOILUTSequence=dict(list(said.items())[2:]))
    made.save_as(path)
    like = medical.read_slice(path, 1)
    assert np.array_equal(like.image, medical.read_slice(plain, 1).image)
    numbers = [np.asarray(medical.read_numbers(file)[0]) for file in (path, plain)]
    assert np.array_equal(numbers[0], numbers[1])
    medical.write_mask(BYTES % 2, like, tmp_path / "mask.dcm")
    assert pydicom.dcmread(tmp_path / "mask.dcm").ImageOrientationPatient == plane


def deflated(path: Path) -> Path:
    dicom(path, BYTES)
    made = pydicom.dcmread(path)
    made.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(path, made, enforce_file_format=True)
    return path


def endless(path: Path, offset: float = 352, side: int = 7) -> Path:
    """A small file that claims to be a large one."""
    nifti(path, BYTES.T)
    with gzip.open(path) as file:
        data = bytearray(file.read())
    data[108:112] = struct.pack("<f", offset)
    data[42:46] = struct.pack("<hh", side, side)
    path.write_bytes(gzip.compress(bytes(data)))
    return path


def patched(path: Path, offset: int, data: bytes) -> None:
    """A header of which some bytes are others."""
    made = bytearray(nifti(path, BYTES.T).read_bytes())
    made[offset : offset + len(data)] = data
    path.write_bytes(made)


def changed(path: Path) -> None:
    """One bit of a pixel, which gzip's checksum alone tells."""
    made = bytearray(gzip.compress(nifti(path.with_suffix(""), BYTES.T).read_bytes(), 0))
    made[-12] ^= 1
    path.write_bytes(made)


def cut(path: Path) -> None:
    """All of the pixels, without the checksum."""
    path.write_bytes(nifti(path, BYTES.T).read_bytes()[:-8])


def longer(path: Path) -> None:
    path.write_bytes(
        gzip.compress(nifti(path.with_suffix(""), BYTES.T).read_bytes() + bytes(2**27))
    )


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("a.nii.gz", changed, "CRC check failed"),
        ("a.nii.gz", cut, "before the end-of-stream marker"),
        ("a.nii.gz", longer, "more than 64 MiB behind its pixels"),
        ("a.nii", lambda p: patched(p, 344, b"xxx\0"), "magic string"),
        ("a.nii", lambda p: patched(p, 70, b"\0\0"), "data code 0 not supported"),
        ("a.nii", lambda p: patched(p, 108, bytes(4)), "not a readable image"),
        (
            "a.dcm",
            lambda p: dicom(p, BYTES, RescaleSlope=2),
            "RescaleSlope without RescaleIntercept",
        ),
        (
            "a.dcm",
            lambda p: dicom(p, BYTES, RescaleIntercept=2, RescaleSlope=None),
            "RescaleIntercept without RescaleSlope",
        ),
        (
            "a.dcm",
            lambda p: dicom(p, BYTES, RescaleSlope=0, RescaleIntercept=1),
            "a rescaling of slope 0 and intercept 1",
        ),
        ("a.dcm", lambda p: dicom(p, BYTES, WindowCenter=2), "WindowCenter without WindowWidth"),
        (
            "a.dcm",
            lambda p: dicom(p, WORDS, WindowCenter=1, WindowWidth=9, VOILUTFunction="CUBIC"),
            "a window of the kind CUBIC",
        ),
        ("a.dcm", lambda p: floats(p, np.full((6, 7), np.nan, np.float32)), "NaN or infinite"),
        ("a.dcm", lambda p: dicom(p, None), "a DICOM without pixels"),
        ("a.dcm", lambda p: dicom(p, None, Rows=4, Columns=4), "a DICOM without pixels"),
        ("a.dcm", lambda p: dicom(p, BYTES, NumberOfFrames=2), "2 frames in one file"),
        ("a.dcm", lambda p: dicom(p, BYTES, Rows=60000, Columns=60000), "million pixels"),
        ("a.dcm", lambda p: dicom(p, BYTES, Rows=12), "not a readable image"),
        (
            "a.dcm",
            lambda p: dicom(p, WORDS, WindowCenter=1, WindowWidth=0),
            "a window of centre 1 and width 0",
        ),
        ("a.dcm", deflated, "a deflated DICOM"),
        ("a.dcm", lambda p: p.write_bytes(b"picture " * 50), "not a readable image"),
        ("a.dcm", lambda p: p.write_bytes(b"DICM" * 50), "a DICOM without pixels"),
        ("a.dcm", lambda p: p.mkdir(), "not a readable image"),
        ("a.nii", lambda p: p.write_bytes(b"\0" * 400), "not a readable image"),
        ("a.nii.gz", lambda p: p.write_bytes(b"\x1f\x8b" + b"\0" * 40), "not a readable image"),
        ("a.nii", lambda p: nifti(p, np.zeros((4, 5, 6), np.uint8)), "4 x 5 x 6 voxels"),
        ("a.nii", lambda p: nifti(p, np.zeros(4, np.uint8)), "4 voxels"),
        ("a.nii", lambda p: nifti(p, np.full((4, 5), np.nan, np.float32)), "NaN or infinite"),
        ("a.nii", lambda p: nifti(p, np.ones((4, 5), np.complex64)), "complex64"),
        ("a.nii.gz", lambda p: endless(p, side=32000), "million pixels"),
        ("a.nii.gz", lambda p: endless(p, side=9), "not a readable image"),
        ("a.nii.gz", lambda p: endless(p, offset=1e18), "not a readable image"),
        ("a.nii.gz", lambda p: endless(p, offset=float("nan")), "not a readable image"),
    ],
)
def test_what_can_not_be_read_is_one_line(
    name: str,
    make: Any,
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    path = tmp_path / name
    make(path)
    recwarn.clear()
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        medical.read_slice(path, 1)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "library"), [("a.dcm", "pydicom"), ("a.nii", "nibabel")])
def test_without_the_extra(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.touch()
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(UserError, match=f"needs {library}, of the extra 'medical'"):
        medical.read_slice(path, 1)


@pytest.mark.slow
def test_predict_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 33), dtype=np.uint8)
    dicom(images / "one.dcm", noise)
    nifti(images / "two.nii.gz", noise.T)
    Image.fromarray(noise).save(images / "three.png")
    arguments = [str(tmp_path / "run"), str(images), "--out", str(out)]
    for _ in range(2):  # the second time over its own
        assert predict.main(arguments) == 0
    expected = np.asarray(Image.open(out / "three.png"))
    for name in ("one", "two"):
        assert np.array_equal(np.asarray(Image.open(out / f"{name}.png")), expected)
    assert np.array_equal(pydicom.dcmread(out / "one.dcm").pixel_array * 255, expected)
    assert np.array_equal(np.asanyarray(nibabel.load(out / "two.nii.gz").dataobj).T * 255, expected)

    dicom(out / "one.dcm", noise)
    capsys.readouterr()
    assert predict.main(arguments) == 2
    assert "one.dcm is there already, and not by predict" in one_line(capsys)
    dicom(images / "empty.dcm", None)
    assert predict.main([*arguments, "--overwrite"]) == 1
    assert "empty.dcm: a DICOM without pixels" in capsys.readouterr().err
    nifti(images / "one.nii", noise)
    assert predict.main([*arguments, "--overwrite"]) == 2
    assert "would both become one.png; rename one" in one_line(capsys)
