"""Swin-UNet: its size, any image, windows against attention over all pairs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mlseg.errors import UserError
from mlseg.problems.semi_supervised.networks import SwinUNet, WindowAttention
from mlseg.segmentation.nets import SegmentorSettings, build_segmentor

SMALL: dict[str, Any] = {"channels": 8, "levels": 3, "heads": 2, "window": 4}


def test_published_size() -> None:
    """27.17 million with 9 classes, as papers that compare with it report."""
    with torch.device("meta"):
        network = build_segmentor(SegmentorSettings(name="swin_unet"), 3, 9)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 27.17


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 37, 50), (1, 3, 100)])
def test_any_size_trains(shape: tuple[int, int, int]) -> None:
    batch, height, width = shape
    network = SwinUNet(1, 3, **SMALL)
    logits = network(torch.rand(batch, 1, height, width) * 2 - 1)
    assert logits.shape == (batch, 3, height, width)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def over_all_pairs(layer: WindowAttention, x: Tensor) -> Tensor:
    """Attention of each token to every one in its window, written without windows."""
    _, height, width, channels = x.shape
    w, heads = layer.window, layer.heads
    shifts = (layer.shift if height > w else 0, layer.shift if width > w else 0)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], 1)
    window = (place - torch.tensor(shifts)).div(w, rounding_mode="floor")
    together = (window[:, None] == window[None]).all(-1)
    offset = place[:, None] - place[None] + w - 1
    index = (offset[..., 0] * (2 * w - 1) + offset[..., 1]).clamp(0, len(layer.bias) - 1)
    q, k, v = layer.project_in(x.flatten(1, 2)).chunk(3, -1)
    out = []
    for head in range(heads):
        part = slice(head * channels // heads, (head + 1) * channels // heads)
        score = q[..., part] @ k[..., part].transpose(1, 2) / (channels / heads) ** 0.5
        score = (score + layer.bias[index][..., head]).masked_fill(~together, float("-inf"))
        out.append(score.softmax(-1) @ v[..., part])
    return layer.project_out(torch.cat(out, -1)).view_as(x)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 8), (9, 5), (3, 12), (4, 4), (2, 3)])
def test_windows_are_attention_within_them(size: tuple[int, int], shift: int) -> None:
    draw = torch.Generator().manual_seed(0)
    layer = WindowAttention(6, 2, 4, shift).double()
    x = torch.randn(2, *size, 6, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(layer(x), over_all_pairs(layer, x))


def test_branches_are_left_out_in_training_alone() -> None:
    network = SwinUNet(3, 2, stochastic_depth=0.5, **SMALL)
    image = torch.zeros(2, 3, 32, 32)
    assert not torch.equal(network(image), network(image))
    network.eval()
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"channels": 10}, r"channels: 10 can't be shared out over 3 heads; give a multiple of 3"),
        ({"depth": 3}, r"depth: 3 blocks don't come in pairs; give an even number"),
    ],
)
def test_sizes_that_it_cannot_have(settings: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=f"segmentor 'swin_unet': {said}"):
        build_segmentor(SegmentorSettings.model_validate({"name": "swin_unet", **settings}), 3, 2)
