"""A cell whose candidates are different operators, none of which contains another.

The paper's three candidates are nested: whatever their weights are, the mixture is one 8x8
convolution (`cells`). Here each candidate can express what the others can't: taps beyond an 8x8
kernel, dense kernels, or with fewer parameters products of a kernel per channel, shared taps, none
at all. Weights then say which operators there are.

Candidates, halving (doubling) an even side:

* ``4-2-1``: a convolution of 4x4 with stride 2;
* ``dilated``: the same with its taps 3 apart, over 10x10;
* ``depthwise``: one 4x4 kernel per channel and a 1x1 convolution between channels;
* ``skip``: the mean of 2x2 (the nearest pixel), channel by channel; channels that one side lacks
  are dropped (0). No parameters;
* ``resize``: a 3x3 convolution, then the mean of 2x2 (the nearest pixel, then a 3x3 convolution).
"""

from torch import Tensor, nn
from torch.nn import functional

CANDIDATES = ("4-2-1", "dilated", "depthwise", "skip", "resize")

DILATION = 3
"""Odd, so that four taps with stride 2 halve an even side: padding (3 * DILATION - 1) / 2."""


class RichCell(nn.Module):
    """Five candidate operators that replace one strided convolution.

    Args:
        in_channels, out_channels: Cin and Cout.
        transposed: False halves the sides (encoder), True doubles them (decoder).
        bias: whether each candidate but ``skip`` has a bias.

    Weights are initialised N(0, 0.02), as pix2pix's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, transposed: bool, bias: bool = False
    ) -> None:
        super().__init__()
        self.transposed, self.out_channels = transposed, out_channels
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        padding = (3 * DILATION - 1) // 2
        # The kernels per channel stand where there are fewer pixels to go over.
        each = out_channels if transposed else in_channels
        self.plain = kind(in_channels, out_channels, 4, 2, 1, bias=bias)
        self.dilated = kind(in_channels, out_channels, 4, 2, padding, dilation=DILATION, bias=bias)
        self.depthwise = kind(each, each, 4, 2, 1, groups=each, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.resized = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        for module in self.children():
            assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
            # A product of two is to have the size of one.
            std = 0.02 if module not in (self.depthwise, self.pointwise) else 0.02**0.5
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def candidates(self, x: Tensor) -> list[Tensor]:
        """(B, Cin, H, W) -> five times (B, Cout, H / 2, W / 2), or twice H and W."""
        if self.transposed:
            large = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            separable, skip = self.depthwise(self.pointwise(x)), large
            resized = self.resized(large)
        else:
            separable, skip = self.pointwise(self.depthwise(x)), functional.avg_pool2d(x, 2)
            resized = functional.avg_pool2d(self.resized(x), 2)
        skip = skip[:, : self.out_channels]
        missing = self.out_channels - skip.shape[1]
        if missing:
            skip = functional.pad(skip, (0, 0, 0, 0, 0, missing))
        return [self.plain(x), self.dilated(x), separable, skip, resized]

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The sum of the candidates' outputs with (5,) ``weights``."""
        outputs = self.candidates(x)
        first, *rest = weights.unbind()
        total = first * outputs[0]
        for weight, output in zip(rest, outputs[1:], strict=True):
            total = total + weight * output
        return total
