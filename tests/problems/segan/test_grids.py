"""The paper's grids at a size that trains in a second: table 1, figure 2, floors of k."""

import json
from pathlib import Path
from typing import Any

import grids
import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from mlseg import sweep
from mlseg.config import load
from mlseg.evaluate import own_data
from mlseg.problems.systems import parse_run
from mlseg.segmentation.data import to_float
from mlseg.segmentation.pictures import GAP, colour, enlarged
from mlseg.segmentation.trained import load_runs

CONFIGS = Path(__file__).parents[3] / "configs"
TABLES = CONFIGS / "tables"
QUICK = {"engine.iterations": 2, "engine.validate_every": 1, "logistic.every": 1}
ROWS = ("sigmoid", "conventional_gan", "no_pixel_level")


def grid(folder: Path, name: str, **changes: Any) -> Path:
    """A committed grid over tiny configs."""
    tiny.write_config(folder / "segan.yaml", "segan", QUICK)
    own = {key: value for key, value in QUICK.items() if key.startswith("engine")}
    segmentor = tiny.values("segan")["segmentor"]
    alone = {**own, "segmentor": segmentor}
    tiny.write_config(folder / "supervised.yaml", "supervised", alone)
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": str(TABLES / f"{name}.yaml"), **changes}))
    return path


@pytest.mark.slow
def test_table_1_and_figure_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids.in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    axes = {"row": {"cross_entropy": None, "dice": None}}
    configs = {"segan": "segan.yaml", "supervised": "supervised.yaml"}
    grid(tmp_path, "segan_isic_small", configs=configs, axes=axes, same=[])
    assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    text = Path("out/table.md").read_text()
    own = text.partition("## Table 1, single networks")[2].partition("##")[0]
    assert "| row | seeds | jaccard | dice | accuracy |" in own
    assert "| segan | 3 |" in own
    assert not any(f"| {row} |" in own for row in ROWS)
    together = text.partition("## Table 1, the ensemble, as configured, test")[2].partition("##")[0]
    assert "| row | runs | accuracy | jaccard | dice |" in together
    assert "![Figure 2](figure_2.png)" in text
    everything = text.partition("## At the config's threshold")[2].partition("##")[0]
    assert all(f"| {row} | 3 |" in everything for row in ("segan", *ROWS))
    # The independent answer: the mean of three networks' probabilities, cut at the threshold.
    runs = [Path("out/segan") / f"seed_{seed}" for seed in (0, 1, 2)]
    members = [load_runs([run], torch.device("cpu")).first for run in runs]
    samples = own_data(runs).test
    with torch.no_grad():
        x = to_float(samples.images)
        mean = torch.stack([member.probabilities(x)[:, 1] for member in members]).mean(0)
    maps = (mean > 0.4).to(torch.uint8).numpy()
    picture = np.asarray(Image.open("out/figure_2.png"))
    side = enlarged(maps[0]).shape[0]
    left = GAP + 2 * (side + GAP)
    panels = [
        picture[top : top + side, left : left + side] for top in range(picture.shape[0] - side)
    ]
    for labels in maps:
        wanted = colour(enlarged(labels), samples.spec.palette)
        assert any(np.array_equal(panel, wanted) for panel in panels)


@pytest.mark.slow
def test_the_search_over_floors_is_a_grid_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids.in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    axes = {"floor": {"0.7": None, "0.5": None, "0.4": None, "0.25": None}}
    grid(tmp_path, "segan_floors_small", configs={"segan": "segan.yaml"}, axes=axes, seeds=[0])
    assert sweep.main(["grid.yaml", "--out", "out"]) == 0
    text = Path("out/table.md").read_text()
    own = text.partition("## Floor and threshold chosen on validation images")[2].partition("##")[0]
    body = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 0.3 |"))]
    on_validation = {line.split("|")[1].strip(): float(line.split("|")[3]) for line in body[:2]}
    best = max(on_validation, key=lambda floor: on_validation[floor])
    assert f"Chosen on validation images: floor {best}." in text
    chosen = json.loads((Path("out") / best / "seed_0" / "results.json").read_text())
    assert chosen["scores"]["best"].keys() >= {"val", "test"}
    assert "| jaccard | 1 |" in own
    assert Path("out/jaccard_over_the_floor.png").exists()


@pytest.mark.parametrize("name", ["segan_floors", "segan_floors_small"])
def test_every_floor_is_reached(name: str) -> None:
    """In the epochs of the config that the grid is over."""
    own = load(TABLES / f"{name}.yaml").values
    settings: Any = parse_run(load(TABLES / own["configs"]["segan"]))[0]
    batches = settings.data.train // settings.problems.critic.batch_size
    epochs = settings.engine.iterations // batches
    for value in own["axes"]["floor"].values():
        floor = value["overrides"]["logistic.floor"]
        at_the_end = settings.logistic.decay ** (epochs // settings.logistic.every)
        assert at_the_end <= floor
