"""The configs of the repository: each fits its system."""

from pathlib import Path

import pytest

from mlseg.config import load
from mlseg.run import parse_run

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "system" in load(path).values]


@pytest.mark.parametrize("name", RUNS)
def test_every_config_fits_its_system(name: str) -> None:
    settings, system = parse_run(load(CONFIGS / f"{name}.yaml"))
    assert settings.system == system.name
