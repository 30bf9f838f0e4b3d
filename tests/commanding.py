"""Commands as tests give them."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import tiny

from mlseg import run


def train(tmp_path: Path, *overrides: str) -> Path:
    """A tiny run by command; its directory."""
    config = tiny.write_config(tmp_path / "tiny.yaml", changes={"engine.samples": 1})
    out = tmp_path / "run"
    assert run.main([str(config), *overrides, "--out", str(out)]) == 0
    return out


def trained(tmp_path: Path) -> Path:
    """The same without overrides, as a copy of one that is made once in a process."""
    out = shutil.copytree(_once(), tmp_path / "run")
    tiny.write_config(tmp_path / "tiny.yaml", changes={"engine.samples": 1})
    return out


@cache
def _once() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return train(Path(folder.name))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a failed command said: a single line on stderr, beside notes on overrides."""
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if not line.startswith("note: ")]
    return line
