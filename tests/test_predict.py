"""mlseg predict: which images, which files, and whose files stay."""

import os
from pathlib import Path

import numpy as np
import pytest
from commanding import one_line, trained
from PIL import Image

from mlseg import predict
from mlseg.errors import UserError


def test_predict_writes_masks_at_each_images_own_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    sizes = {"wide": (90, 31), "tall": (33, 64), "grey": (48, 48)}
    for name, size in sizes.items():
        mode = "L" if name == "grey" else "RGB"
        Image.effect_noise(size, 60).convert(mode).save(images / f"{name}.png")
    masks = tmp_path / "masks"
    assert predict.main([str(out), str(images), "--out", str(masks)]) == 0
    for name, size in sizes.items():
        mask = Image.open(masks / f"{name}.png")
        assert mask.size == size
        assert set(np.unique(np.asarray(mask))) <= {0, 255}
        assert Image.open(masks / f"{name}_overlay.png").size == size
    for where, count in ((images / "wide.png", 1), (images / "*a*.png", 1)):
        some = tmp_path / f"some_{count}_{where.stem.strip('*')}"
        assert predict.main([str(out), str(where), "--out", str(some)]) == 0
        assert len(list(some.iterdir())) == 2 * count
    capsys.readouterr()

    (images / "broken.jpg").write_bytes(b"no image")
    (images / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    cut_off = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00"
    Image.new("RGB", (40, 40)).save(images / "turned.jpg", exif=cut_off)
    assert predict.main([str(out), str(images), "--out", str(tmp_path / "again")]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "broken.jpg: not a readable image" in said
    assert "drawing.png: not a readable image" in said
    done = {path.name for path in (tmp_path / "again").iterdir()}
    assert {f"{name}.png" for name in sizes} <= done, "the others are segmented all the same"
    assert predict.main([str(out), str(tmp_path / "none"), "--out", str(masks)]) == 2
    assert "none" in one_line(capsys)


def test_what_predict_takes_for_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photographs"
    for name in ("a.png", "b/c.JPG", "b/._c.png", "__MACOSX/d.png", ".thumbs/e.png", "._a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "Thumbs.db").touch()
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to("/nowhere/gone.png")
    (folder / "up").symlink_to(folder)
    (folder / "b" / "up").symlink_to(tmp_path)
    (folder / os.fsdecode(b"caf\xe9.png")).touch()

    def found(where: str) -> set[str]:
        return {str(path.relative_to(folder)) for path in predict.find_images(where)}

    here = {"a.png", "gone.png", os.fsdecode(b"caf\xe9.png")}
    assert found(str(folder)) == here
    assert found(f"{folder}/*.png") == here
    assert found(f"{folder}/**/*.[pJ]*") == here | {"b/c.JPG"}
    assert found(f"{folder}/**/c.*") == found(f"{folder}/*/c.*") == {"b/c.JPG"}
    assert found(f"{folder}/._a.png") == {"._a.png"}, "where it is named"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/photographs") == found("~/photographs/*.png") == here
    with pytest.raises(UserError, match="no images there"):
        predict.find_images(f"{folder}/none/**/*.png")


def test_predictions_that_would_overwrite_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.png", "x_overlay.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert predict.main([str(tmp_path), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "x_overlay.png" in one_line(capsys)


def test_several_images_are_not_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.png", "y.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    arguments = [str(tmp_path / name) for name in ("run", "x.png", "y.png")]
    assert predict.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "x.png: an image, where runs are to be named" in one_line(capsys)


def test_predict_overwrites_nothing_but_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images, masks = trained(tmp_path), tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    Image.effect_noise((40, 40), 60).convert("RGB").save(images / "a.png")
    before = (images / "a.png").read_bytes()

    def said(*more: str, where: Path = masks) -> str:
        capsys.readouterr()
        assert predict.main([str(out), str(images), "--out", str(where), *more]) == 2
        return one_line(capsys)

    (tmp_path / "link").symlink_to(images)
    for where in (images, tmp_path / "link"):
        for more in ((), ("--overwrite",)):
            assert "is one of the images" in said(*more, where=where)
    assert (images / "a.png").read_bytes() == before
    assert "is a file; name a folder" in said(where=images / "a.png")

    masks.mkdir()
    theirs, target = masks / "a_overlay.png", tmp_path / "target.png"
    theirs.write_bytes(b"somebody's work")
    assert "a_overlay.png is there already" in said()
    theirs.unlink()
    target.write_bytes(b"elsewhere")
    theirs.symlink_to(target)
    assert "a_overlay.png is there already" in said()
    assert not (masks / "a.png").exists(), "refused before any work"

    again = [str(out), str(images), "--out", str(masks)]
    assert predict.main([*again, "--overwrite"]) == 0
    assert target.read_bytes() == b"elsewhere", "the link was replaced"
    assert not theirs.is_symlink()
    assert predict.main(again) == 0, "its own files are its to replace"
    assert {path.name for path in masks.iterdir()} == {"a.png", "a_overlay.png"}
