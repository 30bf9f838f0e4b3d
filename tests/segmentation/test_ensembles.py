"""Ensembles and calibration, by command: what they compute, store and refuse."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commanding import one_line
from PIL import Image
from torch import Tensor

from mlseg import calibrate, checkpoint, evaluate, predict, run
from mlseg.config import load
from mlseg.errors import UserError
from mlseg.problems.systems import parse_run
from mlseg.segmentation import calibration
from mlseg.segmentation.data import DataSettings, load_data, to_float
from mlseg.segmentation.data.given import resized
from mlseg.segmentation.metrics import SegmentationMetrics
from mlseg.segmentation.scoring import predict_logits, score
from mlseg.segmentation.trained import Ensemble, load_runs

pytestmark = pytest.mark.slow  # trains for seconds

CPU = torch.device("cpu")
SPLITS = {"data.train": 6, "data.val": 6, "data.test": 5, "engine.iterations": 12}


def train(tmp_path: Path, seed: int, name: str = "", **changes: Any) -> Path:
    """A tiny run; its directory."""
    out = tmp_path / (name or f"seed_{seed}")
    path = tiny.write_config(tmp_path / f"{out.name}.yaml", changes={**SPLITS, **changes})
    assert run.main([str(path), f"seed={seed}", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs on one split, trained on windows."""
    folder = tmp_path_factory.mktemp("runs")
    return [train(folder, seed, augmentation={"window": 24}) for seed in (1, 2, 3)]


@pytest.fixture
def fresh(runs: list[Path]) -> list[Path]:
    """The same without any calibration."""
    for path in runs:
        (path / calibration.FILE).unlink(missing_ok=True)
    return runs


def data_of(path: Path) -> Any:
    settings: Any = parse_run(load(path / "config.yaml"))[0]
    return load_data(settings.data)


def evaluated(tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    out = tmp_path / "scores.json"
    assert evaluate.main([*map(str, arguments), "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


# ------------------------------------------------------------------------------- ensembles


def test_an_ensemble_is_the_mean_of_the_probabilities(fresh: list[Path], tmp_path: Path) -> None:
    data = data_of(fresh[0])
    singles = [load_runs([path], CPU) for path in fresh]
    ensemble = load_runs(fresh, CPU)
    image = to_float(data.test.images)
    mean = torch.stack([single(image) for single in singles]).mean(0)
    torch.testing.assert_close(ensemble(image), mean)
    assert not torch.allclose(singles[0](image), mean)
    metrics = SegmentationMetrics(2, classes=data.spec.classes, distances=True)
    metrics.update((mean[:, 1] > 0.5).long(), data.test.masks, data.test.ids)
    found = evaluated(tmp_path, *fresh)
    values = found["scores"]["test"]
    for key, value in metrics.compute().items():
        assert values[key] == pytest.approx(value), key
    assert found["threshold"] == 0.5
    assert found["k"] == [1.0, 1.0, 1.0], "a network without a temperature"
    assert set(values["per_image"]) == set(data.test.ids)


def test_predict_by_an_ensemble(fresh: list[Path], tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.effect_noise((50, 41), 80).convert("RGB").save(image)
    out = tmp_path / "masks"
    assert predict.main([*map(str, fresh), str(image), "--out", str(out)]) == 0
    mask = np.asarray(Image.open(out / "image.png"))
    assert mask.shape == (41, 50)
    ensemble = load_runs(fresh, CPU)
    array = np.asarray(Image.open(image)).transpose(2, 0, 1)
    small = torch.from_numpy(resized(array, (32, 32)))[None]
    expected = ensemble.probabilities(to_float(small), (41, 50))[0, 1] > 0.5
    assert np.array_equal(mask > 0, expected.numpy())


def test_runs_of_other_classes_are_no_ensemble(
    fresh: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train(tmp_path, 1, "scenes", **{"data.name": "synthetic_scenes"})
    capsys.readouterr()
    assert evaluate.main([str(fresh[0]), str(other)]) == 2
    assert "its classes are sky" in one_line(capsys)
    image = fresh[0] / "calibration_grid.png"
    Image.new("RGB", (8, 8)).save(image)
    masks = tmp_path / "masks"
    assert predict.main([str(fresh[0]), str(other), str(image), "--out", str(masks)]) == 2
    assert "its classes are sky" in one_line(capsys)
    assert not masks.exists()
    assert calibrate.main([str(other)]) == 2
    assert "7 classes" in one_line(capsys)


def test_runs_of_other_sizes_or_thresholds_are_no_ensemble(
    fresh: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = train(tmp_path, 1, "small", **{"data.image_size": 24})
    strict = train(tmp_path, 1, "strict", augmentation={"window": 24})
    state = checkpoint.load(strict / "checkpoints" / "best.pt")
    state["segmentor"]["threshold"] = 0.7  # as a system with a threshold of its own writes it
    checkpoint.save(strict / "checkpoints" / "best.pt", state)
    capsys.readouterr()
    assert evaluate.main([str(fresh[0]), str(small)]) == 2
    assert "image_size" in one_line(capsys)
    assert evaluate.main([str(fresh[0]), str(strict)]) == 2
    assert "choose one with --threshold or by mlseg.calibrate" in one_line(capsys)
    both = [str(fresh[0]), str(strict)]
    assert evaluate.main([*both, "--threshold", "0.5"]) == 0
    assert calibrate.main([*both, "--k", "0.5", "--thresholds", "0.3"]) == 0
    assert evaluate.main(both) == 0


def test_no_member_may_have_seen_the_test_images(
    fresh: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another split of the same data has others' test images in its training part."""
    other = train(tmp_path, 1, "split", augmentation={"window": 24}, **{"data.split_seed": 7})
    capsys.readouterr()
    for command in (evaluate.main, calibrate.main):
        assert command([str(fresh[0]), str(other)]) == 2
        assert "the data are not those of the run" in one_line(capsys)


# ----------------------------------------------------------------------------- calibration


def test_the_grid_is_what_scoring_gives_at_each_cell(fresh: list[Path]) -> None:
    data = data_of(fresh[0])
    ks, thresholds = [0.3, 1.0], [0.2, 0.5, 0.7]
    for paths in (fresh[:1], fresh):
        ensemble = load_runs(paths, CPU)
        for metric in ("jaccard", "accuracy"):
            grid = calibrate.by_image(ensemble, data.val, CPU, ks, thresholds, True, metric).mean(2)
            for row, k in enumerate(ks):
                for column, threshold in enumerate(thresholds):
                    chosen = ensemble.with_choice(k, threshold)
                    found = score(chosen, data.val, CPU, threshold=threshold).compute()[metric]
                    assert float(grid[row, column]) == pytest.approx(found)
    assert grid.std() > 0


def test_for_one_network_k_and_threshold_are_one_number(fresh: list[Path]) -> None:
    """z > k log(t / (1 - t)), as long as nothing is averaged or upsampled."""
    data, ensemble = data_of(fresh[0]), load_runs(fresh[:1], CPU)
    cut = 0.3 * math.log(0.4 / 0.6)
    same = 1 / (1 + math.exp(-cut / 0.7))
    image = to_float(data.val.images)
    one = ensemble.with_choice(0.3, 0.4)(image)[:, 1] > 0.4
    assert torch.equal(one, ensemble.with_choice(0.7, same)(image)[:, 1] > same)


def test_a_networks_own_temperature_gives_way_to_the_chosen_one(fresh: list[Path]) -> None:
    """One that gives z / 0.25, and whose probabilities are a sigmoid."""

    class Tempered(torch.nn.Module):
        temperature = 0.25

        def forward(self, image: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(image[:, 0]), image[:, 1] / 0.25], 1)

        def probabilities(self, logits: Tensor) -> Tensor:
            return logits.sigmoid()

    member = replace(load_runs(fresh[:1], CPU).first, module=Tempered(), window=None)
    ensemble = Ensemble((member,), 0.5)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ensemble(image)[:, 1], (image[:, 1] / 0.25).sigmoid())
    chosen = ensemble.with_choice(0.8, None)
    torch.testing.assert_close(chosen(image)[:, 1], (image[:, 1] / 0.8).sigmoid())
    assert calibration.describe(ensemble) == "k 0.25, threshold 0.5"
    assert calibration.describe(chosen) == "k 0.8, threshold 0.5"
    data = data_of(fresh[0])
    grid = calibrate.by_image(ensemble, data.val, CPU, [0.8], [0.6], True, "accuracy").mean(2)
    figures = score(chosen, data.val, CPU, threshold=0.6, native=True).compute()
    assert float(grid) == pytest.approx(figures["accuracy"])


def test_calibrate_stores_its_choice_and_the_others_take_it(
    fresh: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluated(tmp_path, *fresh)
    arguments = ["--k", "0.2", "0.9", "--thresholds", "0.15", "0.85", "--metric", "sensitivity"]
    assert calibrate.main([*map(str, fresh), *arguments]) == 0
    said = capsys.readouterr().out
    assert "t 0.15" in said
    assert "threshold 0.15 is the lowest of the grid: a better one may lie beyond" in said
    stored = json.loads((fresh[1] / calibration.FILE).read_text())
    assert len(stored) == 1
    assert stored[0]["threshold"] == 0.15, "the lower threshold is never less sensitive"
    assert stored[0]["runs"] == [path.name for path in fresh]
    assert stored[0]["before"] <= stored[0]["value"]
    rows = list(csv.reader((fresh[0] / "calibration_grid_3_runs.csv").open()))
    assert [row[0] for row in rows] == ["k", "0.2", "0.9"]
    best = max(float(value) for row in rows[1:] for value in row[1:])
    assert best == pytest.approx(stored[0]["value"], abs=1e-6)
    with Image.open(fresh[2] / "calibration_grid_3_runs.png") as picture:
        assert picture.size[0] > 600

    after = evaluated(tmp_path, *fresh)
    assert (after["threshold"], set(after["k"])) == (0.15, {stored[0]["k"]})
    assert after["scores"]["test"]["sensitivity"] >= before["scores"]["test"]["sensitivity"]
    # Not for a run by itself, nor for other weights, nor where told otherwise.
    assert evaluated(tmp_path, fresh[0])["threshold"] == 0.5
    assert evaluated(tmp_path, *fresh, "--threshold", "0.3")["threshold"] == 0.3
    assert evaluated(tmp_path, *fresh, "--k", "0.5")["threshold"] == 0.5
    assert calibration.find(load_runs(fresh, CPU, "last")) is None or (
        load_runs(fresh, CPU, "last").first.digest == load_runs(fresh, CPU).first.digest
    )
    # A second one for the same weights takes the first one's place; one alone stands beside it.
    assert calibrate.main([*map(str, fresh), "--k", "0.4", "--thresholds", "0.6"]) == 0
    assert calibrate.main([str(fresh[0]), "--k", "0.4", "--thresholds", "0.7"]) == 0
    stored = json.loads((fresh[0] / calibration.FILE).read_text())
    assert [(len(c["runs"]), c["threshold"]) for c in stored] == [(3, 0.6), (1, 0.7)]
    assert evaluated(tmp_path, fresh[0])["threshold"] == 0.7
    assert calibration.find(load_runs(fresh, CPU)).threshold == 0.6  # type: ignore[union-attr]


def test_a_choice_is_not_for_weights_that_came_later(tmp_path: Path) -> None:
    out = train(tmp_path, 1)
    assert calibrate.main([str(out), "--weights", "last", "--k", "1", "--thresholds", "0.9"]) == 0
    assert calibration.find(load_runs([out], CPU, "last")) is not None
    assert run.main(["--resume", str(out), "engine.iterations=14"]) == 0
    assert calibration.find(load_runs([out], CPU, "last")) is None


def choice_of(grid: Tensor, ks: list[float], thresholds: list[float]) -> calibration.Choice:
    row, column = calibrate.best_cell(grid, ks, thresholds)
    values: dict[str, Any] = {"k": ks[row], "threshold": thresholds[column], "metric": "dice"}
    values |= {"value": 1.0, "before": 1.0, "images": 1, "scored_at": "native"}
    return calibration.Choice(**values, runs=[], checkpoints=[])


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ([[0.1, 0.2, 0.3], [0.2, 0.3, 0.9]], ["k 0.6: highest", "threshold 0.5: highest"]),
        ([[0.9, 0.2, 0.1], [0.2, 0.3, 0.1]], ["k 0.3: lowest", "threshold 0.3: lowest"]),
        ([[0.1, 0.2, 0.1], [0.2, 0.3, 0.1]], ["k 0.6: highest"]),
        ([[0.1, 0.5, 0.1], [0.1, 0.5, 0.1]], []),
    ],
)
def test_a_choice_at_the_edge_of_the_grid_is_said(
    grid: list[list[float]], expected: list[str]
) -> None:
    scores, ks, thresholds = torch.tensor(grid), [0.3, 0.6], [0.3, 0.4, 0.5]
    said = calibrate.at_the_edge(scores, ks, thresholds, choice_of(scores, ks, thresholds))
    assert len(said) == len(expected)
    for line, words in zip(said, expected, strict=True):
        assert line.startswith(words.replace(":", " is the"))
        way = "larger" if "highest" in words else "smaller"
        assert re.search(rf"may lie beyond; try {way} values with --(k|thresholds)$", line)
    one = scores[:1, :1]
    assert calibrate.at_the_edge(one, [0.3], [0.3], choice_of(one, [0.3], [0.3])) == []


def test_of_equal_cells_the_gentlest_is_chosen() -> None:
    grid = torch.tensor([[0.5, 0.7, 0.7], [0.7, 0.7, 0.2]])
    assert calibrate.best_cell(grid, [0.3, 0.6], [0.3, 0.4, 0.5]) == (1, 1)


@pytest.mark.parametrize("broken", ["{", "[1]", '[{"k": 1}]'])
def test_a_damaged_calibration_is_one_line(
    broken: str, fresh: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh[0] / calibration.FILE).write_text(broken)
    assert evaluate.main([str(fresh[0])]) == 2
    assert "calibration.json: not a readable calibration" in one_line(capsys)


@pytest.mark.parametrize("arguments", [["--k", "0"], ["--thresholds", "1"], ["--metric", "iou"]])
def test_values_that_are_no_k_or_threshold(arguments: list[str], fresh: list[Path]) -> None:
    with pytest.raises(SystemExit) as stopped:
        calibrate.main([str(fresh[0]), *arguments])
    assert stopped.value.code == 2


# ---------------------------------------------------------------- windows and native sizes


def test_windows_cover_an_image_and_are_averaged() -> None:
    """A network that gives its input back: any cover, averaged, is the image itself."""
    image = torch.randn(2, 3, 45, 60)
    seen: list[tuple[int, ...]] = []

    class Echo(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape[-2:]))
            return x + len(seen)

    found = predict_logits(Echo(), image, (40, 32)) - image
    assert seen == [(40, 32)] * 4
    # Each window's own number where it is alone, the mean where two or four meet.
    numbers = found[0, 0]
    for at, expected in (((0, 0), 1.0), ((0, 59), 2.0), ((44, 0), 3.0), ((44, 59), 4.0)):
        assert float(numbers[at]) == pytest.approx(expected, abs=1e-4)
    assert float(numbers[20, 30]) == pytest.approx(2.5, abs=1e-4)
    assert float(numbers[0, 30]) == pytest.approx(1.5, abs=1e-4)
    assert torch.equal(predict_logits(Echo(), image, (45, 60)), image + 5)


def test_scores_are_counted_at_the_masks_own_size(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    sizes = [(64, 80), (50, 40), (33, 90), (64, 64)]
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(sizes):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[10:30, 10:35] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    data = load_data(tiny_data(folder, image_size=16, train=1, val=0, test=3))

    def constant(image: Tensor) -> Tensor:
        """Foreground in the left half."""
        found = torch.zeros(len(image), 2, *image.shape[-2:])
        found[:, 1, :, :8] = 1.0
        return found

    native = score(constant, data.test, "cpu", native=True, distances=True)
    assert data.test.native_mask is not None
    for name, figures in native.per_image().items():
        height, width = sizes[int(name)]
        truth = np.zeros((height, width), bool)
        truth[10:30, 10:35] = True
        predicted = np.zeros_like(truth)
        predicted[:, : width // 2] = True
        expected = (truth & predicted).sum() / (truth | predicted).sum()
        # Bilinear: the edge between halves may fall either way, by a column.
        assert figures["jaccard"] == pytest.approx(expected, abs=0.03)
    assert [tuple(m.shape) for m in data.test.native_masks()] == [
        sizes[int(name)] for name in data.test.ids
    ]
    some = data.test.subset([2, 0])
    assert [tuple(m.shape) for m in some.native_masks()] == [sizes[int(n)] for n in some.ids]
    small = score(constant, data.test, "cpu").compute()
    assert small["jaccard"] != native.compute()["jaccard"]


def tiny_data(folder: Path, **values: Any) -> DataSettings:
    return DataSettings(name="folder", root=str(folder), **values)


def test_a_mask_that_has_gone_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
        for index in range(3):
            half = Image.new("L", (8, 8), 255)
            half.paste(0, (0, 0, 4, 8))
            half.save(folder / part / f"{index}.png")
    data = load_data(tiny_data(folder, image_size=8, train=1, val=0, test=2))
    for path in (folder / "masks").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="not a readable image"):
        list(data.test.native_masks())
