"""Differences between rows, and what is chosen where, against numbers got in other ways."""

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import grids
import numpy as np
import pytest

from mlseg import sweep
from mlseg.sweeps.frame import RESAMPLES, paired
from mlseg.sweeps.grid import Cell, Grid


@pytest.mark.parametrize("values", [[0.3, -0.1, 0.2], [0.1, 0.4, 0.2, 0.3, 0.5], [-0.25, 0.5]])
def test_paired(values: list[float]) -> None:
    found = paired(values)
    number = len(values)
    assert found["mean"] == statistics.fmean(values)
    assert found["std"] == statistics.stdev(values)
    assert found["above"] == sum(v > 0 for v in values)
    # All samples with replacement there are. A quantile of N draws has the level q with a standard
    # error of sqrt(q (1 - q) / N); five of them aside the exact quantiles bound it.
    means = sorted(statistics.fmean(s) for s in itertools.product(values, repeat=number))
    error = 5 * (0.025 * 0.975 / RESAMPLES) ** 0.5
    for key, level in (("low", 0.025), ("high", 0.975)):
        low, high = np.quantile(means, [level - error, level + error], method="inverted_cdf")
        assert low - 1e-12 <= found[key] <= high + 1e-12
    # All ways to give the ranks their signs, two-sided.
    ranks = {v: i + 1 for i, v in enumerate(sorted(abs(v) for v in values))}
    total = sum(ranks.values())
    seen = sum(ranks[abs(v)] for v in values if v > 0)
    sums = [
        sum(r for r, sign in zip(ranks.values(), signs, strict=True) if sign)
        for signs in itertools.product([0, 1], repeat=number)
    ]
    extreme = sum(abs(s - total / 2) >= abs(seen - total / 2) for s in sums) / len(sums)
    assert found["p"] == pytest.approx(extreme, rel=1e-12)


def test_differences_of_nothing_and_of_one_seed() -> None:
    assert paired([0.0, 0.0, 0.0])["p"] == 1.0
    alone = paired([0.25])
    assert alone["mean"] == 0.25
    assert alone["above"] == 1
    assert alone["std"] is alone["low"] is alone["p"] is None


def finish(grid: Grid, cell: Cell, val: float, test: float, **more: Any) -> None:
    """A finished run of these scores, as runs of any age have left them."""
    from mlseg import config
    from mlseg.problems.systems import parse_run

    directory = grid.directory(cell)
    directory.mkdir(parents=True)
    settings = parse_run(grid.config(cell))[0]
    (directory / "config.yaml").write_text(config.dump(settings))
    splits = {"val": {"jaccard": val}, "test": {"jaccard": test, "jaccard_std": 0.125}}
    results = {
        "metric": "jaccard", "data": "drawn", "provenance": "synthetic", "seconds": 3.0,
        "split_hash": str(cell.seed), "scores": {"best": splits, "last": splits}, **more,
    }  # fmt: skip
    (directory / "results.json").write_text(json.dumps(results))


def test_what_is_best_on_validation_images_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {
        "axes.rate": {"0.1": {}, "0.2": {"overrides": {"data.train": 3}}},
        "report.figures": {
            "test": {"of": "scores.best.{split}.{metric}"},
            "val": {"of": "scores.best.val.{metric}"},
        },
        "report.tables": {
            "Best": {"rows": ["row"], "figures": ["test"], "select": {"rate": "val"}},
            "All": {"rows": ["row"], "columns": ["rate"], "figures": ["test"],
                    "versus": {"row": "flip"}},
        },
        "report.pictures": {"Rates": {"figure": "test", "x": "rate", "series": "row"}},
    }  # fmt: skip
    grid = Grid(grids.write(tmp_path, changes), Path("out"))
    for cell in grid.shown:
        # The rate that is better on validation images is worse on test images.
        better = (cell.values["row"] == "off") == (cell.values["rate"] == "0.1")
        finish(grid, cell, 0.5 + 0.25 * better + cell.seed / 100, 0.5 - 0.25 * better)
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 0
    text = capsys.readouterr().out
    best = text.partition("## Best")[2].partition("##")[0]
    assert "| off | 2 | 0.250 ± 0.000 |" in best
    assert "| flip | 2 | 0.250 ± 0.000 |" in best
    assert "row off, rate 0.1; row flip, rate 0.2" in best
    whole = text.partition("## All")[2]
    assert "| off | 2 | 0.250 ± 0.000 | 0.500 ± 0.000 |" in whole
    assert "| off | 0.1 | 2 | +0.250 ± 0.000 | 2 of 2 | +0.250 to +0.250 | 0.5 |" in whole
    assert Path("out/rates.svg").exists()


def test_points_of_some_rows_stand_about_their_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    monkeypatch.chdir(tmp_path)
    some = {"figure": "test", "x": "split", "series": "row", "where": {"row": ["flip"]}}
    changes = {
        "report.figures": {"test": {"of": "scores.best.{split}.{metric}"}},
        "report.pictures": {"Some": some},
    }
    grid = Grid(grids.write(tmp_path, changes), Path("out"))
    for cell in grid.shown:
        finish(grid, cell, 0.5, 0.5)
    drawn: list[list[float]] = []
    former = Axes.errorbar

    def errorbar(self: Axes, x: Any, *args: Any, **settings: Any) -> Any:
        drawn.append(list(x))
        return former(self, x, *args, **settings)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 0
    assert drawn == [[0.0]]


def test_splits_of_other_rows_have_no_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = {"rows": ["row"], "columns": ["split"], "figures": ["test", "seconds"]}
    changes = {
        "axes.images": {"3": {"overrides": {"data.train": 3}}, "4": {}},
        "report.figures": {
            "test": {"of": "scores.best.{split}.{metric}"},
            "val": {"of": "scores.best.val.{metric}"},
            "seconds": {"of": "seconds", "digits": 0},
        },
        "report.tables": {
            "Few": {**figures, "where": {"images": "3"}},
            "Many": {**figures, "where": {"images": "4"}},
            "Best": {"rows": ["images"], "columns": ["split"], "figures": ["test"],
                     "where": {"images": "3"}, "select": {"row": "val"}},
        },
    }  # fmt: skip
    grid = Grid(grids.write(tmp_path, changes), Path("out"))
    for cell in grid.shown:
        splits = {split: {"jaccard": 0.5} for split in ("val", "test")}
        if cell.values["images"] == "4" and cell.values["row"] == "flip":
            splits["far"] = {"jaccard": 0.25}
        finish(grid, cell, 0.5, 0.5, scores={"best": splits})
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 0
    text = capsys.readouterr().out
    assert "| row | seeds | test, test | test, seconds |" in text.partition("## Few")[2]
    assert "| images | seeds | test |" in text.partition("## Best")[2]
    many = text.partition("## Many")[2].partition("##")[0]
    assert "| row | seeds | test, test | test, seconds | far, test | far, seconds |" in many
    assert "| off | 2 | 0.500 ± 0.000 | 3 ± 0 | - | 3 ± 0 |" in many, "one row has it"


def test_a_figure_that_no_run_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"report.figures": {"test": {"of": "scores.best.{split}.jacard"}}}
    grid = Grid(grids.write(tmp_path, changes), Path("out"))
    for cell in grid.shown[:2]:
        finish(grid, cell, 0.5, 0.5)
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 2
    said = capsys.readouterr().err
    assert "report.figures.test.of: no finished run has a number at" in said
    assert "did you mean scores.best.{split}.jaccard?" in said
    grids.write(tmp_path, {"report.metrics": ["jaccard", "jacard_std"]})
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 2
    said = capsys.readouterr().err
    assert (
        "report.metrics.1: no finished run has a number at scores.best.{split}.jacard_std" in said
    )
    grids.write(tmp_path, {"report.splits": ["test", "ph2"]})
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 0
    assert "No run has scores on ph2." in capsys.readouterr().out


def test_expected_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = Grid(grids.write(tmp_path), Path("out"))
    finish(grid, grid.shown[0], 0.5, 0.5, seconds=90.0)
    assert sweep.main(["grid.yaml", "--out", "out", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 cells, 1 done; 1 min 30 s of work left" in said
    assert "2 of them are of rows of which none has finished" in said
    assert not Path("out/table.md").exists()
