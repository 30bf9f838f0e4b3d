"""Commands as tests give them."""

import argparse
import atexit
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import tiny

from mlseg import command_line, run


def train(
    folder: Path,
    *overrides: str,
    system: str = "supervised",
    changes: tiny.Changes | None = None,
    name: str = "run",
) -> Path:
    """A tiny run by command, of the config ``folder/tiny.yaml``; its directory, ``folder/name``."""
    changes = {"engine.samples": 1, **(changes or {})}
    config = tiny.write_config(folder / "tiny.yaml", system, changes)
    out = folder / name
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


class _Parsed(Exception):
    pass


def parsed(monkeypatch: pytest.MonkeyPatch, path: Path, words: Sequence[str]) -> argparse.Namespace:
    """A script's arguments as it reads them itself; it does nothing with them."""

    def stopping(parse: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
        def stopped(*arguments: object) -> argparse.Namespace:
            raise _Parsed(parse(*arguments))

        return stopped

    with monkeypatch.context() as patch:
        patch.setattr(command_line, "parse", stopping(command_line.parse))
        patch.setattr(
            argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args)
        )
        patch.setattr(sys, "argv", [str(path), *words])
        patch.syspath_prepend(path.parent)
        with pytest.raises(_Parsed) as stopped:
            runpy.run_path(str(path), run_name="__main__")
    arguments = stopped.value.args[0]
    assert isinstance(arguments, argparse.Namespace)
    return arguments


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a failed command said: a single line on stderr, beside notes on overrides."""
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if not line.startswith("note: ")]
    return line
