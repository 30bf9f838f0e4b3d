"""What the page of a run shows of LoAd."""

import json
from pathlib import Path

import tiny

from mlseg import run
from mlseg.problems.load.reporting import changed_classes, convergence
from mlseg.problems.reporting import Block, Chart
from mlseg.reports.reading import read_run


def test_convergence_and_classes_are_on_the_page(tmp_path: Path) -> None:
    config, out = tiny.write_config(tmp_path / "tiny.yaml", "load"), tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    recorded = read_run(out).recorded
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    chart, *rest = convergence(recorded)
    assert isinstance(chart, Chart)
    (line,) = chart.lines.values()
    mious = [100 * e["miou"] for e in events if e["event"] in ("start", "update")]
    assert line.values == mious
    ends = [e for e in events if e["event"] == "cycle_end"]
    (cycles,) = [piece for piece in rest if isinstance(piece, Block)]
    assert [row[0] for row in cycles.rows] == [str(e["cycle"]) for e in ends]
    changes = json.loads((out / "classes.json").read_text())
    tables = {str(piece.title): piece for piece in changed_classes(recorded)}
    assert len(tables) == len(changes)
    page = (out / "report.html").read_text()
    for title in (*tables, "Convergence"):
        assert title in page


def test_other_runs_have_neither(tmp_path: Path) -> None:
    config, out = tiny.write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    recorded = read_run(out).recorded
    assert convergence(recorded) == changed_classes(recorded) == []
