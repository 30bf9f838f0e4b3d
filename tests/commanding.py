"""Commands as tests give them."""

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


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a failed command said: a single line on stderr, beside notes on overrides."""
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if not line.startswith("note: ")]
    return line
