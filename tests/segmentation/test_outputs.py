"""What predict leaves beside masks: probabilities, a table, names of classes; flips and turns."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commanding import one_line, train
from PIL import Image

import mlseg
from mlseg import evaluate, predict
from mlseg.errors import UserError
from mlseg.segmentation.model import Model

pytestmark = pytest.mark.slow  # trains for seconds


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, on windows that aren't square."""
    folder = tmp_path_factory.mktemp("lesions")
    return train(folder, changes={"augmentation": {"window": [16, 24]}})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes, images that aren't square."""
    folder = tmp_path_factory.mktemp("scenes")
    changes = {"data.name": "synthetic_scenes", "data.image_size": [32, 48]}
    return train(folder, changes=changes)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, size in (("a", (50, 41)), ("b", (30, 60))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.png")
    return folder


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("which", ["lesions", "scenes"])
def test_probabilities_and_names(
    which: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made: Path = request.getfixturevalue(which)
    model = mlseg.load(made)
    classes = len(model.class_names)
    out = tmp_path / "out"
    for how in ("npz", "png"):
        assert (
            predict.main([str(made), str(images), "--out", str(out), "--probabilities", how]) == 0
        )
    for name in "ab":
        expected = model(images / f"{name}.png", probabilities=True)
        with np.load(out / f"{name}_probabilities.npz", allow_pickle=False) as kept:
            assert kept["probabilities"].dtype == np.float16
            assert np.array_equal(kept["probabilities"], expected.astype(np.float16))
            assert tuple(kept["classes"]) == model.class_names
        parts = [""] if classes == 2 else [f"_{index}" for index in range(classes)]
        for part, chance in zip(parts, expected[-len(parts) :], strict=True):
            stored = read(out / f"{name}_probability{part}.png")
            assert stored.dtype == np.uint16
            np.testing.assert_allclose(stored / 65535, chance, atol=0.51 / 65535)
    with Image.open(out / "a.png") as mask:
        about = json.loads(mask.info["Classes"])
    assert (out / "classes.json").exists() == (classes > 2)
    if classes > 2:
        assert json.loads((out / "classes.json").read_text())["classes"] == about
    assert [entry["name"] for entry in about] == list(model.class_names)
    values = {entry["value"] for entry in about}
    assert set(np.unique(read(out / "a.png"))) <= values
    assert values == ({0, 255} if classes == 2 else set(range(classes)))


def test_a_table_of_areas(scenes: Path, images: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "out", tmp_path / "areas.csv"
    arguments = [str(scenes), str(images), "--out", str(out), "--csv", str(table)]
    assert predict.main(arguments) == 0
    with table.open(newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    model = mlseg.load(scenes)
    assert len(rows) == 2 * 7
    for row in rows:
        mask = read(out / f"{Path(row['image']).stem}.png")
        where = mask == int(row["class"])
        assert row["name"] == model.class_names[int(row["class"])]
        assert int(row["pixels"]) == where.sum()
        assert float(row["share"]) == pytest.approx(where.mean(), abs=1e-6)
        chance = model(row["image"], probabilities=True)[int(row["class"])]
        if where.any():
            assert float(row["confidence"]) == pytest.approx(chance[where].mean(), abs=2e-6)
        else:
            assert row["confidence"] == ""
    assert predict.main(arguments) == 0, "its own table"


def test_flips_and_turns(lesions: Path, scenes: Path, tmp_path: Path) -> None:
    """The mean of eight: of a picture that is turned it is the turned one."""
    for made, size in ((lesions, (32, 32)), (scenes, (32, 48))):
        plain, model = mlseg.load(made), mlseg.load(made, tta="flips")
        image = np.asarray(Image.effect_noise(size[::-1], 80).convert("RGB"))
        found = model(image, probabilities=True)
        by_hand = np.zeros(found.shape, np.float64)
        for member in (False, True):
            seen = image[:, ::-1] if member else image
            for quarters in (0, 2):
                one = plain(np.rot90(seen, quarters), probabilities=True)
                one = np.rot90(one, -quarters, (1, 2))
                by_hand += one[..., ::-1] if member else one
            tensor = torch.from_numpy(seen.copy()).movedim(-1, 0)[None]
            for quarters in (1, 3):
                (one_kept,) = plain.ensemble.first.probabilities(
                    (tensor / 127.5 - 1).rot90(quarters, (-2, -1)), turned=True
                )
                back = one_kept.detach().rot90(-quarters, (-2, -1)).numpy()
                by_hand += back[..., ::-1] if member else back
        np.testing.assert_allclose(found, by_hand / 8, atol=1e-5)
        assert np.abs(found - plain(image, probabilities=True)).max() > 1e-4
        if size[0] == size[1]:  # and the windows too
            members = (replace(model.ensemble.first, window=None),)
            whole = Model(replace(model.ensemble, members=members), threads=1)
            one, other = (whole(seen, probabilities=True) for seen in (image, np.rot90(image)))
            np.testing.assert_allclose(other, np.rot90(one, 1, (1, 2)), atol=1e-5)
    with pytest.raises(UserError, match="tta: 'turns' is neither flips nor None"):
        mlseg.load(lesions, tta="turns")


def test_flips_and_turns_in_the_commands(
    lesions: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict.main([str(lesions), str(images), "--out", str(out), "--tta", "flips"]) == 0
    model = mlseg.load(lesions, tta="flips")
    assert np.array_equal(read(out / "a.png"), 255 * model(images / "a.png"))
    capsys.readouterr()
    found = {}
    for more in ((), ("--tta", "flips")):
        scores = tmp_path / "scores.json"
        assert evaluate.main([str(lesions), "--out", str(scores), *more]) == 0
        found[bool(more)] = json.loads(scores.read_text())
    assert [found[flips]["tta"] for flips in (False, True)] == [None, "flips"]
    assert found[True]["scores"] != found[False]["scores"]
    assert "mean over flips and turns" in " ".join(capsys.readouterr().out.split())


def test_what_is_anothers_stays(
    lesions: Path,
    scenes: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    theirs = {
        "a_probabilities.npz": ["--probabilities", "npz"],
        "b_probability.png": ["--probabilities", "png"],
        "areas.csv": ["--csv", str(out / "areas.csv")],
    }
    for name, more in theirs.items():
        for content in (b"precious", b"image,class", b"{}", b"PK\x05\x06" + bytes(18)):
            (out / name).write_bytes(content)
            capsys.readouterr()
            assert predict.main([str(lesions), str(images), "--out", str(out), *more]) == 2
            assert f"{name} is there already, and not by predict" in one_line(capsys)
            assert (out / name).read_bytes() == content
        (out / name).unlink()
    scene = (["--out", str(out)], out / "classes.json")
    scene[1].write_text("{}")
    capsys.readouterr()
    assert predict.main([str(scenes), str(images), *scene[0]]) == 2
    assert "classes.json is there already" in one_line(capsys)
    (out / "areas.csv").write_text("precious")
    every = [option for more in theirs.values() for option in more]
    for more in (["--overwrite"], []):
        assert predict.main([str(lesions), str(images), "--out", str(out), *every, *more]) == 0
    for bad in (images / "a.png", out / "a.png", tmp_path, out):
        capsys.readouterr()
        assert predict.main([str(lesions), str(images), "--out", str(out), "--csv", str(bad)]) == 2
        assert "--csv" in one_line(capsys)
    new = ["--out", str(tmp_path / "new"), "--csv", str(tmp_path / "new")]
    assert predict.main([str(lesions), str(images), *new]) == 2
    assert "is the folder of --out; name a file" in one_line(capsys)
    assert not list(out.glob("b_overlay_overlay*"))
