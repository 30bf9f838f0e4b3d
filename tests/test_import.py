"""What importing mlseg loads, and when."""

import subprocess
import sys
from pathlib import Path

import pytest

import mlseg

HEAVY = (
    "aiohttp",
    "fsspec",
    "higher",
    "matplotlib",
    "scipy",
    "segmentation_models_pytorch",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
)


def loaded(code: str, names: tuple[str, ...], cwd: Path) -> set[str]:
    """Those of ``names`` that are loaded once ``code`` has run."""
    report = f"\nimport sys\nprint('loaded:', *(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True, cwd=cwd
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_by_itself_it_loads_nothing(tmp_path: Path) -> None:
    code = "import os; before = dict(os.environ); import mlseg; assert before == dict(os.environ)"
    assert loaded(code, ("torch", "numpy", "pydantic", "betty", *HEAVY), tmp_path) == set()


def test_what_is_heavy_waits_until_it_is_used(tmp_path: Path) -> None:
    """Nothing is loaded but what Betty itself loads."""
    bettys = loaded("import betty.engine, betty.problems", HEAVY, tmp_path)
    assert "matplotlib" not in bettys
    code = "import mlseg; mlseg.Problem; mlseg.Engine; import mlseg.run, mlseg.calibrate"
    assert loaded(code, ("torch", *HEAVY), tmp_path) <= {"torch", *bettys}


def test_every_public_name_is_there() -> None:
    for name in (
        *mlseg.__all__,
        "engines",
        "hypergradients",
        "multilevel",
        "problems",
        "segmentation",
    ):
        assert getattr(mlseg, name) is not None
        assert name in dir(mlseg)
    assert mlseg.Problem is mlseg.multilevel.Problem
    assert mlseg.Engine is mlseg.engines.Engine
    with pytest.raises(AttributeError, match=r"'mlseg' has no attribute 'Problems'"):
        mlseg.Problems  # noqa: B018
    with pytest.raises(ImportError, match="Problems"):
        exec("from mlseg import Problems")


@pytest.mark.parametrize("before", ["gc.enable()", "gc.disable()", "gc.freeze()"])
def test_the_collector_is_left_as_it_was(before: str, tmp_path: Path) -> None:
    code = (
        f"import gc; {before}; on, kept = gc.isenabled(), gc.get_freeze_count()\n"
        "import mlseg; mlseg.Problem\n"
        "assert gc.isenabled() == on\n"
        "assert gc.get_freeze_count() == 0 if not kept else gc.get_freeze_count() > 1000\n"
    )
    loaded(code, (), tmp_path)
