"""The configs of the repository: each fits its system, and SegAN's say what the paper says."""

from pathlib import Path
from typing import Any

import pytest

from mlseg.config import load
from mlseg.run import parse_run

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "system" in load(path).values]


@pytest.mark.parametrize("name", RUNS)
def test_every_config_fits_its_system(name: str) -> None:
    settings, system = parse_run(load(CONFIGS / f"{name}.yaml"))
    assert settings.system == system.name


def settings_of(name: str, *overrides: str) -> Any:
    return parse_run(load(CONFIGS / f"{name}.yaml", overrides))[0]


def test_segan_by_section_3_of_the_paper() -> None:
    settings = settings_of("segan_isic")
    assert (settings.data.name, settings.data.splits) == ("isic2017", None)  # official by default
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
