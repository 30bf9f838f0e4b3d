"""The grid of LoAd's rows: one command, resumable, one table."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import load_rows
import pytest
import tiny

from mlseg import run

GRID = """
config: tiny.yaml
seeds: [0, 1]
rows:
  first: {overrides: [lookahead.beta_l=0.5]}
  wide: {start_of: first, overrides: [lookahead.buffer_size=4]}
  control: {start_of: first, updates_of: first}
"""
QUICK = {
    "pretraining.weighted_epochs": 0,
    "lookahead.cycles": 1,
    "lookahead.patience": 2,
    "discriminator_training.max_epochs": 1,
}


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid's file; its runs are made in this process."""

    def call(arguments: Sequence[str], log: BinaryIO) -> int:
        assert list(arguments[:2]) == ["-m", "mlseg.run"]
        calls.append(list(arguments[2:]))
        return run.main(arguments[2:])

    calls.clear()
    monkeypatch.setattr(load_rows, "_call", call)
    tiny.write_config(tmp_path / "tiny.yaml", "load", QUICK)
    (tmp_path / "grid.yaml").write_text(GRID, encoding="utf-8")
    return tmp_path / "grid.yaml"


calls: list[list[str]] = []


def test_one_command_and_one_table(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = grid.parent / "rows"
    assert load_rows.main([str(grid), "--out", str(out)]) == 0
    assert len(calls) == 6
    text = (out / "table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    found: dict[str, list[dict[str, Any]]] = {
        name: [json.loads((out / name / f"seed_{n}" / "results.json").read_text()) for n in (0, 1)]
        for name in ("first", "wide", "control")
    }
    for seed in (0, 1):
        starts = [found[name][seed]["scores"]["start"] for name in found]
        assert starts[0] == starts[1] == starts[2], "stage 1 is trained once"
        assert found["control"][seed]["updates"] == found["first"][seed]["updates"]
        assert found["first"][seed]["seed"] == seed
    a, b = (100 * r["scores"]["best"]["test"]["miou"] for r in found["first"])
    mean, deviation = (a + b) / 2, abs(a - b) / 2**0.5
    assert f"| {mean:.2f} ± {deviation:.2f} |" in text.partition("## mIoU, test")[2]
    assert "synthetic images" in text
    cycles = text.partition("## Cycles")[2].partition("##")[0].splitlines()
    assert len([line for line in cycles if line.startswith(("| first |", "| wide |"))]) == 4
    lengths = [line.split("|")[5].strip() for line in cycles if line.startswith("| first |")]
    assert lengths == [str(r["updates"]) for r in found["first"]], "one cycle"
    row = json.loads((out / "table.json").read_text())["rows"]["first"]["test"]["best"]
    assert row == pytest.approx({"mean": mean, "std": deviation})


def test_it_goes_on_where_it_was(grid: Path) -> None:
    out = grid.parent / "rows"
    assert load_rows.main([str(grid), "--out", str(out), "--seeds", "0"]) == 0
    (out / "control" / "seed_0" / "results.json").unlink()
    calls.clear()
    assert load_rows.main([str(grid), "--out", str(out), "--seeds", "0"]) == 0
    assert calls == [["--resume", str(out / "control" / "seed_0")]]
    calls.clear()
    assert load_rows.main([str(grid), "--out", str(out), "--table"]) == 0
    assert not calls
    table = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert not [x for x in table if x.startswith("|") and "±" in x], "one seed has no spread"


def test_what_does_not_fit_is_one_line(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = grid.parent / "rows"

    def said(*arguments: str) -> str:
        assert load_rows.main([str(grid), *arguments, "--out", str(out)]) == 2
        text = capsys.readouterr().err.strip()
        assert "\n" not in text
        return text

    assert "no run below" in said("--table")
    assert "lookahead.patience" in said("lookahead.patience=x")
    assert not out.exists()
    grid.write_text(GRID.replace("updates_of: first", "updates_of: last"), encoding="utf-8")
    assert "rows.control.updates_of: 'last' is no row above it" in said()
    grid.write_text(GRID.replace("seeds", "sedes"), encoding="utf-8")
    assert "sedes" in said()


def test_runs_on_other_data_are_not_mixed(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = grid.parent / "rows"
    assert load_rows.main([str(grid), "--out", str(out), "--seeds", "0"]) == 0
    path = out / "wide" / "seed_0" / "results.json"
    path.write_text(path.read_text().replace('"synthetic"', '"real"'))
    assert load_rows.main([str(grid), "--out", str(out), "--table"]) == 2
    assert "provenance" in capsys.readouterr().err


def test_runs_with_other_settings_are_not_mixed(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = grid.parent / "rows"
    assert load_rows.main([str(grid), "--out", str(out), "--seeds", "0"]) == 0
    calls.clear()
    for more in ([], ["--table"]):
        given = [str(grid), "lookahead.patience=3", "--out", str(out), *more]
        assert load_rows.main(given) == 2
        assert "lookahead.patience is not what this grid asks for" in capsys.readouterr().err
    assert not calls


def test_a_row_made_anew_leaves_nothing_that_built_on_it(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = grid.parent / "rows"
    given = [str(grid), "--out", str(out), "--seeds", "0"]
    assert load_rows.main(given) == 0
    path = out / "first" / "seed_0" / "results.json"
    found = json.loads(path.read_text())

    def said(**changes: Any) -> str:
        path.write_text(json.dumps(found | changes))
        calls.clear()
        for more in ([], ["--table"]):
            assert load_rows.main([*given, *more]) == 2
        assert not calls
        return capsys.readouterr().err

    assert "control/seed_0: 2 updates, first has 7; remove it" in said(updates=7)
    other = said(models={"start": "x", "best": "y"})
    assert "wide/seed_0: first has another start model by now" in other


def test_what_has_been_cut_off_is_no_row(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = grid.parent / "rows"
    given = [str(grid), "engine.iterations=10", "--out", str(out), "--seeds", "0"]
    assert load_rows.main(given) == 2
    assert "engine.iterations has cut it off" in capsys.readouterr().err


def test_a_table_of_some_seeds(grid: Path) -> None:
    out = grid.parent / "rows"
    assert load_rows.main([str(grid), "--out", str(out)]) == 0
    assert load_rows.main([str(grid), "--out", str(out), "--seeds", "1", "--table"]) == 0
    assert "| first | 1 |" in (out / "table.md").read_text(encoding="utf-8")


def test_a_failed_run_is_named(
    grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(arguments: Sequence[str], log: BinaryIO) -> int:
        log.write(b"failed: a reason\n")
        return 1

    monkeypatch.setattr(load_rows, "_call", call)
    assert load_rows.main([str(grid), "--out", str(grid.parent / "rows")]) == 2
    assert "first, seed 0: exit code 1: ['failed: a reason']" in capsys.readouterr().err


def test_an_interrupted_run_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waited = []

    class Process:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait(self) -> int:
            waited.append(1)
            if len(waited) == 1:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(subprocess, "Popen", Process)
    with (tmp_path / "log").open("wb") as log, pytest.raises(KeyboardInterrupt):
        load_rows._call(["-c", "pass"], log)
    assert len(waited) == 2


CONFIGS = Path(__file__).parents[2] / "configs"
GRIDS = sorted(path for path in CONFIGS.glob("load_*.yaml") if "rows:" in path.read_text())


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_grids_of_configs(path: Path, tmp_path: Path) -> None:
    """Every row is a config that can be run; three seeds, a control."""
    made = load_rows.Grid(path, tmp_path, [], None).settings
    assert len(made.seeds) == 3
    assert any(row.updates_of for row in made.rows.values())
    if path.stem == "load_ablation":
        varied = {text.partition("=")[0] for row in made.rows.values() for text in row.overrides}
        table_7 = {"beta_l", "beta_u", "patience", "buffer_size"}
        assert {f"lookahead.{key}" for key in table_7} <= varied
        assert {"segmentor.encoder", "discriminator.name"} <= varied
