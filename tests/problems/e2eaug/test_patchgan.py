"""PatchGAN: size, receptive field, small images."""

import pytest
import torch

from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.patchgan import PatchGAN


def test_published_size() -> None:
    assert sum(parameter.numel() for parameter in PatchGAN(6).parameters()) == 2_768_705


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field(layers: int, field: int) -> None:
    network = PatchGAN(1, channels=2, layers=layers).eval()
    pair = torch.randn(1, 1, 96, 96, requires_grad=True)
    logits = network(pair)
    side = 96 // 2**layers - 2
    assert logits.shape == (1, 1, side, side)
    logits[0, 0, side // 2, side // 2].backward()
    assert pair.grad is not None
    touched = pair.grad[0, 0].abs().sum(0).nonzero().flatten()
    assert int(touched[-1] - touched[0]) + 1 == field


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_image(layers: int) -> None:
    network = PatchGAN(2, channels=2, layers=layers)
    side = network.smallest_side
    assert network(torch.randn(1, 2, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=f"needs {side} pixels"):
        network(torch.randn(1, 2, side, side - 1))


def test_no_layers() -> None:
    with pytest.raises(UserError, match="at least 1"):
        PatchGAN(2, layers=0)
