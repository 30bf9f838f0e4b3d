"""Data sets of a few tiny files, and the real ones where $MLSEG_DATA says they are."""

from pathlib import Path

import pytest
import torch
from tiny_files import half_mask, write_image

from mlseg.segmentation.data.samples import DatasetSpec, Samples

SPEC = DatasetSpec("tiny", 3, ("background", "foreground"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pairs in images/ and masks/."""
    for index in range(12):
        write_image(tmp_path / "own" / "images" / f"p{index:02d}.png", 20 * index, "RGB")
        write_image(tmp_path / "own" / "masks" / f"p{index:02d}.png", half_mask())
    return tmp_path / "own"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start in an empty folder, whatever the machine has."""
    monkeypatch.delenv("MLSEG_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def samples() -> Samples:
    """Ten examples of 8x6 pixels, each of its own grey; the mask's corner tells which it is."""
    images = torch.arange(10, dtype=torch.uint8).mul(20)[:, None, None, None].repeat(1, 3, 8, 6)
    masks = torch.zeros(10, 8, 6, dtype=torch.uint8)
    masks[:, 0, 0] = torch.arange(10) % 2
    return Samples([f"e{index}" for index in range(10)], images, masks, SPEC)
