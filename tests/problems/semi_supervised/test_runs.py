"""Whole runs: by the command, on files whose masks are spoilt or gone, and on real images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from resuming import check
from tiny_files import half_mask, write_image

from mlseg import checkpoint, run
from mlseg.config import load
from mlseg.engines.segmentation import Segmentation
from mlseg.problems.systems import parse_run
from mlseg.segmentation.data import DataSettings, load_data

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[3] / "configs"
DCT: dict[str, Any] = {"method": "dct", "partner": {"name": "unet", "channels": 4, "levels": 2}}
METHODS: dict[str, dict[str, Any]] = {"ctbct": {}, "dct": DCT}


def settings(name: str) -> Any:
    return parse_run(load(CONFIGS / f"{name}.yaml"))[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_run_is_the_same_whatever_the_masks_are(method: str, tmp_path: Path) -> None:
    """Bit for bit, with masks, with random ones and with none."""
    own = tmp_path / "own"
    for number in range(12):
        write_image(own / "images" / f"p{number:02d}.png", 20 * number, "RGB")
        write_image(own / "masks" / f"p{number:02d}.png", half_mask())
    data = {"name": "folder", "root": str(own), "image_size": 32, "unlabelled": 4}
    data |= {"train": 3, "val": 2, "test": 2}
    found = load_data(DataSettings.model_validate(data)).unlabelled
    assert found is not None
    config = tiny.write_config(
        tmp_path / "c.yaml", "semi_supervised", {**METHODS[method], "data": data}
    )
    ends = []
    for name in ("masks", "random", "none"):
        for id in found.ids:
            path = own / "masks" / f"{id}.png"
            if name == "random":
                draw = torch.Generator().manual_seed(1)
                write_image(path, torch.randint(0, 256, (10, 12), generator=draw).byte().numpy())
            elif name == "none":
                path.unlink()
        out = tmp_path / name
        assert run.main([str(config), "--out", str(out)]) == 0
        state = checkpoint.load(out / "checkpoints" / "last.pt")["problems"]
        ends.append((state, tiny.untimed((out / "metrics.jsonl").read_text())))
    assert tiny.same(ends[0], ends[1])
    assert tiny.same(ends[0], ends[2])


def test_more_than_there_are_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "c.yaml", "semi_supervised", {"data.unlabelled": 10_000})
    assert run.main([str(config), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "data.unlabelled: 10000 images are asked for" in line
    assert "set it to 9987 at most" in line
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_real_images(method: str, real: Callable[[str], Path], tmp_path: Path) -> None:
    """Interrupted or not."""
    data = {"name": "isic2018", "root": str(real("isic2018")), "image_size": 32}
    data |= {"train": 6, "val": 2, "test": 2, "unlabelled": 10}
    changes = {**METHODS[method], "data": data}
    engine = tiny.build("semi_supervised", changes)
    assert engine.hook(Segmentation).data.provenance == "real"
    check(lambda out: tiny.build("semi_supervised", changes, out), tmp_path, [1, 3], "saved")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["isic", "jsrt"])
def test_the_rows_differ_from_the_others_in_the_method_alone(method: str, where: str) -> None:
    """The same images with masks, segmentor, optimizer, schedule, steps and selection."""
    mine, theirs = settings(f"{method}_{where}"), settings(f"supervised_{where}")
    for part in ("segmentor", "engine", "seed", "precision"):
        assert getattr(mine, part) == getattr(theirs, part), part
    assert mine.data == theirs.data.model_copy(update={"unlabelled": mine.data.unlabelled})
    assert mine.problems.segmentor == theirs.problems.segmentor
    assert mine.partner == (
        mine.segmentor if method == "dct" else type(mine.partner)(name="swin_unet")
    )
    assert mine.data.unlabelled == {"isic": 1000, "jsrt": 247 - 72 - 35}[where]


def test_the_methods_own_recipes() -> None:
    """The specification's, from the methods' public code."""
    ctbct, dct = settings("ctbct_isic_code"), settings("dct_isic_code")
    assert (ctbct.engine.iterations, dct.engine.iterations) == (30000, 120 * 200)
    for level in (ctbct.problems.segmentor, ctbct.problems.partner):
        optimizer = level.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.01, 0.9)
        assert optimizer.weight_decay == 1e-4
        assert level.batch_size == ctbct.unlabelled_batch_size == 8
        made, scheduler = level.build([torch.nn.Parameter(torch.zeros(1))], "max")
        assert scheduler is not None
        for _ in range(15000):
            made.step()
            scheduler.step()
        assert made.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**0.9, rel=1e-6)
    for level in (dct.problems.segmentor, dct.problems.partner):
        assert (level.optimizer.name, level.optimizer.lr) == ("adam", 1e-3)
        assert level.scheduler.milestones == [30 * 200, 60 * 200, 90 * 200]
        assert level.batch_size == dct.unlabelled_batch_size == 4
