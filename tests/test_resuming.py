"""What may differ when a run goes on or is scored, and that nothing else does."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest
import tiny_files
import torch
from commanding import train

from mlseg import checkpoint, evaluate, predict, run
from mlseg.engines.engine import Engine
from mlseg.segmentation.data.contents import WHOLE, digest


def own_data(folder: Path) -> Path:
    """Eight noisy images with masks."""
    draw = np.random.default_rng(0)
    for index in range(8):
        image = draw.integers(0, 256, (12, 12, 3), np.uint8)
        tiny_files.write_image(folder / "images" / f"{index}.png", image)
        mask = tiny_files.half_mask((12, 12))
        tiny_files.write_image(folder / "masks" / f"{index}.png", mask)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on images of its own, beside them."""
    place = tmp_path_factory.mktemp("trained")
    own_data(place / "data")
    data = {"name": "folder", "root": str(place / "data"), "image_size": 16}
    changes = {"data": {**data, "train": 4, "val": 2, "test": 2}}
    train(place, changes=changes)
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, whose data are a copy too."""
    shutil.copytree(trained, tmp_path / "copy")
    config = tmp_path / "copy" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(tmp_path / "copy")))
    return tmp_path / "copy"


def said(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The line of a command that has failed with this code."""
    capsys.readouterr()
    command = evaluate.main if arguments[0] == "evaluate" else run.main
    given = [argument for argument in arguments if argument != "evaluate"]
    assert command(given) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [x for x in error.splitlines() if x.startswith(("error: ", "failed: "))]
    return line


def edit(place: Path, *changes: tuple[str, str]) -> None:
    config = place / "run" / "config.yaml"
    text = config.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)


# ------------------------------------------------------------------------------- config


@pytest.mark.parametrize("command", ["--resume", "evaluate"])
def test_an_edited_config_is_refused_key_by_key(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    edit(
        place,
        ("cross_entropy: 1.0", "cross_entropy: 99.0"),
        ("seed: 1\n", "seed: 7\n"),
        ("precision: fp32", "precision: bf16"),
        ("image_size: 16", "image_size: 32"),
        ("iterations: 4", "iterations: 6"),
    )
    line = said(capsys, 2, command, str(place / "run"))
    for told in (
        "seed differs (7, was 1)",
        "precision differs (the string 'bf16', was the string 'fp32')",
        "data.image_size differs (32, was 16)",
        "loss.cross_entropy differs (99.0, was 1.0)",
    ):
        assert told in line
    assert "iterations differs" not in line
    assert f"{place / 'run' / 'config.yaml'}:" in line


def test_what_may_change_does(place: Path) -> None:
    edit(place, ("iterations: 4", "iterations: 6"), ("log_every: 1", "log_every: 2"))
    shutil.move(place / "data", place / "moved")  # other times, another place, the same contents
    for file in (place / "moved").rglob("*.png"):
        file.touch()
    root = f"data.root={place / 'moved'}"
    assert run.main(["--resume", str(place / "run"), root, "device=cpu"]) == 0
    assert json.loads((place / "run" / "results.json").read_text())["steps"] == 6
    assert evaluate.main([str(place / "run")]) == 0


# --------------------------------------------------------------------------------- data


@pytest.mark.parametrize("command", ["--resume", "evaluate"])
@pytest.mark.parametrize("part", ["images", "masks"])
def test_changed_files_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, part: str
) -> None:
    """Though their names, numbers and splits are the same."""
    first = json.loads((place / "run" / "splits.json").read_text())["test"][0]
    file = place / "data" / part / f"{first}.png"
    shape = (12, 12, 3) if part == "images" else (12, 12)
    tiny_files.write_image(file, np.zeros(shape, np.uint8))
    line = said(capsys, 2, command, str(place / "run"))
    assert f"{file}: not what it was when the run {place / 'run'} began" in line


def test_a_run_without_digests_goes_on(place: Path) -> None:
    """One of an older version."""
    splits = place / "run" / "splits.json"
    stored = json.loads(splits.read_text())
    del stored["contents"]
    splits.write_text(json.dumps(stored))
    assert evaluate.main([str(place / "run")]) == 0


@pytest.mark.parametrize("contents", [[], {}, {"how": "all"}, {"how": 1, "files": {"data": 3}}, 3])
def test_digests_that_cannot_be_read(
    place: Path, capsys: pytest.CaptureFixture[str], contents: Any
) -> None:
    splits = place / "run" / "splits.json"
    splits.write_text(json.dumps({**json.loads(splits.read_text()), "contents": contents}))
    assert "splits.json: its contents can't be read" in said(
        capsys, 2, "evaluate", str(place / "run")
    )


def test_digests_of_samples(tmp_path: Path) -> None:
    """A small file counts whole, of a large one a sample or all."""
    file = tmp_path / "file"
    for size, position, seen in ((WHOLE, WHOLE // 3, True), (20 * WHOLE, WHOLE + 5, False)):
        content = bytearray(size)
        file.write_bytes(content)
        sample, everything = digest(file, "sample"), digest(file, "all")
        content[position] = 1
        file.write_bytes(content)
        assert (digest(file, "sample") != sample) == seen
        assert digest(file, "all") != everything
        content[-1] = 1
        file.write_bytes(content)
        assert digest(file, "sample") != sample


# ----------------------------------------------------------------------------- best.pt


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_lost_best_weights_are_said_before_training_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    best, results = place / "run" / "checkpoints" / "best.pt", place / "run" / "results.json"
    best.unlink()
    if content is not None:
        best.write_bytes(content)
    results.unlink()
    arguments = ("--resume", str(place / "run"), "engine.iterations=6")
    line = said(capsys, 2, *arguments)
    assert f"{best}: {'missing' if content is None else 'damaged'}, and the run needs it" in line
    assert "--forget-best" in line
    assert not results.exists()
    line = said(capsys, 2, "evaluate", str(place / "run"))
    assert "the run's last weights are whole: --weights last" in line
    assert run.main([*arguments, "--forget-best"]) == 0
    found = json.loads(results.read_text())
    assert found["best"]["step"] == checkpoint.load(best)["engine"]["global_step"] == 6


@pytest.mark.parametrize("content", [None, b""])
def test_best_weights_that_are_lost_while_a_run_goes_on(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
) -> None:
    """Nothing claims to be theirs, and what is known of the last ones is kept."""
    best = place / "run" / "checkpoints" / "best.pt"
    former = Engine.run

    def train(engine: Any) -> None:
        former(engine)
        best.unlink()
        if content is not None:
            best.write_bytes(content)

    monkeypatch.setattr(Engine, "run", train)
    line = said(capsys, 1, "--resume", str(place / "run"), "engine.iterations=6")
    assert str(best) in line
    found = json.loads((place / "run" / "results.json").read_text())
    assert found["best"] is None
    assert list(found["scores"]) == ["last"]


# ------------------------------------------------------------------ weights that are NaN


def test_predictions_of_nan_are_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that aren't finite are refused; where they are and their sums aren't, no mask is."""
    best, out = place / "run" / "checkpoints" / "best.pt", place / "masks"
    state = checkpoint.load(best)
    name, tensor = next(iter(state["problems"]["segmentor"]["module"].items()))
    arguments = [str(place / "run"), str(place / "data" / "images"), "--out", str(out)]
    for value, code, told in (
        (float("nan"), 2, f"({name} is not finite)"),
        (3e38, 1, "0.png: its class probabilities by"),
    ):
        tensor[:] = value
        checkpoint.save(best, state)
        capsys.readouterr()
        assert predict.main(arguments) == code
        assert told in capsys.readouterr().err
        assert not out.exists() or not list(out.iterdir())


# ------------------------------------------------------------------ checkpoints changed


@pytest.mark.parametrize("name", ["last", "best"])
def test_changed_checkpoints_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Whatever is changed in what one holds: it goes on, or says why not."""
    path = place / "run" / "checkpoints" / f"{name}.pt"
    state = torch.load(path, weights_only=True)
    draw = random.Random(0)
    for _ in range(12):
        changed, how = mutations.changed(state, draw)
        torch.save(changed, path)
        capsys.readouterr()
        if name == "last":
            code = run.main(["--resume", str(place / "run"), "engine.iterations=5"])
        else:
            code = evaluate.main([str(place / "run")])
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith(("error: ", "failed: "))]
        assert len(lines) == (code != 0), (how, code, error)
        assert "Traceback" not in error, how
