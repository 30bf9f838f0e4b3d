"""SegAN's segmentor: residual encoder-decoder, global convolutions, adaptive logistic.

Source: Xue, Xu and Huang, ISBI 2018, section 2.2, figure 1. The critic is in `critic`.
"""

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from mlseg.precision import full
from mlseg.segmentation.nets import SEGMENTORS
from mlseg.segmentation.nets.layers import BatchNorm, pad_to_multiple

LEAK = 0.2
DEEPEST = 6
_ENCODER_KERNELS = (7, 5, 5, 5, 5)  # the last level has 4
_DECODER_KERNELS = (11, 9, 9, 7, 7, 3)  # from the image's resolution inwards


class GlobalConvolution(nn.Module):
    """A k x k neighbourhood by two pairs of one-dimensional convolutions, summed.

    (k, 1) then (1, k), and (1, k) then (k, 1), nothing between: 2 k (C_in + C_out) C_out weights in
    place of k^2 C_in C_out. Source: Peng et al., CVPR 2017, section 3.1. With a stride each
    convolution of a pair takes it along its own axis.

    Args:
        in_channels, out_channels: C_in and C_out.
        kernel: k, odd.
        stride: along both axes.
        bias: of each pair's second convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        pad = kernel // 2

        def tall(channels: int, last: bool) -> nn.Module:
            size, by = (kernel, 1), (stride, 1)
            return nn.Conv2d(channels, out_channels, size, by, (pad, 0), bias=bias and last)

        def wide(channels: int, last: bool) -> nn.Module:
            size, by = (1, kernel), (1, stride)
            return nn.Conv2d(channels, out_channels, size, by, (0, pad), bias=bias and last)

        self.tall_wide = nn.Sequential(tall(in_channels, False), wide(out_channels, True))
        self.wide_tall = nn.Sequential(wide(in_channels, False), tall(out_channels, True))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        return self.tall_wide(x_BCHW) + self.wide_tall(x_BCHW)


def convolution(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    bias: bool = False,
    global_kernel: int | None = None,
) -> nn.Module:
    """A k x k convolution that keeps or halves the sides; global from `global_kernel` upwards."""
    if global_kernel is not None and kernel >= global_kernel:
        return GlobalConvolution(in_channels, out_channels, kernel, stride, bias)
    # An even kernel halves even sides exactly with one pixel less on either side.
    padding = (kernel - 1) // 2
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=bias)


def _activation(leaky: bool) -> nn.Module:
    return nn.LeakyReLU(LEAK, inplace=True) if leaky else nn.ReLU(inplace=True)


class Residual(nn.Module):
    """1x1, 3x3 and 1x1 convolution with BatchNorm, added to the input.

    Args:
        channels: C, of input and output.
        inner: channels between; figure 1 doesn't give them.
        leaky: LeakyReLU (encoder) or ReLU (decoder).
    """

    def __init__(self, channels: int, inner: int, leaky: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            BatchNorm(inner),
            _activation(leaky),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            BatchNorm(inner),
            _activation(leaky),
            nn.Conv2d(inner, channels, 1, bias=False),
            BatchNorm(channels),
        )
        self.activation = _activation(leaky)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return self.activation(x_BCHW + self.body(x_BCHW))


class AdaptiveLogistic(nn.Module):
    """``f(z) = 1 / (1 + exp(-z / k))`` with a k that is annealed: section 2.1, equation 3.

    k = 1 is the sigmoid; a smaller k brings f closer to the step function. k and the number of
    epochs that it has been annealed for are buffers: they are saved with the model, and a resumed
    run or a prediction goes on from them.
    """

    k: Tensor
    epochs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.ones(()))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> Tensor:
        """The scaled logits ``z / k``, whose sigmoid is f(z); in float32 under autocast too."""
        return full(z) / self.k

    @torch.no_grad()
    def end_epoch(self, decay: float, every: int, floor: float) -> None:
        """Count an epoch: k = max(floor, decay^(epochs // every)).

        Computed on the device, without reading from it.
        """
        self.epochs += 1
        steps = torch.div(self.epochs, every, rounding_mode="floor")
        self.k.copy_((decay ** steps.double()).clamp_min(floor))


@SEGMENTORS.register("segan")
class SegAN(nn.Module):
    """The segmentor of figure 1, at its size with the defaults and 3x128x128 images.

    The encoder halves the sides `levels` times (kernels 7, 5, 5, 5, 5, 4; widths C, 2C, ... 32C),
    the decoder doubles them (bilinear, then kernels 3, 7, 7, 9, 9, 11; widths 16C, 8C, 4C, 2C, C,
    C), each followed by a residual block, with a skip connection between levels of one size.
    BatchNorm after every convolution but the first and the last.

    Args:
        in_channels: of the image.
        num_classes: K. Two classes are one label map, the foreground's; more are K maps, each with
            a logistic of its own.
        channels: C, 64 in figure 1.
        levels: how often the sides are halved, 2 to 6; with fewer, the deepest ones are left out.
        expansion: channels within a residual block in units of its channels. 0.25 makes 102 M
            parameters in all, 2 (the public code) 375 M.
        global_kernel: smallest kernel of the decoder that becomes a global convolution. 7: section
            2.2's sentence on the decoder (kernels 11, 9, 7) and the public code; 9: the caption of
            figure 1 ("greater than 7"), 144 M parameters.

    Sides that 2^levels doesn't divide are padded by repeating the edge, and the output is cropped.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: PositiveInt = 64,
        levels: Annotated[int, Field(ge=2, le=DEEPEST)] = DEEPEST,
        expansion: PositiveFloat = 0.25,
        global_kernel: PositiveInt = 7,
    ) -> None:
        super().__init__()
        if not 2 <= levels <= DEEPEST:
            raise ValueError(f"levels: from 2 to {DEEPEST}, not {levels}")
        self.levels = levels
        self.num_maps = 1 if num_classes == 2 else num_classes
        self.logistic = AdaptiveLogistic()
        widths = [channels * 2**level for level in range(levels)]
        kernels = [*_ENCODER_KERNELS[: levels - 1], 4]

        def residual(width: int, leaky: bool) -> Residual:
            return Residual(width, max(1, round(width * expansion)), leaky)

        self.encoder = nn.ModuleList()
        for level, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            before = widths[level - 1] if level else in_channels
            norm = [BatchNorm(width)] if level else []
            self.encoder.append(
                nn.Sequential(
                    convolution(before, width, kernel, stride=2, bias=not level),
                    *norm,
                    _activation(leaky=True),
                    residual(width, leaky=True),
                )
            )
        self.decoder = nn.ModuleList()
        below = widths[-1]
        for level in reversed(range(levels)):
            # Level 0 gives the image's size, at which the encoder has nothing to add.
            width = widths[max(level - 1, 0)]
            self.decoder.append(
                nn.Sequential(
                    convolution(below, width, _DECODER_KERNELS[level], global_kernel=global_kernel),
                    BatchNorm(width),
                    _activation(leaky=False),
                    residual(width, leaky=False),
                )
            )
            below = 2 * width
        self.head = nn.Conv2d(channels, self.num_maps, 5, padding=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, LEAK)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) image in [-1, 1] -> (B, K, H, W) logits, any H and W.

        For two classes they are 0 and z / k, so that their softmax is 1 - f(z) and f(z); for more
        they are z / k, whose sigmoid is f(z) map by map.
        """
        x, (rows, columns) = pad_to_multiple(image_BCHW, 2**self.levels)
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = block(functional.interpolate(x, scale_factor=2, mode="bilinear"))
            if skips:
                x = torch.cat([x, skips.pop()], 1)
        scaled = self.logistic(self.head(x)[..., rows, columns])
        if self.num_maps > 1:
            return scaled
        return torch.cat([torch.zeros_like(scaled), scaled], 1)

    @property
    def temperature(self) -> float:
        """The present k of the logistic, by which the logits have been divided."""
        return float(self.logistic.k)

    def probabilities(self, logits_BKHW: Tensor) -> Tensor:
        """(B, K, H, W) logits -> f(z) of every class; they add up to 1 for two classes only."""
        return logits_BKHW.softmax(1) if self.num_maps == 1 else logits_BKHW.sigmoid()
