"""Sheets of a sweep: rows of methods, columns of images, and what a system shows besides."""

from pathlib import Path

import grids
import numpy as np
import pytest
import tiny
from PIL import Image

from mlseg import sweep
from mlseg.segmentation.pictures import GAP, LINE, SIDE


def panels(path: Path, rows: int, columns: int) -> list[list[np.ndarray]]:
    """The panels of a sheet, by row and column."""
    with Image.open(path) as image:
        canvas = np.asarray(image)
    assert canvas.shape[1] == columns * (SIDE + GAP) + GAP
    found = []
    top = LINE + 2 * GAP
    for _ in range(rows):
        top += LINE + GAP // 2
        lefts = [GAP + column * (SIDE + GAP) for column in range(columns)]
        found.append([canvas[top : top + SIDE, left : left + SIDE] for left in lefts])
        top += SIDE + GAP
    return found


def test_rows_columns_and_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grids.in_this_process(monkeypatch)
    more = {"gan.pretrain": 1, "engine.iterations": 1, "data.train": 4, "data.val": 2}
    tiny.write_config(tmp_path / "e2eaug.yaml", "e2eaug", more)
    changes = {
        "configs": {"plain": "tiny.yaml", "game": "e2eaug.yaml"},
        "axes.row.game": {"config": "game"},
        "axes.row.flip": None,
        "seeds": [0],
        "report.sheets": {
            "Figure 8": {"rows": "row", "images": 2, "besides": {"game": "e2eaug.pairs"}}
        },
    }
    grids.write(tmp_path, changes)
    assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    path = Path("out/figure_8.png")
    assert "![Figure 8](figure_8.png)" in Path("out/table.md").read_text()
    image, truth, off, game, masks, made = panels(path, 6, 2)
    for maps in (truth, off, game, masks):
        assert all(set(np.unique(panel)) <= {0, 255} for panel in maps)
    for photographs in (image, made):
        assert all(len(np.unique(panel)) > 20 for panel in photographs)
    assert not np.array_equal(image[0], image[1])
    assert not np.array_equal(made[0], made[1])
    first = path.read_bytes()
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 0
    assert path.read_bytes() == first, "the same from the same runs"
