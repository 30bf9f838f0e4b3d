"""Spectral normalisation (Miyato et al., ICLR 2018) whose vectors stand still within a step.

The largest singular value of a weight W, taken as a matrix, is estimated as u^T W v, where u and v
are carried along by power iteration, one round per step. torch's own turns them in every forward
pass in training. A step evaluated again, by a finite difference or a replay, would then see another
function than the step did. Here a forward pass changes nothing: the level whose network it is turns
the vectors before its step (`turn`), and everything until the next sees the same.

u and v are constants in the derivative, sigma is not: d sigma / d W = u v^T is part of every
gradient, first and second.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

WARM_UP = 15
"""Rounds of power iteration at the start, as torch has."""


class SpectralConv2d(nn.Conv2d):
    """A convolution with the weight W / sigma(W), Xavier's initialisation times 0.02.

    Its vectors ``left`` (Cout,) and ``right`` (Cin k k,) are buffers, of unit length.
    """

    left: Tensor
    right: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias=bias)
        nn.init.xavier_normal_(self.weight, 0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        matrix = self.weight.detach().flatten(1)
        self.register_buffer("left", functional.normalize(torch.randn(len(matrix)), dim=0))
        self.register_buffer("right", functional.normalize(torch.randn(matrix.shape[1]), dim=0))
        for _ in range(0 if matrix.is_meta else WARM_UP):
            self.turn()

    @torch.no_grad()
    def turn(self) -> None:
        """One round of power iteration.

        The vectors are replaced, not written to: a graph that is still to be walked may have saved
        them.
        """
        matrix = self.weight.flatten(1)
        self.right = functional.normalize(matrix.t() @ self.left, dim=0)
        self.left = functional.normalize(matrix @ self.right, dim=0)

    def sigma(self) -> Tensor:
        """The estimate of the largest singular value; differentiable in W."""
        return self.left @ (self.weight.flatten(1) @ self.right)

    def forward(self, input: Tensor) -> Tensor:
        """(B, Cin, H, W) -> (B, Cout, h, w)."""
        return self._conv_forward(input, self.weight / self.sigma(), self.bias)


def spectral(module: nn.Module) -> list[SpectralConv2d]:
    """The convolutions of a network that are normalised so."""
    return [m for m in module.modules() if isinstance(m, SpectralConv2d)]


def turn(convolutions: Iterable[SpectralConv2d]) -> None:
    """One round of power iteration of each."""
    for convolution in convolutions:
        convolution.turn()
