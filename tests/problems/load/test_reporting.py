"""The grid of LoAd's rows: a stage 1 for all, controls, tables of cycles and classes."""

import json
import statistics
from pathlib import Path
from typing import Any

import grids
import pytest
import tiny
import yaml

from mlseg import sweep
from mlseg.problems.load.reporting import classes, cycles
from mlseg.problems.reporting import FinishedRun

GRID: dict[str, Any] = {
    "base": str(Path(__file__).parents[3] / "configs" / "tables" / "load_voc_small.yaml"),
    "configs": {"load": "tiny.yaml"},
    "axes": {"row": {"load": {"overrides": {"lookahead.beta_l": 0.5}}, "control_20": None}},
    "overrides": {
        "pretraining.weighted_epochs": 0,
        "lookahead.patience": 2,
        "discriminator_training.max_epochs": 1,
    },
    "seeds": [0, 1],
}


@pytest.mark.slow
def test_a_stage_1_for_all_and_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grids.in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    tiny.write_config(tmp_path / "tiny.yaml", "load", {"lookahead.cycles": 1})
    grid = yaml.safe_load(yaml.safe_dump(GRID))
    grid["axes"]["row"]["load_20"] = {"overrides": {"lookahead.cycles": 1}}
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    found: dict[str, list[dict[str, Any]]] = {
        name: [
            json.loads(Path("out", name, f"seed_{n}", "results.json").read_text()) for n in (0, 1)
        ]
        for name in ("load", "load_20", "control")
    }
    for seed in (0, 1):
        starts = [found[name][seed]["scores"]["start"] for name in found]
        assert starts[0] == starts[1] == starts[2], "stage 1 is trained once"
        assert found["control"][seed]["updates"] == found["load"][seed]["updates"]
        assert found["load"][seed]["seed"] == seed
    text = Path("out/table.md").read_text()
    assert "synthetic images" in text.splitlines()[0]
    test = text.partition("## mIoU in per cent, test")[2].partition("##")[0]
    for name, results in found.items():
        start, best = (
            [100 * r["scores"][which]["test"]["miou"] for r in results]
            for which in ("start", "best")
        )
        gain = [b - a for a, b in zip(start, best, strict=True)]
        cells = [f"{statistics.fmean(v):.2f} ± {statistics.stdev(v):.2f}" for v in (start, best)]
        signed = f"{statistics.fmean(gain):+.2f} ± {statistics.stdev(gain):.2f}"
        assert f"| {name} | 2 | {' | '.join(cells)} | {signed} |" in test
    shown = text.partition("## Cycles")[2].partition("##")[0].splitlines()
    rows = [line for line in shown if line.startswith(("| load |", "| load_20 |"))]
    assert len(rows) == 4, "a control has no cycles"
    lengths = [line.split("|")[5].strip() for line in rows if line.startswith("| load |")]
    assert lengths == [str(r["updates"]) for r in found["load"]], "one cycle"
    assert "## load: IoU by class, test, per cent, by gain" in text
    capsys.readouterr()
    # What engine.iterations has cut off is no row.
    path = Path("out/load/seed_0/results.json")
    path.write_text(json.dumps(found["load"][0] | {"stopped_early": False}))
    assert sweep.main(["grid.yaml", "--out", "out", "--table"]) == 2
    assert "load/seed_0: stopped_early is false, the grid requires true" in capsys.readouterr().err


def test_cycles_and_classes_of_records(tmp_path: Path) -> None:
    """From the files of a run alone, such as older ones have left."""
    ends = [(4, "divergence", None), (7, "patience", 0.5), (12, "divergence", None)]
    events = [
        {"event": "cycle_end", "step": 0, "cycle": i + 1, "update": u, "reason": r, "peak": p}
        for i, (u, r, p) in enumerate(ends)
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    change = {"classes": {"car": [0.5, 0.25], "road": [0.25, 0.5]}, "miou": [0.375, 0.375]}
    (tmp_path / "classes.json").write_text(json.dumps({"val": change, "test": change}))
    run = FinishedRun(tmp_path, 3, {}, {})
    (block,) = cycles({"load": [run]})
    assert block.rows == [["load", "3", "3", "2", "4", "3 to 5, median 4", "2"]]
    (block,) = classes({"load": [run]})
    assert block.title == "load: IoU by class, test, per cent, by gain"
    assert block.rows == [["road", "25.00", "50.00", "+25.00"], ["car", "50.00", "25.00", "-25.00"]]
