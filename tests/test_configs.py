"""The configs of the repository: each fits its system."""

from pathlib import Path

import pytest

from mlseg.config import dump, load
from mlseg.problems.systems import parse_run

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "system" in load(path).values]


@pytest.mark.parametrize("name", RUNS)
def test_every_config_fits_its_system(name: str) -> None:
    settings, system = parse_run(load(CONFIGS / f"{name}.yaml"))
    assert settings.system == system.name


@pytest.mark.parametrize("name", RUNS)
def test_a_runs_config_stays_the_same_however_often_it_is_resumed(
    name: str, tmp_path: Path
) -> None:
    """Text for text: a default of 89 for a float would be 89.0 the next time."""
    settings, _ = parse_run(load(CONFIGS / f"{name}.yaml"))
    stored = tmp_path / "config.yaml"
    stored.write_text(dump(settings), encoding="utf-8")
    assert dump(parse_run(load(stored))[0]) == dump(settings)
