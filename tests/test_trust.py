"""A stranger's run and checkpoint are read; code that they name runs on --trust alone."""

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commanding import one_line, trained
from PIL import Image

from mlseg import calibrate, checkpoint, evaluate, predict

IMPORTER = "mlseg.config.registry"
EVIL = (
    "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
    "def build(channels, classes): raise ValueError('evil')\n"
)


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"system": "evil:build"}, False),
        ({"imports": ["evil"]}, False),
        ({"segmentor.name": "evil:build"}, False),
        ({"data.name": "evil:build"}, True),
        ({"data.name": f"{IMPORTER}:import_module", "data.options": {"name": "evil"}}, True),
        ({"data.name": "no_such_set", "imports": ["evil"]}, True),
    ],
)
def test_a_foreign_run_brings_no_code(
    change: dict[str, Any],
    needed: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its config names a module; scoring asks for trust where it can't do without.

    Its checkpoints don't hold the config that it was made with, as older ones: else a config that
    was changed is refused for that.
    """
    out = trained(tmp_path)
    for name in ("best.pt", "last.pt"):
        path = out / "checkpoints" / name
        state = checkpoint.load(path)
        state.pop("config", None)
        checkpoint.save(path, state)
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    tiny.write_config(out / "config.yaml", changes=change)
    Image.new("RGB", (40, 40)).save("image.png")
    capsys.readouterr()
    for command in (evaluate.main, calibrate.main):
        assert command([str(out)]) == (2 if needed else 0)
        if needed:
            assert "give --trust, which imports " in one_line(capsys)
    assert predict.main([str(out), "image.png", "--out", "masks"]) == 0
    assert not (tmp_path / "evil.ran").exists()
    assert "evil" not in sys.modules


def test_a_foreign_checkpoint_brings_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = trained(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    Image.new("RGB", (40, 40)).save("image.png")
    best = out / "checkpoints" / "best.pt"
    state = torch.load(best, weights_only=True)
    for found in ({"module": "evil"}, {"settings": {"name": "evil:build"}}):
        checkpoint.save(best, {**state, "segmentor": {**state["segmentor"], **found}})
        capsys.readouterr()
        assert predict.main([str(out), "image.png", "--out", "masks"]) == 2
        assert "give --trust, which imports evil" in one_line(capsys)
        assert not (tmp_path / "evil.ran").exists()
    assert predict.main([str(out), "image.png", "--out", "masks", "--trust"]) == 2
    assert "note: --trust: importing evil\n" in capsys.readouterr().err
    del sys.modules["evil"]
