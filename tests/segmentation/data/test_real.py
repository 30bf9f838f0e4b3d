"""The real data sets, where $MLSEG_DATA says they are; skipped elsewhere."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlseg.segmentation.data import DataSettings, load_data

pytestmark = pytest.mark.slow  # reads or trains for seconds


def test_isic2018(real: Callable[[str], Path]) -> None:
    root = real("isic2018")
    splits = []
    for train, val in ((32, 8), (80, 20)):
        data = load_data(
            DataSettings(
                name="isic2018", root=str(root), image_size=32, train=train, val=val, test=100
            )
        )
        assert data.provenance == "real"
        assert data.train.images.shape == (train, 3, 32, 32)
        splits.append(data)
    for small, large in pairwise(splits):
        assert set(small.train.ids) < set(large.train.ids)
        assert small.test.ids == large.test.ids
    share = data.test.masks.float().mean()
    assert 0.1 < share < 0.4
    name = data.test.ids[0]
    mask = root / "ISIC2018_Task1_Training_GroundTruth" / f"{name}_segmentation.png"
    full = np.asarray(Image.open(mask)) > 127
    assert abs(data.test.masks[0].float().mean() - full.mean()) < 0.02


def test_nlm_mc(real: Callable[[str], Path]) -> None:
    data = load_data(
        DataSettings(
            name="nlm_mc", root=str(real("nlm_mc")), image_size=64, train=20, val=5, test=40
        )
    )
    assert data.train.images.shape == (20, 1, 64, 64)
    assert 0.1 < data.train.masks.float().mean() < 0.5
    lungs, rest = data.train.masks.bool(), ~data.train.masks.bool()
    grey = data.train.images[:, 0].float()
    assert grey[lungs].mean() < grey[rest].mean() + 20


@pytest.mark.parametrize("thinned", [False, True])
def test_camvid(real: Callable[[str], Path], thinned: bool) -> None:
    counts: dict[str, Any] = {"train": 20, "val": 10, "test": 10} if thinned else {}
    data = load_data(
        DataSettings(name="camvid", root=str(real("camvid")), image_size=[45, 60], **counts)
    )
    sizes = len(data.train), len(data.val), len(data.test)
    assert sizes == ((20, 10, 10) if thinned else (367, 101, 233))
    assert data.manifest["how"] == "official"
    assert data.train.masks.max() == data.spec.ignore_index == 11
