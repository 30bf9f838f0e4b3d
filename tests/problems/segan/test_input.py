"""What SegAN refuses: one clear line each, before any work."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from mlseg.config import load
from mlseg.errors import UserError
from mlseg.problems.segan import wiring
from mlseg.problems.systems import parse_run
from mlseg.segmentation.data import load_data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.image_size": 36}, "segmentor.levels: 3 levels halve"),
        ({"augmentation": {"window": 30}}, "augmentation.window or data.image_size multiples of 8"),
        ({"augmentation": {"window": 64}}, "augmentation.window: 64x64 pixels don't fit"),
        ({"critic.layers": 6}, "critic.layers: 6 need images of 64 pixels"),
        ({"problems.critic.batch_size": 1}, "problems.critic.batch_size: 1 image a batch"),
        ({"data.train": 1}, "data.train: 1 image a batch"),
    ],
)
def test_what_the_game_refuses_is_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.build("segan", changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_outside_the_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(settings: Any) -> Any:
        data = load_data(settings)
        data.train.masks[0, 3, 4] = 255
        return data

    monkeypatch.setattr(wiring, "load_data", spoiled)
    with pytest.raises(UserError, match="labels 255 in the training masks are none of the 2"):
        tiny.build("segan")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": 1.0}, "threshold"),
        ({"problems.segmentor.batch_size": 5}, "the segmentor takes the critic's batch"),
        ({"game": "alternate"}, "alternating"),
        ({"loss.reduction": "mean"}, "layer_mean"),
        ({"critic.class": "each"}, "did you mean 'critic.classes'"),
        ({"problems.critic.hypergradient": {"method": "identiy"}}, "did you mean 'identity'"),
        ({"problems.segmentor.scheduler": {"name": "linear", "step": "epoch"}}, "length"),
        ({"segmentor.encoder": "resnet18"}, "segmentor.encoder: unknown key; valid here: name, we"),
        ({"segmentor.levels": 7}, "segmentor.levels: should be less than or equal to 6, got 7"),
        ({"critic.layers": 7}, "critic.layers: should be less than or equal to 6, got 7"),
    ],
)
def test_mistakes_in_the_config_are_one_line(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", "segan", changes)
    with pytest.raises(UserError) as caught:
        parse_run(load(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
