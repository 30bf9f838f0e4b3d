"""The paper's grids at a size that trains in a second: tables 5 and 7, rows to compare with."""

import json
from pathlib import Path
from typing import Any

import grids
import pytest
import tiny
import yaml

from mlseg import sweep

pytestmark = pytest.mark.slow  # trains for seconds

TABLES = Path(__file__).parents[3] / "configs" / "tables"
QUICK = {
    "pretraining": {"weighted_epochs": 0, "epochs": 1},
    "lookahead": {"cycles": 1, "patience": 2, "beta_l": 0.5},
    "discriminator_training.max_epochs": 1,
    "pictures": 1,
}


def write(folder: Path, name: str, **changes: Any) -> list[str]:
    """A committed grid over a tiny config, one seed; the command for it."""
    tiny.write_config(folder / "tiny.yaml", "load", QUICK)
    grid = {"base": str(TABLES / f"{name}.yaml"), **changes}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return ["grid.yaml", "--out", "out", "--seeds", "0"]


def results(row: str) -> dict[str, Any]:
    path = Path("out") / row / "seed_0" / "results.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_table_7_and_rows_to_compare_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids.in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = write(
        tmp_path,
        "load_ablations",
        configs={"load": "tiny.yaml"},
        axes={"row": {"MobileNetV2": None}},
        report={"tables": {"Table 6, backbones": None}},
    )
    rows = ["default", "buffer_size 4", "label maps alone", "descent-ascent, hybrid"]
    only = [part for row in rows for part in ("--only", f"row={row}")]
    assert sweep.main([*command, *only]) == 0
    start = results("default")["models"]["start"]
    assert all(results(row)["models"]["start"] == start for row in rows), "one stage 1"
    assert results(rows[-1])["updates"] == results("default")["updates"]
    text = Path("out/table.md").read_text()
    table = text.partition("## Table 7, hyperparameters, val")[2].partition("##")[0]
    assert "| row | seeds | beta_l % | beta_u % | Gamma | B_max | start | final |" in table
    assert "| buffer_size 4 | 1 | 50.0 | 0.1 | 2 | 4 |" in table
    assert "| default | 1 | 50.0 | 0.1 | 2 | 3 |" in table
    table = text.partition("## Discriminators")[2].partition("##")[0]
    assert "| row | seeds | val, start | val, final | test, start | test, final |" in table
    assert "| label maps alone | 1 |" in table


def test_table_5_begins_with_the_body_of_a_model_of_other_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids.in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    tiny.write_config(tmp_path / "other.yaml", "load", {**QUICK, "data.name": "synthetic_lesions"})
    segmentor = tiny.values("load")["segmentor"]
    command = write(
        tmp_path,
        "load_stanford",
        configs={"load": "tiny.yaml", "body": "other.yaml"},
        axes={"row": {"body": {"overrides": {"segmentor": segmentor}}}},
    )
    assert sweep.main(command) == 0
    begun = results("default")["started_from"]["segmentor"]
    assert begun["new"], "a head for its own classes"
    assert begun["loaded"] == begun["tensors"] - len(begun["new"])
    assert all(name.startswith("head") for name in begun["new"])
    assert results("control")["models"]["start"] == results("default")["models"]["start"]
    assert not results("control").get("started_from")
    text = Path("out/table.md").read_text()
    assert "| body |" not in text
    assert "## default: IoU by class, test, per cent, by gain" in text
