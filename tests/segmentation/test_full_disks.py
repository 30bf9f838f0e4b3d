"""Exports on a full disk: the disk is said, and not the format."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mlseg import checkpoint
from mlseg.errors import RunError
from mlseg.segmentation.exporting import Exportable, write


def thing() -> Exportable:
    images = torch.ones(2, 3)
    return Exportable(
        module=nn.Identity(),
        input="image",
        outputs=["image"],
        open={},
        examples=[images],
        expected=[images],
        facts={},
        state={"module": {"weight": images}},
        again=lambda path: lambda image: image,
    )


def test_torchscript() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        write(thing(), "torchscript", Path("/dev/full"), Path("run"))


def test_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, state: object) -> None:
        raise RunError("can't write checkpoint: No space left on device") from RuntimeError("pos")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(RunError, match="No space left on device"):
        write(thing(), "torch", tmp_path / "file.pt", Path("run"))
