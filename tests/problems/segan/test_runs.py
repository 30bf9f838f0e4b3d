"""SegAN as a user runs it: by command, its annealed k, its configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mlseg import calibrate, evaluate, run
from mlseg.config import load
from mlseg.problems.systems import parse_run
from mlseg.segmentation.data import load_data
from mlseg.segmentation.scoring import score
from mlseg.segmentation.trained import load_runs

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of some epochs, in which k has been annealed."""
    folder = tmp_path_factory.mktemp("segan")
    changes = {"engine.iterations": 8, "augmentation": {"window": 24}}
    path = tiny.write_config(folder / "tiny.yaml", "segan", changes)
    assert run.main([str(path), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_evaluate_gives_what_the_run_gave(trained: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    assert evaluate.main([str(trained), "--weights", "last", "--out", str(scores)]) == 0
    said = json.loads(scores.read_text())
    reported = json.loads((trained / "results.json").read_text())["scores"]["last"]["test"]
    assert {key: said["scores"]["test"][key] for key in reported} == reported
    assert said["threshold"] == 0.4
    assert said["k"] == [pytest.approx(0.9**3)], (
        "of 8 steps, each fourth but the last ends an epoch"
    )


def test_calibration_puts_another_k_in_the_place_of_the_annealed(trained: Path) -> None:
    settings: Any = parse_run(load(trained / "config.yaml"))[0]
    samples, ensemble = load_data(settings.data).val, load_runs([trained], CPU, "last")
    ks, thresholds = [0.3, 1.0], [0.3, 0.6]
    values = calibrate.by_image(ensemble, samples, CPU, ks, thresholds, True, "accuracy")
    grid = values.mean(2)
    for row, k in enumerate(ks):
        for column, threshold in enumerate(thresholds):
            chosen = ensemble.with_choice(k, threshold)
            figures = score(chosen, samples, CPU, threshold=threshold, native=True).compute()
            assert float(grid[row, column]) == pytest.approx(figures["accuracy"])
    (member,) = ensemble.with_choice(0.3, None).members
    image = torch.randn(2, 3, 32, 32)
    module: Any = member.module
    z = member.logits(image) * float(module.logistic.k)
    torch.testing.assert_close(member.probabilities(image)[:, 1], (z[:, 1] / 0.3).sigmoid())


def test_a_dry_run_of_the_game(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "segan", {"warmup_epochs": 2})
    assert run.main([str(config), "game=stackelberg", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "stage warmup, 4 iterations" in said
    assert "segmentor → critic → segmentor" in said
    assert "critic (Critic)" in said


def test_without_validation_data_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "segan")
    assert run.main([str(config), "data.val=0", "--out", str(tmp_path / "run")]) == 2
    assert "val" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------- configs


def settings_of(name: str) -> Any:
    return parse_run(load(CONFIGS / f"{name}.yaml"))[0]


def test_the_config_by_section_3_of_the_paper() -> None:
    settings = settings_of("segan_isic")
    assert (settings.data.name, settings.data.splits) == ("isic2017", "official_test")
    assert settings.data.size == (135, 180)
    augmentation = settings.augmentation
    assert augmentation.output_size(settings.data.size) == (128, 128)
    assert augmentation.flip_horizontal == augmentation.flip_vertical == 0.5
    jitter = (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    assert min(*jitter, augmentation.hue) > 0
    for level in (settings.problems.critic, settings.problems.segmentor):
        assert (level.optimizer.name, level.optimizer.lr, level.batch_size) == ("adam", 3e-3, 25)
        assert (level.scheduler.name, level.scheduler.end) == ("linear", 0)
    logistic = settings.logistic
    assert (logistic.decay, logistic.every, logistic.floor) == (0.9, 25, 0.3)
    assert (settings.critic.clamp, settings.critic.clamp_norm) == (0.05, True)
    assert settings.threshold == 0.4
    assert (settings.loss.reduction, settings.loss.dice_weight) == ("layer_mean", 0)
    assert (settings.game, settings.warmup_epochs) == ("alternating", 0)
    assert settings.engine.scoring == "native"


def test_the_rows_of_a_comparison_differ_in_the_loss_alone() -> None:
    game, alone = settings_of("segan_isic_small"), settings_of("supervised_segan_small")
    for key in ("data", "augmentation", "segmentor", "engine", "precision"):
        assert getattr(game, key) == getattr(alone, key), key
    for key in ("optimizer", "scheduler", "batch_size"):
        own, other = (getattr(s.problems.segmentor, key) for s in (game, alone))
        assert own == other, key
