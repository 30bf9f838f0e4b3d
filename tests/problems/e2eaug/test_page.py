"""What the page of a run shows of E2EAug."""

import json
from pathlib import Path

import tiny

from mlseg import run
from mlseg.problems.e2eaug.reporting import architecture, pairs
from mlseg.problems.reporting import Block, Chart, Picture
from mlseg.reports.reading import read_run


def test_pairs_and_alphas_are_on_the_page(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug", {"engine.samples": 1})
    out = tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    recorded = read_run(out).recorded
    shown = pairs(recorded)
    files = sorted((out / "samples").glob("synthetic_*.png"))
    assert [p.path for p in shown if isinstance(p, Picture)][:: len(shown) - 1 or 1] == (
        [files[0], files[-1]] if len(files) > 1 else files
    )
    record = json.loads((out / "architecture.json").read_text())
    table, _, *charts = architecture(recorded)
    assert isinstance(table, Block)
    assert [row[0] for row in table.rows] == record["cells"]
    assert [row[-1] for row in table.rows] == record["choice"]
    assert len(charts) == 1 + len(record["cells"])
    for cell, chart in enumerate(charts[1:]):
        assert isinstance(chart, Chart)
        for index, line in enumerate(chart.lines.values()):
            assert line.values == [entry["weights"][cell][index] for entry in record["history"]]
    page = (out / "report.html").read_text()
    assert f"Synthetic pairs at step {int(files[-1].stem[-6:])}" in page
    assert all(f"Selection weights of {name}" in page for name in record["cells"])


def test_other_runs_have_neither(tmp_path: Path) -> None:
    config, out = tiny.write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    recorded = read_run(out).recorded
    assert pairs(recorded) == []
    assert architecture(recorded) == []
    assert "e2eaug" not in (out / "report.html").read_text()
