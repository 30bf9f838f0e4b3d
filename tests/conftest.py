"""What holds for every test."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
NOT_NUMERICAL = {
    "benchmarks",
    "sweeps",
    "workers",
    "test_checkout.py",
    "test_cache.py",
    "test_commands.py",
    "test_config.py",
    "test_configs.py",
    "test_decode.py",
    "test_distribution.py",
    "test_docs.py",
    "test_fetch.py",
    "test_habits.py",
    "test_interruption.py",
    "test_labels.py",
    "test_layout.py",
    "test_packaging.py",
    "test_prepare.py",
    "test_splits.py",
    "test_unlabelled.py",
}
"""Folders and files of words and files, which no processor's arithmetic reaches.

Everything else is marked as numerical, whatever is added, and runs in ``make test-processors``.
"""

# A busy machine is no failure: an example may take as long as it takes.
hypothesis.settings.register_profile("mlseg", deadline=None)
hypothesis.settings.load_profile("mlseg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the numerical tests."""
    gone = NOT_NUMERICAL - {path.name for path in HERE.rglob("*")}
    if gone:
        raise pytest.UsageError(
            f"tests/conftest.py lists what is no more: {', '.join(sorted(gone))}"
        )
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        names = set(item.path.relative_to(HERE).parts)
        if not names & NOT_NUMERICAL:
            item.add_marker("numerical")


@pytest.fixture
def double() -> Iterator[None]:
    """float64 is torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def real() -> Callable[[str], Path]:
    """The folder of a real data set; skips the test where there is none."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("MLSEG_DATA", "")) / name
        if not os.environ.get("MLSEG_DATA") or not root.is_dir():
            pytest.skip(f"$MLSEG_DATA has no {name}")
        return root

    return find


READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
ON_THE_HOST = ("torch.optim", "torch.utils.data", "mlseg.segmentation.data", "mlseg.randomness")
"""Modules that read tensors which lie on the host wherever training runs."""


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every reading of a tensor's value from Python, by the module that does it."""
    found: list[str] = []

    def forbid(name: str) -> None:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith(ON_THE_HOST):
                found.append(f"{caller}: {name}")
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, read)

    for name in READS:
        forbid(name)
    return found
