"""The blocks of ``docs/trained-models.md``, and the README's on trained models, as they stand."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from mlseg import run
from mlseg.__main__ import COMMANDS, main

pytestmark = pytest.mark.slow  # trains for seconds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trained-models.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, a config of other classes and a photograph."""
    place = tmp_path_factory.mktemp("place")
    for seed, name in ((1, "try"), (2, "other")):
        config = tiny.write_config(place / f"{name}.yaml", changes={"seed": seed})
        assert run.main([str(config), "--out", str(place / "runs" / name)]) == 0
    tiny.write_config(place / "scenes.yaml", changes={"data.name": "synthetic_scenes"})
    Image.effect_noise((50, 41), 80).convert("RGB").save(place / "photograph.jpg")
    return place


def test_every_block_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "trained_models"}
    for match in BLOCK.finditer(text):
        language, block = match.groups()
        line = text[: match.start(2)].count("\n")
        if language == "python":
            exec(compile("\n" * line + block, str(PAGE), "exec"), names)
            continue
        assert language == "sh"
        for words in map(shlex.split, block.splitlines()):
            assert words[:2] == ["python", "-m"], words
            command = words[2].removeprefix("mlseg.")
            assert command in COMMANDS
            assert main([command, *without_comment(words[3:])]) == 0, words
    assert names["chances"].shape[-3:] == (2, 41, 50)
    assert [mask.shape for mask in names["masks"]] == [(41, 50)] * 3
    assert np.array_equal(names["masks"][0], names["masks"][1])
    assert names["logits"].shape == (1, 2, 32, 32)
    assert names["mask"].shape[-2:] == (41, 50)
    assert (folder / "masks" / "photograph_probabilities.npz").exists()
    for name in ("tuned", "scenes"):
        assert (folder / "runs" / name / "results.json").exists()


def without_comment(words: list[str]) -> list[str]:
    return words[: words.index("#")] if "#" in words else words


def test_the_readmes_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [b for kind, b in BLOCK.findall(readme) if kind == "python" and "mlseg.load" in b]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    assert names["mask"].shape == (41, 50)
