"""Label maps of test images in the layouts of the benchmarks' servers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from mlseg import predict, run
from mlseg.segmentation.data import palettes
from mlseg.segmentation.data.servers import SERVERS

IDS = ("2008_000006", "2011_000007")
CITY = "berlin_000000_000019"


def image(path: Path, size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def voc(folder: Path) -> Path:
    base = folder / "VOCdevkit" / "VOC2012"
    for name in IDS:
        image(base / "JPEGImages" / f"{name}.jpg")
    image(base / "JPEGImages" / "2007_000001.jpg")  # of training
    split = base / "ImageSets" / "Segmentation" / "test.txt"
    split.parent.mkdir(parents=True)
    split.write_text("\n".join(IDS) + "\n")
    return base


def cityscapes(folder: Path) -> Path:
    image(folder / "leftImg8bit" / "test" / "berlin" / f"{CITY}_leftImg8bit.png")
    image(folder / "leftImg8bit" / "val" / "lindau" / "lindau_000000_000019_leftImg8bit.png")
    return folder


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """A run with a data set's classes: drawn scenes stand in for its images."""
    data: dict[str, Any] = {
        "name": name, "when_missing": "synthetic", "image_size": 32, "train": 4, "val": 2,
        "test": 0, "root": str(folder / "nothing"),
    }  # fmt: skip
    changes = {"data": data, "engine.iterations": 1, "engine.validate_every": 1}
    tiny.write_config(folder / "tiny.yaml", changes=changes)
    assert run.main([str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.slow
def test_pascal_voc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_directory, root = trained(tmp_path, monkeypatch, "voc2012"), voc(tmp_path / "data")
    out = tmp_path / "upload"
    command = [str(run_directory), str(root), "--server", "voc2012_comp6", "--out", str(out)]
    assert predict.main(command) == 0
    assert "The server wants 1456: here were 2 test images." in capsys.readouterr().err
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    folder = Path("results/VOC2012/Segmentation/comp6_test_cls")
    assert files == [folder / f"{name}.png" for name in IDS]
    assert predict.main([str(run_directory), str(root), "--out", str(tmp_path / "all"),
                         *command[2:4]]) == 0  # fmt: skip
    for file in files:
        with Image.open(out / file) as picture:
            assert picture.mode == "P"
            assert picture.size == (40, 32)
            assert (picture.getpalette() or [])[:63] == [
                v for rgb in palettes.VOC_PALETTE for v in rgb
            ]
            assert np.asarray(picture).max() < 21
    # Called again it overwrites its own, and nobody else's.
    assert predict.main(command) == 0
    image(out / files[0])
    assert predict.main(command) == 2
    assert "is there already, and not by predict" in capsys.readouterr().err


@pytest.mark.slow
def test_cityscapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_directory = trained(tmp_path, monkeypatch, "cityscapes")
    root, out = cityscapes(tmp_path / "data"), tmp_path / "upload"
    command = [str(run_directory), str(root), "--server", "cityscapes", "--out", str(out)]
    assert predict.main(command) == 0
    assert [path.name for path in out.iterdir()] == [f"{CITY}.png"]
    found = np.asarray(Image.open(out / f"{CITY}.png"))
    assert set(np.unique(found)) <= set(palettes.CITYSCAPES_LABELS)
    # The same image by itself, in the run's own indices.
    alone = str(root / "leftImg8bit" / "test" / "berlin" / f"{CITY}_leftImg8bit.png")
    assert predict.main([str(run_directory), alone, "--out", str(tmp_path / "own")]) == 0
    indices = np.asarray(Image.open(tmp_path / "own" / f"{CITY}_leftImg8bit.png"))
    back = np.vectorize(palettes.CITYSCAPES_LABELS.get)(found)
    assert np.array_equal(back, indices)
    capsys.readouterr()
    assert predict.main([*command[:2], "--server", "voc2012_comp5", "--out", str(out)]) == 2
    assert "no list ImageSets/Segmentation/test.txt" in capsys.readouterr().err
    base = voc(tmp_path / "voc")
    assert predict.main([command[0], str(base), "--server", "voc2012_comp5", "--out", "x"]) == 2
    assert "has the classes road, sidewalk" in capsys.readouterr().err


def test_values_and_mistakes(tmp_path: Path) -> None:
    labels = np.arange(19, dtype=np.uint8)[None]
    ids = np.asarray(SERVERS["cityscapes"].picture(labels))
    # Cordts et al. 2016, the label ids of the 19 classes.
    assert ids.tolist() == [
        [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    ]
    indices = np.arange(21, dtype=np.uint8)[None]
    assert np.array_equal(np.asarray(SERVERS["voc2012_comp5"].picture(indices)), indices)
    base = voc(tmp_path)
    for name, root, said in (
        ("cityscapes", base, "no leftImg8bit/test"),
        ("cityscapes", base / "nowhere", "no such folder; with --server name the data set's"),
        ("voc2012_comp6", base / "JPEGImages", "no list ImageSets"),
    ):
        with pytest.raises(Exception, match=said):
            SERVERS[name].images(root)
    (base / "JPEGImages" / f"{IDS[0]}.jpg").unlink()
    with pytest.raises(Exception, match=f"{IDS[0]}.jpg: missing"):
        SERVERS["voc2012_comp6"].images(tmp_path)
    (base / "ImageSets" / "Segmentation" / "test.txt").write_text("../../etc/passwd\n")
    with pytest.raises(Exception, match="no image of VOC 2012"):
        SERVERS["voc2012_comp6"].images(tmp_path)
