"""The cell of E2EAug's architecture search: three aligned strided convolutions, weighted and summed.

A cell (E2EAug, section 3.2) computes y = sum_k w_k o_k(x). Its candidates o_k are convolutions, or
transposed convolutions, with kernel-stride-padding 4-2-1, 6-2-2 and 8-2-3: all halve (double) an even
side, and all are centred alike, so a smaller kernel is a larger one with a border of zeros and

    sum_k w_k conv(x, W_k) = conv(x, w_1 pad(W_4, 2) + w_2 pad(W_6, 1) + w_3 W_8), stride 2, padding 3.

`mix` computes either side of this equation, both differentiable any number of times in x, the W_k and
w, and picks the faster one from the shapes alone (nothing is read back from the device).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = (4, 6, 8)
CANDIDATES = ("4-2-1", "6-2-2", "8-2-3")

MERGE_FROM = 32


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
        kernels: three kernels with sides 4, 6 and 8: (Cout, Cin, k, k), transposed (Cin, Cout, k, k).
        weights: (3,) selection weights.
        transposed: whether the candidates are transposed convolutions.
        merge: True to build one 8x8 kernel, False to run the candidates one by one, None for the
            rule (see `MERGE_FROM`).

    Returns:
        (B, Cout, H / 2, W / 2), transposed (B, Cout, 2 H, 2 W).

    Taps that meet nothing but padding (8x8 kernels on a 2x2 or 4x4 map) are cut off before the
    convolution; their gradient is exactly zero.
    """
    height, width = x.shape[-2:]
    if not transposed:
        assert height % 2 == 0 and width % 2 == 0, "the candidates agree on even sides only"
        height, width = height // 2, width // 2
    cut_rows, cut_columns = _unreachable(height), _unreachable(width)
    if merge is None:
        merge = x.shape[0] * height * width >= MERGE_FROM
    parts = []
    for index, (size, kernel) in enumerate(zip(SIZES, kernels, strict=True)):
        border = (8 - size) // 2
        if merge:
            framed = _cut(kernel, cut_rows - border, cut_columns - border)
            parts.append(weights[index] * framed)
        else:
            rows, columns = max(0, cut_rows - border), max(0, cut_columns - border)
            padding = (3 - border - rows, 3 - border - columns)
            y = _convolve(x, _cut(kernel, rows, columns), padding, transposed)
            parts.append(weights[index] * y)
    total = parts[0] + parts[1] + parts[2]
    if merge:
        return _convolve(x, total, (3 - cut_rows, 3 - cut_columns), transposed)
    return total


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
        self.in_channels = in_channels
        self.out_channels = out_channels
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
    def merged(self, weights: Tensor) -> nn.Conv2d | nn.ConvTranspose2d:
        """One 8x8 operator equal to this cell with the given (3,) weights; new tensors."""
        operator = plain(self.in_channels, self.out_channels, 8, self.transposed, self.bias is not None)
        operator.to(self.kernel8.device, self.kernel8.dtype)
        operator.weight.copy_(
            weights[0] * _cut(self.kernel4, -2, -2)
            + weights[1] * _cut(self.kernel6, -1, -1)
            + weights[2] * self.kernel8
        )
        if operator.bias is not None and self.bias is not None:
            operator.bias.copy_(weights @ self.bias)
        return operator

    @torch.no_grad()
    def candidate(self, index: int) -> nn.Conv2d | nn.ConvTranspose2d:
        """A copy of candidate `index` (0 to 2) as an operator of its own, with weight 1."""
        kernel = (self.kernel4, self.kernel6, self.kernel8)[index]
        bias = self.bias is not None
        operator = plain(self.in_channels, self.out_channels, SIZES[index], self.transposed, bias)
        operator.to(kernel.device, kernel.dtype)
        operator.weight.copy_(kernel)
        if operator.bias is not None and self.bias is not None:
            operator.bias.copy_(self.bias[index])
        return operator


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
