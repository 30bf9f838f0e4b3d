"""A script as its user runs it."""

import gc
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Script]:
    """Runs a script as ``python benchmarks/NAME.py ARGUMENTS`` does; what it prints."""

    def call(name: str, *arguments: object) -> str:
        path = BENCHMARKS / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        code: object = None
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        assert code in (None, 0), shown
        return shown.out

    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    yield call
    gc.unfreeze()
    torch.set_num_threads(threads)
    logging.disable(disabled)
