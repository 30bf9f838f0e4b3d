"""What a grid may say, and what its cells are; every mistake is one line before any work."""

from pathlib import Path
from typing import Any

import grids
import pytest

from mlseg import sweep
from mlseg.sweeps.grid import Grid

TABLES = Path(__file__).parents[2] / "configs" / "tables"
SCORE = "scores.best.{split}.{metric}"
TUNED: dict[str, Any] = {
    "axes.rate": {"0.1": {"overrides": {"problems.segmentor.optimizer.lr": 0.1}}, "0.2": {}},
    "report.figures": {"test": {"of": SCORE}, "val": {"of": "scores.best.val.{metric}"}},
    "report.tables": {"Best": {"rows": ["row"], "figures": ["test"], "select": {"rate": "test"}}},
}


def sheet(settings: dict[str, Any]) -> dict[str, Any]:
    return {"report.sheets": {"Figure 8": {"rows": "row", **settings}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, "grid.yaml:15: sedes: unknown key; did you mean 'seeds'?"),
        ({"seeds": [1, 1]}, "seeds: one of them comes twice"),
        ({"seeds": []}, "seeds: "),
        ({"axes": {}}, "axes: "),
        ({"axes.row.off": None, "axes.row.flip": None}, "axes.row: none of its values is left"),
        ({"configs.plain": "tinny.yaml"}, "tinny.yaml: no such file; did you mean"),
        ({"axes.row.off.config": "plian"}, "axes.row.off.config: no config 'plian'; did you mean"),
        (
            {"axes.row.off.overrides": {"augmentatoin": "off"}},
            "grid.yaml:8: augmentatoin: unknown key; did you mean 'augmentation'?",
        ),
        ({"axes.row.off.overrides": {"seed": 3}}, "axes.row.off.overrides.seed: the grid's seeds"),
        ({"axes.row.off.overrides": {"data..train": 3}}, "data..train: no key of a config"),
        (
            {"axes.row.off.takes": {"start": "gan"}},
            "takes.start: no dependency 'gan'; there are no",
        ),
        ({"axes.seed": {"a": {}}}, "axes.seed: is what every table has"),
        ({("axes", "row", "../x"): {}}, "axes.row.../x: becomes a folder's name"),
        (
            {"axes.other": {"a": {"overrides": {"augmentation": "flip"}}}},
            "sets augmentation, and so",
        ),
        ({"leave_out": [{"rwo": "off"}]}, "leave_out.0.rwo: no axis 'rwo'; did you mean 'row'?"),
        (
            {"leave_out": [{"row": "of"}]},
            "leave_out.0.row: no value of row 'of'; did you mean 'off'",
        ),
        ({"leave_out": [{"row": ["off", "flip"]}]}, "leave_out: no cell is left"),
        (
            {"dependencies.a": {"cell": {"row": "off"}}},
            "dependencies.a: name either a file or a res",
        ),
        (
            {"dependencies.a": {"cell": {"row": "of"}, "file": "x"}},
            "a.cell.row: no value of row 'of'",
        ),
        ({"dependencies.a": {"cell": {"seed": 7}, "file": "x"}}, "a.cell.seed: 7 is none of the"),
        (
            {"dependencies.a": {"cell": {}, "file": "../x"}},
            "a.file: lies outside the run directory",
        ),
        (
            {"same": ["augmentation"]},
            "grid.yaml:16: same.0: augmentation.flip_horizontal of flip is",
        ),
        ({"report.tables": {"A": {"rows": ["rwo"], "figures": ["seconds"]}}}, "no axis 'rwo'; did"),
        (
            {"report.tables": {"A": {"rows": ["row"], "figures": ["second"]}}},
            "did you mean 'seconds'",
        ),
        ({"report.figures": {"a": {"of": "x.{spilt}"}}}, "no placeholder 'spilt'; did you mean"),
        ({"report.figures": {"a": {"by": "nobodys"}}}, "figures.a.by: no figure 'nobodys'"),
        ({"report.sections": {"a": {"kind": "ensemble"}}}, "did you mean 'ensembles'?"),
        ({"report.pictures": {"a": {"figure": "seconds", "x": "roww"}}}, "pictures.a.x: no axis"),
        (
            {
                "report.pictures": {"Figure 2": {"figure": "seconds", "x": "row"}},
                "report.examples": {"figure-2": {}},
            },
            "report.examples.figure-2: would be figure_2.png, and so is report.pictures.Figure 2",
        ),
        (
            TUNED,
            f"report.tables.Best.select.rate: rate would be chosen on test data, by the string "
            f"'{SCORE}'",
        ),
        (
            {"dependencies.a": {"cell": {"row": "off"}, "result": "scores.best.test.jaccard"}},
            "dependencies.a.result: what a cell takes would be chosen on test data",
        ),
        (sheet({"rows": "rwo"}), "report.sheets.Figure 8.rows: no axis 'rwo'; did you mean 'row'?"),
        (sheet({"where": {"row": "of"}}), "where.row: no value of row 'of'; did you mean 'off'?"),
        (sheet({"besides": {"of": "e2eaug.pairs"}}), "besides.of: no value of row 'of'"),
        (sheet({"besides": {"off": "e2eaug.pair"}}), "did you mean 'e2eaug.pairs'?"),
        (sheet({"images": 0}), "report.sheets.Figure 8.images"),
    ],
)
def test_mistakes(
    changes: dict[Any, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    grids.write(tmp_path, changes)
    assert sweep.main(["grid.yaml", "--out", "out"]) == 2
    text = capsys.readouterr().err.strip()
    assert text.count("\n") == 0
    assert said in text
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "--jobs: 0 processes; give 1 or more"),
        (["--shard", "2/2"], "--shard: '2/2' is no part"),
        (["--shard", "1"], "--shard: '1' is no part"),
        (["--only", "row=flipp"], "--only row: no value 'flipp'; did you mean 'flip'?"),
        (["--only", "rwo=flip"], "--only: no axis 'rwo'; did you mean 'row'?"),
        (["--only", "seed=7"], "--only seed: no value '7'; there are 0, 1"),
        (["--only", "row"], "--only: 'row': write AXIS=VALUE"),
        (["seed=3"], "command line: seed: the grid's seeds set it; use --seeds"),
        (["augmentation=rotate"], "augmentation: the axes set it otherwise in every cell"),
        (["data.trian=3"], "command line: data.trian: unknown key; did you mean 'data.train'?"),
        (["--table"], "no run below out has finished yet"),
    ],
)
def test_mistakes_of_a_command(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    grids.write(tmp_path)
    assert sweep.main(["grid.yaml", "--out", "out", *arguments]) == 2
    text = capsys.readouterr().err.strip()
    assert text.count("\n") == 0
    assert said in text
    assert not list(Path().glob("out/*/*"))


def test_a_cell_that_would_build_on_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "axes.row.off.takes": {"data.root": "b"},
        "axes.row.flip.takes": {"data.root": "a"},
        "dependencies": {
            "a": {"cell": {"row": "off"}, "file": "x"},
            "b": {"cell": {"row": "flip"}, "file": "x"},
        },
    }
    assert sweep.main([str(grids.write(tmp_path, changes))]) == 2
    assert "a cell would build on itself: " in capsys.readouterr().err


def test_selection_by_validation_images_is_none(tmp_path: Path) -> None:
    tuned = {**TUNED, "report.tables": {"Best": {**TUNED["report.tables"]["Best"]}}}
    tuned["report.tables"]["Best"]["select"] = {"rate": "val"}
    assert len(Grid(grids.write(tmp_path, tuned), tmp_path).shown) == 8


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_of_the_repository(path: Path, tmp_path: Path) -> None:
    grid = Grid(path, tmp_path)
    assert len(grid.settings.seeds) >= 3
    assert grid.settings.report.tables
    if not path.stem.endswith("_small"):
        assert (path.parent / f"{path.stem}_small.yaml").exists()
    if path.stem == "load_voc":
        rows = grid.axes["row"].values()
        varied = {key for value in rows for key in value.overrides}
        table_7 = {"beta_l", "beta_u", "patience", "buffer_size"}
        assert {f"lookahead.{key}" for key in table_7} <= varied
        assert {"segmentor.encoder", "discriminator.name"} <= varied


def test_a_grid_inherits(tmp_path: Path) -> None:
    grids.write(tmp_path)
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / "grid.yaml"
    path.write_text("base: ../grid.yaml\nseeds: [5]\naxes: {row: {off: null}}\n")
    (cell,) = Grid(path, tmp_path / "out").shown
    assert str(cell) == "flip, seed 5"
