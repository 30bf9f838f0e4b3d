"""mlseg evaluate: a trained model's scores, on its own data and on others."""

import json
from pathlib import Path

import numpy as np
import pytest
from commanding import one_line, train, trained
from PIL import Image

from mlseg import evaluate


def test_evaluate_gives_what_the_run_gave(tmp_path: Path) -> None:
    out = trained(tmp_path)
    scores = tmp_path / "scores.json"
    assert evaluate.main([str(out), "--out", str(scores), "--device", "cpu"]) == 0  # as it trained
    evaluated = json.loads(scores.read_text())["scores"]["test"]
    reported = json.loads((out / "results.json").read_text())["scores"]["best"]["test"]
    per_image = evaluated.pop("per_image")
    assert evaluated == reported
    assert {"thresholded_jaccard", "hd95", "pooled_dice", "pooled_sensitivity"} <= set(reported)
    mean = sum(image["jaccard"] for image in per_image.values()) / len(per_image)
    assert mean == pytest.approx(reported["jaccard"])


def test_evaluate_on_another_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(tmp_path)
    folder = tmp_path / "own"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(2):
        image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        mask = np.zeros((40, 50), np.uint8)
        mask[10:30, 10:40] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    capsys.readouterr()
    assert evaluate.main([str(out), "--data", "folder", "--root", str(folder)]) == 0
    assert "folder" in capsys.readouterr().out
    assert evaluate.main([str(out), "--data", "camvid"]) == 2
    assert "camvid" in one_line(capsys)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("synthetic_scenes", "name a data set by --data"),
        ("voc2012", "--data voc2012 scores its validation part, which has chosen the weights"),
    ],
)
def test_evaluate_without_a_test_split_says_so(
    name: str, mend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"data.name={name}", "data.when_missing=synthetic", "data.test=0", "data.root=none"]
    out = train(tmp_path, *changes, "data.image_size=32", "data.train=4", "data.val=2")
    capsys.readouterr()
    assert evaluate.main([str(out), "--out", str(tmp_path / "scores.json")]) == 2
    said = one_line(capsys)
    assert "its test split is empty" in said
    assert said.rstrip(")").endswith(mend)
    assert not (tmp_path / "scores.json").exists()
