"""Pictures of what rows predict: which images, which rows; every mistake is one line."""

from pathlib import Path
from typing import Any

import grids
import pytest
from PIL import Image

from mlseg import sweep


def write(folder: Path, **examples: Any) -> None:
    grids.write(folder, {"report.examples": {"Seen": examples}})


@pytest.mark.slow
def test_images_rows_and_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grids.in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, images=2)
    command = ["grid.yaml", "--out", "out"]
    assert sweep.main(command) == 0
    assert "![Seen](seen.png)" in Path("out/table.md").read_text()
    with Image.open("out/seen.png") as picture:
        wide, tall = picture.size
    write(tmp_path, images=1, where={"row": "off"})
    assert sweep.main([*command, "--table"]) == 0
    with Image.open("out/seen.png") as picture:
        assert picture.size[0] < wide, "a column less"
        assert picture.size[1] < tall, "a row less"
    capsys.readouterr()
    for examples, said in (
        ({"ids": ["nobody"]}, "report.examples.Seen.ids: no image 'nobody' in test"),
        ({"split": "tset"}, "report.examples.Seen.split: no images of 'tset'; there are val, test"),
        ({"where": {"row": "of"}}, "report.examples.Seen.where.row: no value of row 'of'; did you"),
        ({"images": 0}, "report.examples.Seen.images"),
    ):
        write(tmp_path, **examples)
        assert sweep.main([*command, "--table"]) == 2
        text = capsys.readouterr().err.strip()
        assert said in text
        assert text.count("\n") == 0


@pytest.mark.slow
def test_seeds_that_split_otherwise_stand_in_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grids.in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    changes: dict[Any, Any] = {
        "seed_keys": ["seed", "data.split_seed"],
        "axes": {"row": {"off": {}}},
        "report.examples": {"Seen": {"images": 1}},
    }
    grids.write(tmp_path, changes)
    assert sweep.main(["grid.yaml", "--out", "out"]) == 2
    assert "seed_1 has another split than out/off/seed_0; name one" in capsys.readouterr().err
    changes["report.examples"] = {"Seen": {"images": 1, "seeds": [1]}}
    grids.write(tmp_path, changes)
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 0
    assert Path("out/seen.png").exists()
