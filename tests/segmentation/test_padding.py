"""Runs on padded images, by command: scores, predictions, calibration, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commanding import one_line
from PIL import Image
from tiny_files import write_image

from mlseg import calibrate, checkpoint, evaluate, predict, run
from mlseg.config import load
from mlseg.problems.systems import parse_run
from mlseg.segmentation.data import BatchLoader, load_data, to_float
from mlseg.segmentation.losses import LossSettings, build_loss
from mlseg.segmentation.nets import class_probabilities
from mlseg.segmentation.scoring import predict_logits, score
from mlseg.segmentation.trained import load_runs, load_trained

pytestmark = pytest.mark.slow  # trains for seconds

CPU = torch.device("cpu")
IGNORED = 9
SHAPES = [(20, 32), (32, 32), (64, 30), (11, 17), (40, 90), (29, 8)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright squares on noise, in images of many shapes; their edges are ignored."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for number in range(12):
        height, width = SHAPES[number % len(SHAPES)]
        image = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
        image[height // 4 : height // 2, width // 4 : width // 2] += 120
        write_image(folder / "images" / f"{number:02d}.png", image)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 4 : width // 2] = 1
        mask[height // 2] = IGNORED
        write_image(folder / "masks" / f"{number:02d}.png", mask)
    return folder


def train(folder: Path, out: Path, **changes: Any) -> Path:
    data = {
        "data.name": "folder",
        "data.root": str(folder),
        "data.ignore_index": IGNORED,
        "data.train": 5,
        "data.test": 3,
        "data.fit": "pad",
        "engine.iterations": 8,
    }
    config = tiny.write_config(out.with_suffix(".yaml"), changes=data | changes)
    assert run.main([str(config), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def padded(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on windows of padded images."""
    out = tmp_path_factory.mktemp("runs") / "padded"
    return train(own, out, augmentation={"window": 16, "flip_horizontal": 0.5})


@pytest.mark.parametrize("scale", ["native", "trained"])
def test_evaluate_gives_what_the_run_gave(
    scale: str, own: Path, padded: Path, tmp_path: Path
) -> None:
    out = padded if scale == "native" else train(own, tmp_path / "r", **{"engine.scoring": scale})
    reported = json.loads((out / "results.json").read_text())["scores"]["best"]["test"]
    own_data = ["--data", "folder", "--root", str(own)]
    figures = []
    for number, arguments in enumerate(([], own_data)):
        scores = tmp_path / f"{number}.json"
        assert evaluate.main([str(out), *arguments, "--out", str(scores)]) == 0
        (found,) = json.loads(scores.read_text())["scores"].values()
        figures.append(found)
    test, whole = (found.pop("per_image") for found in figures)
    assert figures[0] == reported
    assert len(test) == 3
    assert len(whole) == 12
    assert {name: whole[name] for name in test} == test


def test_predict_pads_a_photograph(padded: Path, tmp_path: Path) -> None:
    """As if padded by hand, passed through the network in windows and cut out again."""
    rng = np.random.default_rng(1)
    places = {"small": ((13, 22), (13, 22)), "tall": ((80, 50), (32, 20))}
    for name, (native, _) in places.items():
        pixels = rng.integers(0, 256, (*native, 3), dtype=np.uint8)
        write_image(tmp_path / "photos" / f"{name}.png", pixels)
    masks = tmp_path / "masks"
    assert predict.main([str(padded), str(tmp_path / "photos"), "--out", str(masks)]) == 0
    trained = load_trained(padded, CPU)
    assert (trained.fit, trained.window) == ("pad", (16, 16))
    for name, (native, (height, width)) in places.items():
        photo: Image.Image = Image.open(tmp_path / "photos" / f"{name}.png")
        if native != (height, width):
            photo = photo.resize((width, height), Image.Resampling.BILINEAR)
        array = np.full((32, 32, 3), 128, np.uint8)
        array[:height, :width] = np.asarray(photo)
        with torch.no_grad():
            image = to_float(torch.from_numpy(array.transpose(2, 0, 1).copy())[None])
            logits = predict_logits(trained.module, image, (16, 16))
        crop = class_probabilities(trained.module, logits)[:, :, :height, :width]
        crop = torch.nn.functional.interpolate(crop, native, mode="bilinear")
        found = np.asarray(Image.open(masks / f"{name}.png"))
        assert np.array_equal(found > 0, (crop[0, 1] > trained.threshold).numpy())


def test_calibration_counts_as_scoring_does(own: Path, tmp_path: Path) -> None:
    out = train(own, tmp_path / "run", **{"data.val": 5, "data.test": 2})
    settings: Any = parse_run(load(out / "config.yaml"))[0]
    samples, ensemble = load_data(settings.data).val, load_runs([out], CPU)
    for native in (True, False):
        grid = calibrate.by_image(
            ensemble, samples, CPU, [0.4], [0.3, 0.6], native, "accuracy"
        ).mean(2)
        for column, threshold in enumerate((0.3, 0.6)):
            chosen = ensemble.with_choice(0.4, threshold)
            figures = score(chosen, samples, CPU, threshold=threshold, native=native).compute()
            assert float(grid[0, column]) == pytest.approx(figures["accuracy"])


def test_an_ensemble_has_one_fit(
    own: Path, padded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train(own, tmp_path / "stretched", **{"data.fit": "stretch"})
    capsys.readouterr()
    assert evaluate.main([str(padded), str(other)]) == 2
    assert "its fit are stretch, those of" in one_line(capsys)


def test_checkpoints_that_say_nothing_of_it_are_of_stretched_images(
    padded: Path, tmp_path: Path
) -> None:
    state = checkpoint.load(padded / "checkpoints" / "best.pt")
    assert state["segmentor"].pop("fit") == "pad"
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "best.pt")
    assert load_trained(tmp_path, CPU).fit == "stretch"


def test_what_cannot_be_padded_is_one_line(
    own: Path, padded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "never"
    changes = {"data.name": "folder", "data.root": str(own), "data.fit": "pad"}
    config = tiny.write_config(tmp_path / "bad.yaml", "supervised", changes)
    assert run.main([str(config), "--out", str(out)]) == 2
    said = one_line(capsys)
    assert "bad.yaml" in said
    assert "data.fit: pad gives padding the ignore index, and 'folder' has none" in said
    assert not out.exists()
    assert evaluate.main([str(padded), "--data", "ph2"]) == 2
    assert "'ph2' has none" in one_line(capsys)


def test_a_batch_of_nothing_but_padding_trains_nothing(padded: Path) -> None:
    """A window may fall there."""
    settings: Any = parse_run(load(padded / "config.yaml"))[0]
    image, mask = next(iter(BatchLoader(load_data(settings.data).train, 5, shuffle=False)))
    smallest = int((mask != IGNORED).flatten(1).sum(1).argmin())
    corner = mask[smallest : smallest + 1, -3:, -3:]
    assert (corner == IGNORED).all()
    assert (image[smallest, :, -3:, -3:].abs() < 0.004).all()
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = build_loss(LossSettings(dice=1.0, jaccard=1.0), IGNORED)(logits, corner)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
