"""The files and commands of ``docs/your-own-data.md``, in a folder of twelve pictures."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_files import write_image

from mlseg.__main__ import COMMANDS, main
from mlseg.segmentation.data.layout import folder_layout

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-data.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(r"^```(?:yaml|python)\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
)
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def draw(folder: Path, masks: str, count: int) -> None:
    """Pictures of a square in a frame; masks hold 0, 1 and 2."""
    for number in range(count):
        labels = np.zeros((40, 50), np.uint8)
        labels[4:30, 5 + number : 35] = 1
        labels[10:20, 15:25] = 2
        picture = np.stack([labels * 80 + 20] * 3, -1)
        write_image(folder / "images" / f"{number}.png", picture)
        write_image(folder / masks.format(number), labels)


def draw_volume() -> None:
    """A scan of ten slices, and its labels."""
    nibabel = pytest.importorskip("nibabel")
    labels = np.zeros((50, 40, 10), np.int16)
    labels[5:35, 4:30], labels[15:25, 10:20] = 1, 2
    for name, values in (("ct", labels * 80 - 100), ("ct_labels", labels)):
        nibabel.Nifti1Image(values, np.diag([-1, -1, 3, 1])).to_filename(f"{name}.nii.gz")


@pytest.mark.slow
def test_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    draw(tmp_path / "cells", "masks/{}.png", 12)
    draw(tmp_path / "more", "mask/{}_mask.png", 2)
    monkeypatch.chdir(tmp_path)
    draw_volume()
    runpy.run_path("slices.py")
    monkeypatch.delenv("MLSEG_DATA", raising=False)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    ran = []
    for line in "".join(BLOCKS).splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "tensorboard":
            continue
        command = words[1].removeprefix("mlseg.")
        assert (program, words[0]) == ("python", "-m")
        assert command in COMMANDS
        cheap = ["engine.iterations=2", "engine.validate_every=2"] if command == "run" else []
        assert main([command, *words[2:], *cheap]) == 0, line
        ran.append(command)
    assert ran == ["run", "run", "run", "evaluate", "predict", "evaluate"]
    assert len(list((tmp_path / "scans" / "images").iterdir())) == 10
    sys.modules.pop("my_nets", None)
    assert json.loads((tmp_path / "runs/own/results.json").read_text())["provenance"] == "real"
    assert list((tmp_path / "runs/own/samples").iterdir())
    assert "No training example" not in capsys.readouterr().err
    with Image.open(tmp_path / "predicted" / "0.png") as mask:
        assert (mask.size, mask.mode) == ((50, 40), "P")


def test_its_layouts_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| `.*? \| ((?:`\w+: [^|]+)) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        keys = dict(pair.split(": ") for pair in re.findall(r"`([^`]+)`", row))
        folder_layout(**{key: value.strip('"') for key, value in keys.items()})
