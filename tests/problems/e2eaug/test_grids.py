"""Cells of a grid of two systems, one of which takes the other's GAN."""

import json
from pathlib import Path
from typing import Any

import grids
import tiny

from mlseg.problems.e2eaug.reporting import selected_step
from mlseg.problems.reporting import FinishedRun
from mlseg.sweeps.grid import Cell, Grid


def test_layers(tmp_path: Path) -> None:
    """File, grid, command line, axes in order, seeds, what other cells give."""
    tiny.write_config(tmp_path / "e2eaug.yaml", "e2eaug")
    changes = {
        "configs": {"plain": "tiny.yaml", "game": "e2eaug.yaml"},
        "overrides": {"gan.pretrain": 1, "engine.iterations": 7, "data.train": 5},
        "axes.row.game": {"config": "game", "takes": {"gan.pretrained": "gan"}},
        "axes.row.first": {"config": "game", "shown": False, "overrides": {"engine.iterations": 1}},
        "axes.row.unused": {"shown": False},
        "axes.size": {"small": {"overrides": {"data.train": 3, "gan.l1": 2.0}}, "large": {}},
        "dependencies.gan": {"cell": {"row": "first", "size": "large"}, "file": "gan.pt"},
        "seed_keys": ["seed", "data.split_seed"],
        "leave_out": [{"row": "flip", "size": ["large"]}],
    }
    grid = Grid(grids.write(tmp_path, changes), tmp_path / "out", ["gan.pretrain=2"])
    off, game = (Cell((("row", row), ("size", "small")), 1) for row in ("off", "game"))
    values = grid.config(off).values
    assert values["engine"]["iterations"] == 7
    assert values["data"]["train"] == 3
    assert values["seed"] == values["data"]["split_seed"] == 1
    assert "gan" not in values, "it has no place for that"
    values = grid.config(game).values
    assert values["gan"]["pretrain"] == 2
    assert values["gan"]["l1"] == 2.0
    (first,) = grid.after(game)
    assert first == Cell((("row", "first"), ("size", "large")), 1)
    assert values["gan"]["pretrained"] == str(grid.directory(first) / "gan.pt")
    assert grid.config(first).values["engine"]["iterations"] == 1, "a row's own holds"
    shown = {cell.values["row"] for cell in grid.shown}
    assert shown == {"off", "flip", "game"}
    whole = grid.closure(grid.shown)
    assert len(whole) == 2 * (5 + 1), "the first row is needed at one size"
    assert whole.index(first) < whole.index(game)
    assert grid.directory(off) == tmp_path / "out" / "off" / "small" / "seed_1"


def test_only_and_what_it_builds_on(tmp_path: Path) -> None:
    tiny.write_config(tmp_path / "e2eaug.yaml", "e2eaug")
    changes = {
        "configs": {"plain": "tiny.yaml", "game": "e2eaug.yaml"},
        ("axes", "row", "game, all"): {"config": "game", "takes": {"gan.pretrained": "gan"}},
        "axes.row.first": {"config": "game", "shown": False},
        "dependencies.gan": {"cell": {"row": "first"}, "file": "gan.pt"},
    }
    grid = Grid(grids.write(tmp_path, changes), tmp_path / "out")
    some = grid.chosen(grid.shown, ["row=off,flip", "seed=1"])
    assert [str(cell) for cell in some] == ["off, seed 1", "flip, seed 1"]
    some = grid.closure(grid.chosen(grid.shown, ["row=game, all"]))
    assert [cell.values["row"] for cell in some] == ["first", "game, all"] * 2


def test_the_selected_step_is_counted_from_the_segmentor(tmp_path: Path) -> None:
    """Whatever pre-training is given in, and nothing where another run has done it."""
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a", "b", "c", "d", "e"]}))
    results = {"best": {"step": 20}}

    def step(**gan: Any) -> float:
        settings = {"pretrained": None, **gan}
        problems = {"generator": {"batch_size": 2}}
        config = {"gan": settings, "synthetic_weight": 1.0, "problems": problems}
        return selected_step(FinishedRun(tmp_path, 0, results, config))

    assert step(pretrain=7) == 13.0
    assert step(pretrain={"epochs": 3}) == 12.0, "three times five images, two at a time"
    assert step(pretrain=7, pretrained="gan.pt") == 20.0
    assert selected_step(FinishedRun(tmp_path, 0, results, {})) == 20.0, "a segmentor alone"
