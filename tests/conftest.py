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
    "config",
    "reports",
    "sweeps",
    "workers",
    "test_betty.py",
    "test_cache.py",
    "test_checkout.py",
    "test_checkpoint.py",
    "test_command_line.py",
    "test_commands.py",
    "test_configs.py",
    "test_counting.py",
    "test_curves.py",
    "test_decode.py",
    "test_devices.py",
    "test_distribution.py",
    "test_docs.py",
    "test_evaluate.py",
    "test_examples.py",
    "test_fetch.py",
    "test_full_disks.py",
    "test_grids.py",
    "test_habits.py",
    "test_import.py",
    "test_input.py",
    "test_interruption.py",
    "test_labels.py",
    "test_layers.py",
    "test_layout.py",
    "test_loaders.py",
    "test_long_run.py",
    "test_medical.py",
    "test_no_synchronisation.py",
    "test_notebooks.py",
    "test_notices.py",
    "test_own_data.py",
    "test_own_files.py",
    "test_own_parts.py",
    "test_own_system.py",
    "test_packaging.py",
    "test_page.py",
    "test_parallel_runs.py",
    "test_passes.py",
    "test_predict.py",
    "test_prepare.py",
    "test_presence.py",
    "test_progress.py",
    "test_readme.py",
    "test_registry.py",
    "test_reporting.py",
    "test_resuming.py",
    "test_servers.py",
    "test_shell_blocks.py",
    "test_splits.py",
    "test_starting.py",
    "test_stopping.py",
    "test_threads.py",
    "test_tracking.py",
    "test_trained_models.py",
    "test_trust.py",
    "test_unlabelled.py",
    "test_your_own_data.py",
}
"""Folders and files of words, files, processes and counts, which no processor's arithmetic reaches.

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
ON_THE_HOST = (
    "torch.optim",
    "torch.utils.data",
    "mlseg.segmentation.data",
    "mlseg.randomness",
    "mlseg.multilevel.underflow",  # where training runs on the host; else it reads nothing
)
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
