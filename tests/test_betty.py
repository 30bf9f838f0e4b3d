"""A wrong betty-ml is refused in one line, before anything of it is used."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from mlseg._betty import require_betty


@pytest.mark.parametrize("version", ["0.2.1", "0.2.2", "0.2.10", "0.2.1.post1", "0.2.1+cpu"])
def test_what_is_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("mlseg._betty.version", lambda name: version)
    require_betty()


@pytest.mark.parametrize("version", ["0.1.1", "0.2.0", "0.2", "0.3.0", "1.0", "0.20.1", "0.2.1rc1"])
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("mlseg._betty.version", lambda name: version)
    with pytest.raises(ImportError) as caught:
        require_betty()
    text = str(caught.value)
    assert f"not {version};" in text
    assert "uv pip install 'betty-ml>=0.2.1,<0.3'" in text
    assert "\n" not in text


def test_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("mlseg._betty.version", missing)
    with pytest.raises(ImportError, match="not installed; install it with uv"):
        require_betty()


@pytest.mark.parametrize(
    "use",
    [
        "import mlseg; mlseg.Problem",
        "from mlseg import Engine",
        "import mlseg.multilevel.penalty",
        "import mlseg.engines.engine",
        "import mlseg.hypergradients.cg",
    ],
)
def test_the_package_checks_before_it_imports_anything_else(use: str, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, sys\n"
        "m.version = lambda name: '0.1.1'\n"
        "try:\n"
        f"    {use}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print('betty' in sys.modules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    line, loaded = done.stdout.splitlines()
    assert line.startswith("mlseg needs betty-ml 0.2.1 or a later 0.2.x, not 0.1.1; ")
    assert loaded == "False False"
