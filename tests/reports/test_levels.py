"""``--dry-run --graph``: a picture of the levels."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import tiny
from commanding import one_line
from PIL import Image

from mlseg import run
from mlseg.engines.engine import Engine
from mlseg.reports.levels import draw_levels


def words(path: Path) -> list[str]:
    return ["".join(e.itertext()) for e in ET.parse(path).iter() if e.tag.endswith("}text")]


@pytest.mark.parametrize("dry", ["--dry-run", "--dry-run=timed"])
def test_levels_and_paths_are_drawn(dry: str, tmp_path: Path) -> None:
    config, out = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug"), tmp_path / "levels.svg"
    assert run.main([str(config), dry, "--graph", str(out)]) == 0
    found = words(out)
    for name in ("generator", "discriminator", "segmentor", "architecture"):
        assert name in found
    paths = [text for text in found if text.startswith("hypergradient ")]
    assert paths == [
        "hypergradient architecture \N{RIGHTWARDS ARROW} segmentor \N{RIGHTWARDS ARROW} generator "
        "\N{RIGHTWARDS ARROW} architecture",
        "hypergradient architecture \N{RIGHTWARDS ARROW} segmentor "
        "\N{RIGHTWARDS ARROW} architecture",
    ]  # fmt: skip
    assert any(text.startswith("stage search") for text in found)
    assert set(tmp_path.iterdir()) == {config, out}
    before = out.read_bytes()
    assert run.main([str(config), "--dry-run", "--graph", str(out)]) == 0, "it is ours"
    assert out.read_bytes() == before, "the same picture from the same program"


def test_a_single_level_and_a_png(tmp_path: Path) -> None:
    config, out = tiny.write_config(tmp_path / "tiny.yaml"), tmp_path / "levels.png"
    assert run.main([str(config), "--dry-run", "--graph", str(out)]) == 0
    with Image.open(out) as picture:
        assert min(picture.size) > 100
    assert run.main([str(config), "--dry-run", "--graph", str(out)]) == 0


def test_what_is_no_picture_of_ours_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, theirs = tiny.write_config(tmp_path / "tiny.yaml"), tmp_path / "theirs.svg"
    theirs.write_text("<svg/>")
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    (tmp_path / "link.png").symlink_to(theirs)
    monkeypatch.setattr(Engine, "__init__", lambda *_, **__: pytest.fail("it is refused first"))
    for name, said in (
        ("theirs.svg", "is there already"),
        ("folder.svg", "is there already"),
        ("link.png", "is there already"),
        ("levels.pdf", "ends in .svg or .png"),
        ("levels", "ends in .svg or .png"),
        ("theirs.svg/levels.svg", "can't write there"),
    ):
        capsys.readouterr()
        assert run.main([str(config), "--dry-run", "--graph", str(tmp_path / name)]) == 2
        assert said in (line := one_line(capsys))
        assert "--graph" in line
    assert run.main([str(config), "--graph", str(tmp_path / "new.svg")]) == 2
    assert "give --dry-run too" in one_line(capsys)
    assert theirs.read_text() == "<svg/>"


def test_stages_of_other_graphs_stand_side_by_side(tmp_path: Path) -> None:
    engine = tiny.build("segan", {"warmup_epochs": 1, "game": "stackelberg"})
    draw_levels(engine, tmp_path / "levels.svg")
    found = words(tmp_path / "levels.svg")
    assert any(text.startswith("stage warmup") for text in found)
    assert any(text.startswith("stage game") for text in found)
    assert "idle: critic" in found
