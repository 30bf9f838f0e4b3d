"""What the page of a run shows of SegAN."""

import json
from pathlib import Path

import tiny

from mlseg import run
from mlseg.problems.reporting import Chart
from mlseg.problems.segan.reporting import annealed_k
from mlseg.reports.reading import read_run


def test_k_is_logged_and_shown_as_it_is_annealed(tmp_path: Path) -> None:
    changes = {
        "segmentor": {"name": "segan", "channels": 4, "levels": 2},
        "logistic": {"decay": 0.5, "every": 1, "floor": 0.2},
        "engine.iterations": 9,
    }
    config, out = tiny.write_config(tmp_path / "tiny.yaml", "segan", changes), tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [line["k"] for line in lines if line["problem"] == "segmentor"]
    assert sorted(found, reverse=True) == found
    assert {1.0, 0.5, 0.25} <= set(found) <= {1.0, 0.5, 0.25, float.fromhex("0x1.99999ap-3")}
    (chart,) = annealed_k(read_run(out).recorded)
    assert isinstance(chart, Chart)
    assert chart.lines["k"].values == found
    assert "segan: k" in (out / "report.html").read_text()


def test_a_network_without_k_has_none(tmp_path: Path) -> None:
    changes = {"segmentor": {"name": "unet", "channels": 4, "levels": 2}}
    config, out = tiny.write_config(tmp_path / "tiny.yaml", "segan", changes), tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    assert annealed_k(read_run(out).recorded) == []
