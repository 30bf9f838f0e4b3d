"""U-Net (Ronneberger et al., MICCAI 2015) with BatchNorm and padded convolutions."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mlseg.segmentation.nets.layers import BatchNorm, pad_to_multiple
from mlseg.segmentation.nets.segmentor import SEGMENTORS


def _double_convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    # BatchNorm has a shift of its own, so the convolutions carry no bias. In-place ReLU is safe for
    # double backward here: BatchNorm saves its input, not its output.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        BatchNorm(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        BatchNorm(out_channels),
        nn.ReLU(inplace=True),
    )


@SEGMENTORS.register("unet")
class UNet(nn.Module):
    """U-Net: `levels` times halve and double, skip connections, 1x1 head.

    Args:
        in_channels: channels of the image.
        num_classes: K, channels of the output.
        channels: width C of the first level; level i has C 2^i channels. With 64 channels, 4
            levels, 3 channels in and 2 out it has 31.0 M parameters, the size E2EAug uses.
        levels: number of downsamplings.

    Departures from the 2015 paper, as in most later work: padded convolutions, so the output has
    the size of the input, and BatchNorm after each. Sides that 2^levels doesn't divide are padded
    by repeating the edge, and the output is cropped.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: Annotated[int, Field(ge=1)] = 64,
        levels: Annotated[int, Field(ge=1, le=8)] = 4,
    ) -> None:
        super().__init__()
        self.levels = levels
        widths = [channels * 2**level for level in range(levels + 1)]
        self.encoder = nn.ModuleList(
            _double_convolution(before, after)
            for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        deepest_first = list(zip(widths[1:], widths[:-1], strict=True))[::-1]
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(deep, wide, 2, stride=2) for deep, wide in deepest_first
        )
        self.decoder = nn.ModuleList(
            _double_convolution(2 * wide, wide) for _, wide in deepest_first
        )
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) image in [-1, 1] -> (B, K, H, W) logits, any H and W."""
        x, (rows, columns) = pad_to_multiple(image_BCHW, 2**self.levels)
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for enlarge, block in zip(self.enlarge, self.decoder, strict=True):
            x = block(torch.cat([skips.pop(), enlarge(x)], 1))
        return self.head(x)[..., rows, columns]
