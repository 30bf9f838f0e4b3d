"""Grids that are run: what is kept, taken up, refused, shared out, and what comes of it."""

import csv
import json
import os
import re
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import children
import grids
import pytest
from waiting_for import alive, wait_until

from mlseg import run, sweep
from mlseg.engines.engine import Engine
from mlseg.files import claimed
from mlseg.sweeps import running

CELLS = [f"{row}/seed_{seed}" for seed in (0, 1) for row in ("off", "flip")]


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of four cells in an empty working directory; they are run in this process."""
    grids.in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return grids.write(tmp_path)


def results(cell: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("out", cell, "results.json").read_text())
    return found


def stamps() -> dict[str, int]:
    return {cell: Path("out", cell, "results.json").stat().st_mtime_ns for cell in CELLS}


def test_one_command_and_one_table(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "report.tables": {
            "Scores": {
                "rows": ["row"],
                "figures": ["selected step", "over images"],
                "versus": {"row": "off"},
            }
        }
    }
    grids.write(grid.parent, changes)
    assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if " | " in line]
    assert len(lines) == 4
    assert re.fullmatch(
        r"off, seed 0: done in 0 min \d\d s \| 1 done, 0 running, 0 failed, 3 waiting.*", lines[0]
    )
    for cell in CELLS:
        assert {"config.yaml", "results.json", "cell.json"} <= set(os.listdir(Path("out", cell)))
    scores = {
        row: [results(f"{row}/seed_{s}")["scores"]["best"]["test"]["jaccard"] for s in (0, 1)]
        for row in ("off", "flip")
    }
    text = Path("out/table.md").read_text()
    assert text in said.out
    for row, (a, b) in scores.items():
        mean, deviation = (a + b) / 2, abs(a - b) / 2**0.5
        assert f"| {row} | 2 | {mean:.3f} ± {deviation:.3f} |" in text
    differences = [a - b for a, b in zip(scores["off"], scores["flip"], strict=True)]
    shown = f"{statistics.fmean(differences):+.3f} ± {statistics.stdev(differences):.3f}"
    assert f"| flip | 2 | {shown} | {sum(d > 0 for d in differences)} of 2 |" in text
    with Path("out/table.csv").open() as file:
        rows = {(r["row"], r["figure"]): r for r in csv.DictReader(file)}
    assert float(rows["off", "selected step"]["mean"]) == pytest.approx(
        statistics.fmean(scores["off"]), rel=1e-15
    )
    less = rows["flip", "off minus this: selected step"]
    assert float(less["low"]) == pytest.approx(min(differences), abs=1e-15)
    assert float(less["high"]) == pytest.approx(max(differences), abs=1e-15)
    with Path("out/cells.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    for kind in ("png", "svg"):
        assert Path(f"out/selected_step.{kind}").stat().st_size > 1000


def test_it_goes_on_where_it_was(grid: Path) -> None:
    assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    kept, text = stamps(), Path("out/table.md").read_text()
    path = Path("out/flip/seed_1/results.json")
    before = json.loads(path.read_text())
    path.unlink()
    assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    now = stamps()
    assert {c for c in CELLS if now[c] != kept[c]} == {"flip/seed_1"}
    assert json.loads(path.read_text())["scores"] == before["scores"]
    assert "Resuming after step 2" in Path("out/logs/flip_1.log").read_text()
    scores = [line for line in text.splitlines() if line.startswith("| off")]
    assert scores == [x for x in Path("out/table.md").read_text().splitlines() if x in scores]


def test_a_cell_is_an_ordinary_run(grid: Path) -> None:
    """The same run by its own command gives the same figures."""
    assert sweep.main(["grid.yaml", "--out", "out", "--only", "row=flip", "--seeds", "1"]) == 0
    assert run.main(["tiny.yaml", "seed=1", "augmentation=flip", "--out", "alone"]) == 0
    alone = json.loads(Path("alone/results.json").read_text())
    assert results("flip/seed_1")["scores"] == alone["scores"]
    assert Path("alone/config.yaml").read_text() == Path("out/flip/seed_1/config.yaml").read_text()


def test_shards_make_the_same_table(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["grid.yaml", "--out", "whole"]) == 0
    assert sweep.main(["grid.yaml", "--out", "out", "--shard", "0/2"]) == 0
    assert not Path("out/table.md").exists()
    assert sum(Path("out", cell, "results.json").exists() for cell in CELLS) == 2
    assert sweep.main(["grid.yaml", "--out", "out", "--shard", "1/2"]) == 0
    capsys.readouterr()

    def rows(out: str) -> list[str]:
        text = Path(out, "cells.csv").read_text().splitlines()
        return [re.sub(r",[\d.]+$", "", line) for line in text]  # the seconds

    assert rows("out") == rows("whole")


def test_a_failing_cell_stops_no_other(
    grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "axes.row.off.takes": {"engine.iterations": "steps"},
        "dependencies.steps": {"cell": {"row": "flip"}, "result": "steps"},
    }
    grids.write(grid.parent, changes)
    step = Engine.train_step

    def failing(self: Engine) -> Any:
        directory = self.recorder.directory
        assert directory is not None
        if directory.parts[-2:] == ("flip", "seed_0"):
            raise OSError("no such luck")
        return step(self)

    monkeypatch.setattr(Engine, "train_step", failing)
    assert sweep.main(["grid.yaml", "--out", "out"]) == 1
    said = capsys.readouterr()
    failures = [line for line in said.err.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 2
    assert "flip, seed 0: OSError: no such luck" in failures[0]
    assert "left out: what it builds on, flip, seed 0, has failed" in failures[1]
    assert "2 of 4 cells have finished" in Path("out/table.md").read_text()
    assert results("off/seed_1")["steps"] == results("flip/seed_1")["steps"]
    monkeypatch.setattr(Engine, "train_step", step)
    assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    assert len(stamps()) == 4


def test_strict_stops_at_the_first(
    grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "train_step", lambda self: 1 / 0)
    assert sweep.main(["grid.yaml", "--out", "out", "--strict"]) == 1
    assert capsys.readouterr().err.count("failed: ZeroDivisionError") == 1
    assert not Path("out/flip").exists()


class TestWhatDoesNotBelong:
    def test_other_settings(self, grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep.main(["grid.yaml", "--out", "out", "--only", "row=off"]) == 0
        capsys.readouterr()
        for more in ([], ["--table"]):
            assert sweep.main(["grid.yaml", "--out", "out", "engine.iterations=3", *more]) == 2
            said = capsys.readouterr().err
            assert "off/seed_0/config.yaml: engine.iterations is not what this grid asks" in said
            assert "(command line)" in said

    def test_other_images(self, grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep.main(["grid.yaml", "--out", "out", "--seeds", "0"]) == 0
        path = Path("out/flip/seed_0/results.json")
        whole = path.read_text()
        for old, new, said in (
            ('"synthetic"', '"real"', "differ in provenance: real, synthetic"),
            ('"split_hash": "', '"split_hash": "x', "split_hash is not that of out/off/seed_0"),
        ):
            path.write_text(whole.replace(old, new))
            assert sweep.main(["grid.yaml", "--out", "out", "--table", "--seeds", "0"]) == 2
            assert said in capsys.readouterr().err

    def test_stand_ins_of_another_data_set_are_said(self, grid: Path) -> None:
        """Where some data sets are at hand and others aren't, the heading says which."""
        grids.write(grid.parent, {"axes.data": {"here": {}, "elsewhere": {}}})
        given = ["grid.yaml", "--out", "out", "--seeds", "0", "--only", "row=off"]
        assert sweep.main(given) == 0
        for path in Path("out/off/elsewhere").glob("*/results.json"):
            found = json.loads(path.read_text())
            path.write_text(json.dumps({**found, "data": "other", "provenance": "real"}))
        assert sweep.main([*given, "--table"]) == 0
        heading = Path("out/table.md").read_text().splitlines()[0]
        assert "other (real images), synthetic_lesions (synthetic images)" in heading

    def test_what_a_row_took_was_made_anew(
        self, grid: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        changes = {
            "axes.row.flip.takes": {"engine.iterations": "steps", "data.root": "weights"},
            "dependencies.steps": {"cell": {"row": "off"}, "result": "steps"},
            "dependencies.weights": {"cell": {"row": "off"}, "file": "checkpoints/best.pt"},
            "require": {"stopped_early": False},
        }
        grids.write(grid.parent, changes)
        given = ["grid.yaml", "--out", "out", "--seeds", "0"]
        assert sweep.main(given) == 0
        path = Path("out/off/seed_0/results.json")
        found = json.loads(path.read_text())
        capsys.readouterr()

        def said() -> str:
            for more in ([], ["--table"]):
                assert sweep.main([*given, *more]) == 2
            return capsys.readouterr().err

        path.write_text(json.dumps(found | {"steps": 7}))
        assert "flip/seed_0: engine.iterations is 2, off, seed 0 has 7 by now; remove it" in said()
        path.write_text(json.dumps(found | {"stopped_early": True}))
        assert "off/seed_0: stopped_early is true, the grid requires false; remove it" in said()
        path.write_text(json.dumps(found))
        Path("out/off/seed_0/checkpoints/best.pt").write_bytes(b"other")
        assert "off, seed 0 has another checkpoints/best.pt by now" in said()

    def test_a_directory_of_other_things(
        self, grid: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("out").mkdir()
        Path("out/table.md").write_text("mine")
        assert sweep.main(["grid.yaml", "--out", "out"]) == 2
        assert "--out: out holds table.md and no run of this grid" in capsys.readouterr().err
        assert os.listdir("out") == ["table.md"]
        assert Path("out/table.md").read_text() == "mine"

    def test_damaged_results(self, grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep.main(["grid.yaml", "--out", "out", "--seeds", "0"]) == 0
        Path("out/off/seed_0/results.json").write_text('{"a": ')
        assert sweep.main(["grid.yaml", "--out", "out", "--seeds", "0"]) == 2
        assert "off/seed_0/results.json: can't be read" in capsys.readouterr().err


def test_what_another_process_is_at_is_waited_for(
    grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells are shared out: what is claimed comes last, and is found done."""
    assert sweep.main(["grid.yaml", "--out", "out", "--seeds", "0"]) == 0
    path = Path("out/off/seed_0/results.json")
    whole = path.read_text()
    path.unlink()
    bring, begun = run.bring_to_end, []

    def bring_to_end(directory: Path, tree: Any = None) -> None:
        begun.append(directory.parent.name)
        bring(directory, tree)
        if len(begun) == 2:  # meanwhile the other one has ended
            path.write_text(whole)

    monkeypatch.setattr(running, "bring_to_end", bring_to_end)
    monkeypatch.setattr("mlseg.workers.sharing._RETRY", 0.1)
    with claimed(path.parent, path.parent.parent):
        assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    assert begun == ["off", "flip"], "of seed 1"
    assert "off, seed 0: kept | 4 done" in capsys.readouterr().err


# ---------------------------------------------------------------------- in processes of their own


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts a sweep of cells that train until they are told to end."""
    monkeypatch.chdir(tmp_path)
    long = {"engine.iterations": 1_000_000, "engine.validate_every": 1_000_000}
    grids.write(tmp_path, more={**long, "engine.checkpoint_every": 20})
    begun: list[children.Child] = []

    def start(*arguments: str) -> children.Child:
        begun.append(
            children.Child(
                ["grid.yaml", "--out", "out", *arguments],
                tmp_path / f"said_{len(begun)}",
                command=sweep.main,
            )
        )
        return begun[-1]

    yield start
    for child in begun:
        child.kill()


def at_work() -> dict[str, int]:
    """Processes that hold a cell and train, by cell."""
    found = {}
    for cell in CELLS:
        holder = Path("out", cell, ".holder")
        metrics = Path("out", cell, "metrics.jsonl")
        if holder.exists() and metrics.exists() and metrics.stat().st_size:
            words = holder.read_text().split()
            if len(words) > 1:
                found[cell] = int(words[1])
    return found


@pytest.mark.slow
def test_two_callers_a_killed_cell_ctrl_c_and_a_killed_caller(slow: Callable[..., Any]) -> None:
    """Each cell has one process; nothing is lost, and nobody left behind."""
    one, two = slow(), slow()
    wait_until(lambda: len(at_work()) == 2)
    held = at_work()
    assert len(set(held.values())) == 2
    cell, pid = next(iter(held.items()))
    wait_until(lambda: Path("out", cell, "checkpoints", "last.pt").exists())
    os.kill(pid, signal.SIGKILL)  # it is taken up again at once, by the one who had begun it
    log = Path("out/logs", cell.replace("/seed", "") + ".log")
    wait_until(lambda: "Resuming after step" in log.read_text())
    wait_until(lambda: at_work().get(cell, pid) != pid)
    assert at_work().keys() == held.keys()
    assert one.poll() is None
    assert two.poll() is None
    held = at_work()
    one.kill(signal.SIGINT)
    assert one.wait() == 130
    assert one.lines()[-1] == "stopped: 0 of 4 cells are done; the same command goes on"
    two.kill(signal.SIGKILL)
    two.wait()
    wait_until(lambda: not any(map(alive, held.values())))
    logs = {name: Path("out/logs", name.replace("/seed", "") + ".log") for name in held}
    saved = {
        name: int(re.findall(r"SIGTERM: stopped and saved after step (\d+)", log.read_text())[-1])
        for name, log in logs.items()
    }
    three = slow("--jobs", "2")
    for name, step in saved.items():
        resumed = f"Resuming after step {step}\n"
        wait_until(lambda log=logs[name], line=resumed: line in log.read_text())  # type: ignore[misc]
    assert at_work().keys() == held.keys()
    assert not set(at_work().values()) & set(held.values())
    three.kill(signal.SIGINT)
    assert three.wait() == 130
    for name, step in saved.items():
        lines = Path("out", name, "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(set(steps)), "no line is lost, and none twice"
        assert steps[-1] > step - 20
