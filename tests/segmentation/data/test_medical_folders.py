"""Folders whose images or masks are slices of DICOM and NIfTI, as data to train on."""

import logging
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commanding import one_line
from medical_files import dicom, nibabel, nifti, pydicom
from PIL import Image
from tiny_files import write_image

from mlseg import evaluate, predict, run
from mlseg.errors import UserError
from mlseg.segmentation.data import load_data, medical
from mlseg.segmentation.data.settings import DataSettings
from mlseg.segmentation.model import load

Labels = np.ndarray[Any, np.dtype[Any]]
SIDES = (10, 12)
ENDINGS = ("png", "dcm", "dicom", "nii", "nii.gz")


def write(path: Path, values: Labels, **header: Any) -> Path:
    """A slice in the format that its ending names; rows go down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        return write_image(path, values)
    if medical.suffix(path) in medical.DICOM:
        return dicom(path, values, **header)
    return nifti(path, values.T, **header)


def example(number: int, classes: int) -> tuple[Labels, Labels]:
    """An image whose greys use all of a byte, and its mask."""
    random = np.random.default_rng(number)
    image = random.permutation(np.linspace(0, 255, SIDES[0] * SIDES[1]).astype(np.uint8))
    mask = random.integers(0, classes, SIDES).astype(np.uint8)
    return image.reshape(SIDES), mask


def loaded(root: Path, classes: int = 2, **more: Any) -> Any:
    names = [str(index) for index in range(classes)]
    settings = DataSettings(name="folder", root=str(root), image_size=16, classes=names, **more)
    return load_data(settings)


@pytest.mark.parametrize("classes", [2, 3])
def test_they_are_what_the_same_pixels_are_as_png(classes: int, tmp_path: Path) -> None:
    pairs = [(image, mask) for image in ENDINGS for mask in ENDINGS]
    for number, (image_end, mask_end) in enumerate(pairs):
        image, mask = example(number, classes)
        types: dict[str, Any] = {"nii": np.float32, "nii.gz": np.int16, "dicom": np.uint16}
        stored = mask.astype(types.get(mask_end, np.uint8))
        write(tmp_path / "mixed" / "images" / f"{number:02}.{image_end}", image)
        write(tmp_path / "mixed" / "masks" / f"{number:02}.{mask_end}", stored)
        write_image(tmp_path / "plain" / "images" / f"{number:02}.png", image)
        write_image(tmp_path / "plain" / "masks" / f"{number:02}.png", mask)
    for channels in (1, 3):
        plain = loaded(tmp_path / "plain", classes, channels=channels)
        cached = {"cache_dir": str(tmp_path / "cache")}
        for more in ({}, cached, cached):
            mixed = loaded(tmp_path / "mixed", classes, channels=channels, **more)
            assert mixed.split_hash == plain.split_hash
            for name in ("train", "val", "test"):
                ours, theirs = getattr(mixed, name), getattr(plain, name)
                assert ours.ids == theirs.ids
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.masks, theirs.masks)
                for index in range(len(ours)):
                    assert torch.equal(ours.native_mask(index), theirs.native_mask(index))


def test_greys_are_shown_as_predict_shows_them(tmp_path: Path) -> None:
    values = (np.arange(120).reshape(SIDES) * 30 - 1000).astype(np.int16)
    window = {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 2, "RescaleIntercept": -24}
    path = write(tmp_path / "images" / "a.dcm", values, **window)
    write(tmp_path / "masks" / "a.nii.gz", example(0, 2)[1])
    data = loaded(tmp_path, val=0, test=0, train=1, channels=3)
    shown = medical.read_slice(path, 3).image
    resized = np.asarray(Image.fromarray(shown[0]).resize((16, 16), Image.Resampling.BILINEAR))
    assert data.train.images.shape == (1, 3, 16, 16)
    assert np.array_equal(data.train.images[0].numpy(), np.stack([resized] * 3))


def test_a_dicom_mask_is_what_its_rescaling_says(tmp_path: Path) -> None:
    image, mask = example(0, 3)
    write(tmp_path / "images" / "a.png", image)
    write(tmp_path / "masks" / "a.dcm", mask + 4, RescaleSlope=1, RescaleIntercept=-4)
    data = loaded(tmp_path, 3, val=0, test=0, train=1)
    assert np.array_equal(data.train.native_mask(0), mask)


def test_compressed_ones(tmp_path: Path) -> None:
    """Without loss they are what they were; with loss they are images, and no class numbers."""
    image, mask = example(0, 3)
    paths = [
        write(tmp_path / f"{kind}s" / "a.dcm", v) for kind, v in (("image", image), ("mask", mask))
    ]
    for path in paths:
        packed = pydicom.dcmread(path)
        packed.compress(pydicom.uid.RLELossless)
        packed.save_as(path)
    data = loaded(tmp_path, 3, val=0, test=0, train=1, channels=1)
    assert np.array_equal(data.train.native_mask(0), mask)
    assert np.array_equal(medical.read_slice(paths[0], 1).image[0], image)
    for path in paths:
        write(path, image if path == paths[0] else mask, LossyImageCompression="01")
    with pytest.raises(UserError, match=r"masks/a\.dcm: compressed with loss, which changes class"):
        loaded(tmp_path, 3, val=0, test=0, train=1)


def test_pairs_of_a_csv_file(tmp_path: Path) -> None:
    for number in range(5):
        image, mask = example(number, 2)
        write(tmp_path / f"{number}.nii.gz", image)
        write(tmp_path / f"m{number}.dcm", mask)
    rows = "".join(f"{n}.nii.gz,m{n}.dcm\n" for n in range(5))
    (tmp_path / "pairs.csv").write_text("image,mask\n" + rows)
    data = load_data(DataSettings(name="pairs", root=str(tmp_path), image_size=16))
    assert sorted(data.train.ids + data.val.ids + data.test.ids) == list("01234")


IMAGE, MASK = example(0, 2)
FLIPPED = np.diag([-0.5, 0.75, 3.0, 1.0])


def oriented(path: Path, values: Labels, affine: Labels | None) -> None:
    nibabel.Nifti1Image(values.T, affine).to_filename(path)


def compressed(path: Path) -> None:
    """A JPEG-LS that is none; what counts is that nobody here could open it."""
    dicom(path, IMAGE)
    made = pydicom.dcmread(path)
    made.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    made.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    made["PixelData"].is_undefined_length = True
    pydicom.dcmwrite(path, made, enforce_file_format=True)


def another_kind(path: Path) -> None:
    """Beside a pair that can be read."""
    path.touch()
    write_image(path.with_name("a.png"), IMAGE)
    write_image(path.parent.parent / "masks" / "b.png", MASK)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a volume": ("images/a.nii.gz", lambda p: nifti(p, np.zeros((4, 5, 6), np.uint8)),
                 "4 x 5 x 6 voxels; a slice is expected"),
    "a mask's volume": ("masks/a.nii", lambda p: nifti(p, np.zeros((12, 10, 2), np.uint8)),
                        "12 x 10 x 2 voxels; a slice is expected"),
    "frames": ("images/a.dcm", lambda p: dicom(p, IMAGE, NumberOfFrames=2), "2 frames in one file"),
    "no pixels": ("images/a.dcm", lambda p: dicom(p, None), "a DICOM without pixels"),
    "no pixels, but their size": ("images/a.dcm", lambda p: dicom(p, None, Rows=10, Columns=12),
                                  "a DICOM without pixels"),
    "compressed": ("images/a.dcm", compressed, "pydicom has no decoder here"),
    "another size": ("masks/a.dcm", lambda p: dicom(p, MASK[:, :9]),
                     "mask of 9x10 pixels for the image a.png of 12x10"),
    "turned": ("masks/a.nii", lambda p: nifti(p, MASK), "mask of 10x12 pixels"),
    "colours": ("masks/a.dcm", lambda p: dicom(p, np.stack([MASK] * 3, -1)),
                "a DICOM of colours (RGB); a mask holds one number a pixel"),
    "inverted": ("masks/a.dcm", lambda p: dicom(p, MASK, PhotometricInterpretation="MONOCHROME1"),
                 "a mask whose zero is white"),
    "another class": ("masks/a.nii", lambda p: nifti(p, 7 * MASK.T), "mask value 7"),
    "infinite": ("masks/a.nii", lambda p: nifti(p, np.full((12, 10), np.nan, np.float32)),
                 "mask value nan"),
    "beyond 64 bits": ("masks/a.nii", lambda p: nifti(p, np.full((12, 10), 1e30, np.float32)),
                       "mask value 1"),
    "of another kind": ("images/a.mha", lambda p: p.touch(),
                        "dicom, nii, nii.gz); there is images/a.mha"),
    "one of another kind": ("images/b.mha", another_kind, "b.mha has an ending that isn't read"),
    "a mask of another kind": ("masks/a.nrrd", lambda p: p.touch(),
                               "a.nrrd has an ending that isn't read"),
    "damaged": ("masks/a.dcm", lambda p: p.write_bytes(b"x" * 500), "not a readable image"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_trained_on_is_one_line(case: str, tmp_path: Path) -> None:
    name, make, said = REFUSED[case]
    for folder, values in (("images", IMAGE), ("masks", MASK)):
        (tmp_path / folder).mkdir()
        if not name.startswith(folder):
            write_image(tmp_path / folder / "a.png", values)
    make(tmp_path / name)
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, val=0, test=0, train=1)
    assert said in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mask_that_lies_otherwise_in_the_patient(tmp_path: Path) -> None:
    """Where both files say; what has no orientation of its own is taken as it is."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    image, mask = tmp_path / "images" / "a.nii.gz", tmp_path / "masks" / "a.nii.gz"
    oriented(image, IMAGE, FLIPPED)
    for affine in (FLIPPED, np.diag([-2.0, 2, 2, 1]), np.eye(4), None):
        oriented(mask, MASK, affine)
        loaded(tmp_path, val=0, test=0, train=1)
    for affine in (np.diag([0.5, -0.75, 3, 1]), np.diag([-1.0, -1, 1, 1]), FLIPPED[[1, 0, 2, 3]]):
        oriented(mask, MASK, affine)
        with pytest.raises(UserError, match=r"masks/a\.nii\.gz: its rows or columns run another"):
            loaded(tmp_path, val=0, test=0, train=1)
    # A converter that turns rows around: DICOM's rows here go to the back, these to the front.
    image.unlink()
    dicom(tmp_path / "images" / "a.dcm", IMAGE)
    oriented(mask, MASK, np.diag([-1.0, -1, 1, 1]))
    loaded(tmp_path, val=0, test=0, train=1)
    oriented(mask, MASK, FLIPPED)
    with pytest.raises(UserError, match=r"than those of a\.dcm"):
        loaded(tmp_path, val=0, test=0, train=1)


@pytest.mark.parametrize(("name", "library"), [("a.dcm", "pydicom"), ("a.nii.gz", "nibabel")])
@pytest.mark.parametrize("folder", ["images", "masks"])
def test_without_the_extra(
    folder: str, name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own, values in (("images", IMAGE), ("masks", MASK)):
        write(tmp_path / own / (name if own == folder else "a.png"), values)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"{name}: reading it needs {library}, of the extra"):
        loaded(tmp_path, val=0, test=0, train=1)


def test_threads_leave_warnings_and_logging_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", IMAGE)
    before = warnings.filters[:], warnings.showwarning, logging.root.manager.disable
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: medical.read_slice(path, 1), range(64)))
    assert (warnings.filters[:], warnings.showwarning, logging.root.manager.disable) == before


@pytest.mark.slow
def test_a_run_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, resumed, scored and predicted as the same pixels in PNG are, to the bit."""
    for number in range(6):
        image, mask = example(number, 2)
        end = ENDINGS[number % 4 + 1]
        write(tmp_path / "mixed" / "images" / f"{number}.{end}", image)
        write(tmp_path / "mixed" / "masks" / f"{number}.{end}", mask)
        write_image(tmp_path / "plain" / "images" / f"{number}.png", image)
        write_image(tmp_path / "plain" / "masks" / f"{number}.png", mask)
    masks = {}
    for kind in ("plain", "mixed"):
        root, out = tmp_path / kind, tmp_path / f"run_{kind}"
        data = {
            "name": "folder",
            "root": str(root),
            "image_size": 32,
            "train": 3,
            "val": 1,
            "test": 2,
        }
        config = tiny.write_config(tmp_path / f"{kind}.yaml", changes={"data": data})
        assert run.main([str(config), "--out", str(out)]) == 0
        assert run.main(["--resume", str(out), "engine.iterations=6"]) == 0
        assert evaluate.main([str(out)]) == 0
        predicted = tmp_path / f"predicted_{kind}"
        assert predict.main([str(out), str(root / "images"), "--out", str(predicted)]) == 0
        masks[kind] = [np.asarray(Image.open(predicted / f"{n}.png")) for n in range(6)]
        assert evaluate.main([str(out), "--data", "folder", "--root", str(root)]) == 0
        model = load(out)
        for path in sorted((root / "images").iterdir()):
            assert model(path).shape == SIDES
    assert np.array_equal(masks["plain"], masks["mixed"])
    capsys.readouterr()
    write(tmp_path / "mixed" / "masks" / "1.dicom", 1 - example(1, 2)[1])
    assert evaluate.main([str(tmp_path / "run_mixed")]) == 2
    assert "1.dicom" in one_line(capsys)
