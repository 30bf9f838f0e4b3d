"""The merged generator as a file of its own."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from commanding import one_line

from mlseg import checkpoint, export, run
from mlseg.problems.e2eaug.masks import encode
from mlseg.problems.e2eaug.networks.pix2pix import Generator

pytestmark = pytest.mark.slow  # trains for seconds


def test_a_mask_in_an_image_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug")
    assert run.main([str(config), "--out", str(out)]) == 0
    arguments = [str(out), "--what", "generator", "--format"]
    assert export.main([*arguments, "torchscript"]) == 0
    about = json.loads((out / "generator.ts.json").read_text())
    assert about["what"] == "generator"
    assert about["checked"]["largest_difference"] <= 1e-5
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[:, 8:20, 4:28] = 1
    image = torch.jit.load(str(out / "generator.ts"))(mask)
    state = checkpoint.load(out / "checkpoints" / "generator.pt")
    plain = Generator(**state["settings"]).eval()
    plain.load_state_dict(state["module"])
    with torch.no_grad():
        expected = (plain(encode(mask.long(), 2)) + 1) / 2
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    assert image.shape == (1, 3, 32, 32)
    assert 0 <= image.min() < image.max() <= 1

    assert export.main([*arguments, "torch"]) == 0
    file = out / "checkpoints" / "generator.pt"
    for damage in ({"levels": 60}, {"kernels": [4]}, {"channels": 8}, {"channels": "many"}):
        checkpoint.save(file, {**state, "settings": {**state["settings"], **damage}})
        capsys.readouterr()
        assert export.main([*arguments, "torch"]) == 2
        assert "generator.pt" in one_line(capsys)
    file.unlink()
    assert export.main([*arguments, "torch"]) == 2
    assert "a run writes its merged generator when it ends" in one_line(capsys)
    assert export.main([str(out), "--what", "alphas"]) == 2
    assert "has none; it has segmentor, generator" in one_line(capsys)
