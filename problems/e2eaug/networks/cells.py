"""The cell of E2EAug's architecture search: three aligned strided convolutions, weighted.

A cell (E2EAug, section 3.2) computes y = sum_k w_k o_k(x). Its candidates o_k are convolutions, or
transposed convolutions, with kernel-stride-padding 4-2-1, 6-2-2 and 8-2-3: all halve (double) an
even side, and all are centred alike, so a smaller kernel is a larger one with a border of zeros and

    sum_k w_k conv(x, W_k) = conv(x, w_1 pad(W_4, 2) + w_2 pad(W_6, 1) + w_3 W_8), stride 2, padding
    3.

`mix` computes either side of this equation, both differentiable any number of times in x, the W_k
and w, and picks the faster one from the shapes alone (nothing is read back from the device).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = (4, 6, 8)
CANDIDATES = ("4-2-1", "6-2-2", "8-2-3")

# `mix` merges where positions of the smaller map times batch reach this number. Merging saves 52
# of 116 multiplications per position and costs memory traffic in proportion to the kernels alone,
# so the number doesn't depend on the widths. Measured with `benchmarks/cell.py` (one thread of a
# CPU, torch 2.15): time of forward and backward of the separate way over the merged one, so that
# merging wins above 1; median over both kinds of cell.
#
#     positions x batch     16    32    64    128   256   512   1024   2048   4096
#     width 16              0.53  0.67  0.71  0.91  1.16  1.45  1.71   1.82   2.17
#     width 64              0.50  0.59  0.69  0.76  0.88  1.08  1.28
#
# On 1x1 and 2x2 maps, where taps are cut off, the two are level (0.94 to 1.00). For its backward
# the separate way keeps three output maps, the merged way one 8x8 kernel: at 128x128 with 64
# channels and batch 4 that is 48 MiB against 0.05, at 4x4 with 512 channels 0.4 against 64.
MERGE_FROM = 256


def _convolve(x: Tensor, kernel: Tensor, padding: tuple[int, int], transposed: bool) -> Tensor:
    if transposed:
        return functional.conv_transpose2d(x, kernel, stride=2, padding=padding)
    return functional.conv2d(x, kernel, stride=2, padding=padding)


def _cut(kernel: Tensor, rows: int, columns: int) -> Tensor:
    """Drop `rows` and `columns` from each end of the kernel; negative counts add zeros."""
    if not rows and not columns:
        return kernel
    return functional.pad(kernel, (-columns, -columns, -rows, -rows))


def _unreachable(positions: int) -> int:
    """Taps at each end of the 8-tap frame that touch only padding.

    With m positions on the small side, small position s and tap t meet at 2 s - 3 + t on the large
    side (0 to 2 m - 1), so t runs from 3 - 2 (m - 1) to 2 m + 2: 3..4 for m = 1, 1..6 for m = 2.
    """
    return max(0, 5 - 2 * positions)


def _merge(
    kernels: Sequence[Tensor], weights: Sequence[Tensor], rows: int = 0, columns: int = 0
) -> Tensor:
    """w_1 pad(W_4, 2) + w_2 pad(W_6, 1) + w_3 W_8 without its outer `rows` and `columns`.

    From the inside out and padded after the product: half the memory traffic of padding first.
    """
    total = None
    for index, kernel in enumerate(kernels):
        border = (8 - SIZES[index]) // 2
        part = weights[index] * _cut(kernel, max(0, rows - border), max(0, columns - border))
        if total is not None:
            grow_rows = (part.shape[-2] - total.shape[-2]) // 2
            grow_columns = (part.shape[-1] - total.shape[-1]) // 2
            part = part + _cut(total, -grow_rows, -grow_columns)
        total = part
    assert total is not None
    return total


def mix(
    x: Tensor,
    kernels: Sequence[Tensor],
    weights: Tensor,
    transposed: bool,
    merge: bool | None = None,
) -> Tensor:
    """The weighted sum of the three candidates' outputs, without biases.

    Args:
        x: (B, Cin, H, W); for a convolution H and W are even.
        kernels: three kernels with sides 4, 6 and 8: (Cout, Cin, k, k), transposed (Cin, Cout, k,
            k). weights: (3,) selection weights. transposed: whether the candidates are transposed
            convolutions. merge: True to build one 8x8 kernel, False to run the candidates one by
            one, None for the
            rule (see `MERGE_FROM`).

    Returns:
        (B, Cout, H / 2, W / 2), transposed (B, Cout, 2 H, 2 W).

    Taps that meet nothing but padding (8x8 kernels on a 2x2 or 4x4 map) are cut off before the
    convolution; their gradient is exactly zero.
    """
    height, width = x.shape[-2:]
    if not transposed:
        assert height % 2 == width % 2 == 0, "the candidates agree on even sides only"
        height, width = height // 2, width // 2
    cut_rows, cut_columns = _unreachable(height), _unreachable(width)
    if merge is None:
        merge = x.shape[0] * height * width >= MERGE_FROM
    # At once: the gradient of one element alone is a vector of zeros, filled, written to and added.
    parts = weights.unbind()
    if merge:
        kernel = _merge(kernels, parts, cut_rows, cut_columns)
        return _convolve(x, kernel, (3 - cut_rows, 3 - cut_columns), transposed)
    outputs = []
    for index, kernel in enumerate(kernels):
        border = (8 - SIZES[index]) // 2
        rows, columns = max(0, cut_rows - border), max(0, cut_columns - border)
        padding = (3 - border - rows, 3 - border - columns)
        y = _convolve(x, _cut(kernel, rows, columns), padding, transposed)
        outputs.append(parts[index] * y)
    return outputs[0] + outputs[1] + outputs[2]


class Cell(nn.Module):
    """Three candidate operators that replace one strided convolution of the generator.

    Args:
        in_channels, out_channels: Cin and Cout.
        transposed: False halves the sides (encoder), True doubles them (decoder).
        bias: whether each candidate has a bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, transposed: bool, bias: bool = False
    ) -> None:
        super().__init__()
        self.transposed = transposed
        first, second = (in_channels, out_channels) if transposed else (out_channels, in_channels)
        self.kernel4 = nn.Parameter(torch.empty(first, second, 4, 4))
        self.kernel6 = nn.Parameter(torch.empty(first, second, 6, 6))
        self.kernel8 = nn.Parameter(torch.empty(first, second, 8, 8))
        self.bias = nn.Parameter(torch.zeros(3, out_channels)) if bias else None
        for kernel in (self.kernel4, self.kernel6, self.kernel8):
            nn.init.normal_(kernel, 0.0, 0.02)

    def forward(self, x: Tensor, weights: Tensor, merge: bool | None = None) -> Tensor:
        """x (B, Cin, H, W), weights (3,) -> (B, Cout, H / 2, W / 2), or twice H and W."""
        kernels = (self.kernel4, self.kernel6, self.kernel8)
        y = mix(x, kernels, weights, self.transposed, merge)
        return y if self.bias is None else y + (weights @ self.bias)[:, None, None]

    @torch.no_grad()
    def merged(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernel (8x8) and bias of the one operator equal to this cell with (3,) `weights`."""
        kernel = _merge((self.kernel4, self.kernel6, self.kernel8), weights.unbind())
        return kernel, None if self.bias is None else weights @ self.bias


def plain(
    in_channels: int, out_channels: int, size: int, transposed: bool, bias: bool = False
) -> nn.Conv2d | nn.ConvTranspose2d:
    """One operator with kernel side `size` (4, 6 or 8), stride 2, initialised N(0, 0.02)."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    padding = size // 2 - 1
    operator = kind(in_channels, out_channels, size, stride=2, padding=padding, bias=bias)
    nn.init.normal_(operator.weight, 0.0, 0.02)
    if operator.bias is not None:
        nn.init.zeros_(operator.bias)
    return operator
