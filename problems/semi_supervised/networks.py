"""Swin-UNet: a U of shifted-window transformer blocks, the second network of cross teaching."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mlseg.segmentation.nets.layers import pad_to_multiple
from mlseg.segmentation.nets.segmentor import SEGMENTORS

PATCH = 4
"""Pixels a side that a token of the first stage stands for."""


@SEGMENTORS.register("swin_unet")
class SwinUNet(nn.Module):
    """Swin-UNet (Cao et al., ECCV Workshops 2022, arXiv:2105.05537), section 3 and figure 1.

    Swin-T's encoder: patches of 4x4 pixels, stages of windowed attention with every second block
    shifted, patch merging between them. The decoder mirrors it: patch expanding, concatenation with
    the encoder's stage, a linear map to its width, as many blocks; at last an expansion by 4 and a
    1x1 convolution. 27.17 M parameters at the defaults with 3 channels in and 2 classes.

    Args:
        in_channels: channels of the image.
        num_classes: K, channels of the output.
        channels: width C of the first stage; stage i has C 2^i. A multiple of ``heads``.
        levels: number of stages, the innermost one included.
        depth: blocks of a stage, on the way down and on the way up; even, for they come in pairs.
        heads: of the first stage's attention; stage i has 2^i as many.
        window: tokens a side of what attends to each other.
        stochastic_depth: how often the last encoder block's branches are left out; less before it.

    Departures from the paper: random initial weights where it takes Swin-T's of ImageNet, since
    nothing is downloaded; and images of any size, not of multiples of 224: their edges are repeated
    to multiples of 4 2^(levels - 1), and within a block the tokens are filled up to whole windows
    by ones that no other attends to.

    Raises:
        ValueError: the heads can't share the channels, or the blocks don't come in pairs.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: Annotated[int, Field(ge=1)] = 96,
        levels: Annotated[int, Field(ge=2, le=6)] = 4,
        depth: Annotated[int, Field(ge=2)] = 2,
        heads: Annotated[int, Field(ge=1)] = 3,
        window: Annotated[int, Field(ge=2)] = 7,
        stochastic_depth: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"channels: {channels} can't be shared out over {heads} heads; give a multiple of "
                f"{heads}"
            )
        if depth % 2:
            raise ValueError(f"depth: {depth} blocks don't come in pairs; give an even number")
        self.multiple = PATCH * 2 ** (levels - 1)
        widths = [channels * 2**level for level in range(levels)]
        rates = [stochastic_depth * i / (levels * depth - 1) for i in range(levels * depth)]

        def blocks(level: int) -> nn.Sequential:
            own = rates[level * depth : (level + 1) * depth]
            return nn.Sequential(
                *(
                    Block(widths[level], heads * 2**level, window, i % 2 * (window // 2), rate)
                    for i, rate in enumerate(own)
                )
            )

        self.embed = nn.Conv2d(in_channels, channels, PATCH, stride=PATCH)
        self.embed_norm = nn.LayerNorm(channels)
        self.encoder = nn.ModuleList(blocks(level) for level in range(levels))
        self.merge = nn.ModuleList(Merge(width) for width in widths[:-1])
        self.bottom_norm = nn.LayerNorm(widths[-1])
        upwards = list(range(levels - 1))[::-1]
        self.expand = nn.ModuleList(Expand(widths[level + 1], 2, halve=True) for level in upwards)
        self.join = nn.ModuleList(nn.Linear(2 * widths[level], widths[level]) for level in upwards)
        self.decoder = nn.ModuleList(blocks(level) for level in upwards)
        self.top_norm = nn.LayerNorm(channels)
        self.enlarge = Expand(channels, PATCH, halve=False)
        self.head = nn.Conv2d(channels, num_classes, 1, bias=False)
        self.apply(_initialise)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) image in [-1, 1] -> (B, K, H, W) logits, any H and W."""
        image, (rows, columns) = pad_to_multiple(image_BCHW, self.multiple)
        x = self.embed_norm(self.embed(image).permute(0, 2, 3, 1))  # (B, H, W, C) from here on
        skips = []
        for level, stage in enumerate(self.encoder):
            x = stage(x if level == 0 else self.merge[level - 1](x))
            skips.append(x)
        x = self.bottom_norm(skips.pop())
        for expand, join, stage in zip(self.expand, self.join, self.decoder, strict=True):
            x = stage(join(torch.cat([expand(x), skips.pop()], -1)))
        x = self.enlarge(self.top_norm(x)).permute(0, 3, 1, 2)
        return self.head(x)[..., rows, columns]


class Block(nn.Module):
    """Attention within windows, then a perceptron of four times the width; both residual.

    Args:
        shift: tokens by which the windows are shifted.
        rate: how often a branch is left out in training, sample by sample.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int, rate: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window, shift)
        self.norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) tokens to such."""
        x = x + self._kept(self.attention(self.attention_norm(x)))
        return x + self._kept(self.perceptron(self.norm(x)))

    def _kept(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self.rate
        return branch * kept / (1.0 - self.rate)


class WindowAttention(nn.Module):
    """Attention among the tokens of a window, with a bias for each relative position.

    Source: Liu et al., Swin Transformer, ICCV 2021, sections 3.1 and 3.2, equation 4.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        place = torch.arange(window)
        row, column = (grid.flatten() for grid in torch.meshgrid(place, place, indexing="ij"))
        down, right = (x[:, None] - x[None] + window - 1 for x in (row, column))
        self.pairs: Tensor
        self.register_buffer("pairs", down * (2 * window - 1) + right, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) tokens to such."""
        batch, height, width, channels = x.shape
        w, heads = self.window, self.heads
        high, wide = (-(-side // w) * w for side in (height, width))
        whole = (high, wide) == (height, width)
        # One window holds all: nothing would come in by a shift.
        shifts = (self.shift if high > w else 0, self.shift if wide > w else 0)
        if not whole:
            x = nn.functional.pad(x, (0, 0, 0, wide - width, 0, high - height))
        if any(shifts):
            x = x.roll((-shifts[0], -shifts[1]), (1, 2))
        windows = _windows(x, w)  # (B, windows, tokens, C)
        q, k, v = self.project_in(windows).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) * (channels // heads) ** -0.5
        scores = scores + self.bias[self.pairs].permute(2, 0, 1)
        if any(shifts) or not whole:
            scores = scores + self._apart((height, width), (high, wide), shifts, scores)[:, None]
        y = self.project_out((scores.softmax(-1) @ v).transpose(2, 3).flatten(-2))
        y = y.view(batch, high // w, wide // w, w, w, channels).transpose(2, 3)
        y = y.reshape(batch, high, wide, channels)
        if any(shifts):
            y = y.roll(shifts, (1, 2))
        return y if whole else y[:, :height, :width].contiguous()

    def _apart(
        self, size: tuple[int, int], filled: tuple[int, int], shifts: tuple[int, int], like: Tensor
    ) -> Tensor:
        """(windows, tokens, tokens): minus infinity for pairs that don't attend to each other.

        Those are tokens that the shift has brought together from opposite edges, and filling.
        """
        regions = []
        for side, whole, shift in zip(size, filled, shifts, strict=True):
            place = torch.arange(whole, device=like.device)
            region = (place >= side).long()  # filling
            # In the shifted frame the first `shift` rows come last.
            regions.append(torch.where(place < shift, 2, region).roll(-shift))
        region = (regions[0][:, None] * 3 + regions[1])[None, :, :, None]
        region = _windows(region, self.window)[0, :, :, 0]
        differ = region[:, :, None] != region[:, None, :]
        return torch.zeros_like(differ, dtype=like.dtype).masked_fill_(differ, float("-inf"))


class Merge(nn.Module):
    """2x2 neighbours to one token of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H / 2, W / 2, 2 C)."""
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        return self.reduce(self.norm(x.reshape(batch, height // 2, width // 2, 4 * channels)))


class Expand(nn.Module):
    """A token to ``factor`` x ``factor`` of them, of half its width or of the same."""

    def __init__(self, width: int, factor: int, halve: bool) -> None:
        super().__init__()
        self.factor, self.width = factor, width // 2 if halve else width
        self.widen = nn.Linear(width, factor**2 * self.width, bias=False)
        self.norm = nn.LayerNorm(self.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H f, W f, C / 2 or C)."""
        batch, height, width, _ = x.shape
        f = self.factor
        x = self.widen(x).view(batch, height, width, f, f, self.width).transpose(2, 3)
        return self.norm(x.reshape(batch, height * f, width * f, self.width))


def _windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) to (B, windows, tokens of one, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(batch, -1, window**2, channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
