"""E2EAug, interrupted in each of its stages, is the uninterrupted run."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from e2eaug_generators import GENERATORS, OTHERS
from resuming import check

pytestmark = pytest.mark.slow


# Steps 1 to 3 are pre-training, 4 to 7 the search.
@pytest.mark.parametrize("how", ["saved", "killed"])
@pytest.mark.parametrize("stops", [[1, 3, 5, 7], [2, 4, 6]])
def test_e2eaug_in_each_stage(tmp_path: Path, stops: list[int], how: str) -> None:
    changes = {"engine.checkpoint_every": 2, "engine.log_every": 2}
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, stops, how)


def test_e2eaug_unrolled_with_schedulers(tmp_path: Path) -> None:
    changes = {
        "engine.iterations": 6,
        "engine.log_every": 3,
        "problems.segmentor.unroll_steps": 2,
        "problems.segmentor.accumulate": 1,
        "problems.segmentor.scheduler": {"name": "cosine", "length": 6, "step": "epoch"},
    }
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, [6, 8], "saved")


@pytest.mark.parametrize("row", ["frozen", "decoder", "level three", "masks", "rich"])
def test_rows_of_e2eaug(tmp_path: Path, row: str) -> None:
    rows: dict[str, Any] = {
        "level three": {"level3": {"synthetic_weight": True, "guidance": 0.5, "guidance_steps": 9}},
        "masks": {"level3.mask_augmentation": True, "mask_augmentation.scale": [0.9, 1.1]},
        "rich": {"generator.candidates": "rich"},
        "frozen": {"gan.frozen": True},
        "decoder": {"generator.search": "decoder"},
    }
    check(lambda out: tiny.build("e2eaug", rows[row], out), tmp_path, [5], "saved")


@pytest.mark.parametrize("generator", OTHERS)
def test_other_generators(tmp_path: Path, generator: str) -> None:
    """With their spectral vectors; in pre-training and in the search."""
    changes = {**GENERATORS[generator], "gan.pretrain": 2, "engine.iterations": 3}
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, [1, 3, 4], "saved")
