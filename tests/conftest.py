"""What holds for every test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# A busy machine is no failure: an example may take as long as it takes.
hypothesis.settings.register_profile("mlseg", deadline=None)
hypothesis.settings.load_profile("mlseg")


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
