"""SegAN on real images, where $MLSEG_DATA says they are; skipped elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from segan_game import PLAIN, watch

from mlseg.engines.segmentation import Segmentation

pytestmark = pytest.mark.slow  # reads or trains for seconds

ISIC = {
    "data": {
        "name": "isic2018",
        "image_size": 36,
        "train": 12,
        "val": 4,
        "test": 4,
    },
    "augmentation": {"window": 32, "flip_horizontal": 0.5, "hue": 0.05, "contrast": 0.2},
    "problems.critic.batch_size": 6,
}
CAMVID = {
    "data": {"name": "camvid", "image_size": [40, 56], "train": 6, "val": 4, "test": 4},
    "augmentation": {"window": [32, 48], "flip_horizontal": 0.5},
}


def with_root(changes: dict[str, Any], root: Path) -> dict[str, Any]:
    return {**changes, "data": {**changes["data"], "root": str(root)}}


def test_1_each_step_moves_the_loss_its_way(real: Callable[[str], Path]) -> None:
    engine = tiny.build("segan", {**with_root(ISIC, real("isic2018")), **PLAIN})
    assert engine.hook(Segmentation).data.provenance == "real"
    seen = watch(engine)
    for _ in range(5):
        engine.iterate()
        assert seen["after critic"][0] > seen["before critic"][0]
        assert seen["after segmentor"][0] < seen["before segmentor"][0]


@pytest.mark.parametrize("layout", ["each", "stacked"])
def test_camvid_with_both_critic_layouts(
    layout: str, real: Callable[[str], Path], tmp_path: Path
) -> None:
    changes = {**with_root(CAMVID, real("camvid")), "critic.classes": layout}
    engine = tiny.build("segan", changes, tmp_path)
    assert engine.hook(Segmentation).data.spec.num_classes == 11
    engine.run()
    figures = engine.results()["scores"]["best"]["test"]
    assert engine.results()["provenance"] == "real"
    assert 0 < figures["pooled_jaccard"] < 1
    assert 0 < figures["hd95"] < 600, "in pixels of the frames, 480x360"
