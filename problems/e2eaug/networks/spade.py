"""The generator of SPADE (Park, Liu, Wang, Zhu, CVPR 2019), and a searchable version of it.

The label map enters at every resolution, as scale and shift of a normalisation (section 3); the
network itself starts from a small map of it and only grows. E2EAug's figure 7 makes it searchable
without saying where: here each doubling of the map, by the nearest pixel in the paper, becomes a
cell of transposed convolutions. The label map is taken in [-1, 1] as pix2pix takes it, and used in
[0, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.cells import plain
from mlseg.problems.e2eaug.networks.generator import (
    GENERATORS,
    Candidates,
    OfCells,
    cell,
    nearest,
    sides,
    xavier,
)
from mlseg.problems.e2eaug.networks.spectral import SpectralConv2d
from mlseg.segmentation.nets.layers import BatchNorm

Norm = Literal["instance", "batch"]


class SpatiallyAdaptive(nn.Module):
    """N(x) (1 + gamma(m)) + beta(m), N a normalisation without parameters (equations 1 to 3).

    m is the label map at x's size. It passes a 3x3 convolution to `hidden` channels and ReLU; gamma
    and beta are one further 3x3 convolution each.

    Args:
        channels: of x.
        labels: channels of the label map.
        hidden: 128 in the paper.
        norm: "batch" (the paper's, over all devices) or "instance".
    """

    def __init__(self, channels: int, labels: int, hidden: int, norm: Norm) -> None:
        super().__init__()
        self.norm = (
            nn.InstanceNorm2d(channels) if norm == "instance" else BatchNorm(channels, affine=False)
        )
        self.shared = nn.Conv2d(labels, hidden, 3, padding=1)
        self.gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, label_BCHW: Tensor) -> Tensor:
        """x and a label map of any size -> x's shape."""
        shared = functional.relu(self.shared(nearest(label_BCHW, x_BCHW.shape[-2:])))
        return self.norm(x_BCHW) * (1 + self.gamma(shared)) + self.beta(shared)


class ResidualBlock(nn.Module):
    """[norm, LeakyReLU 0.2, 3x3 convolution] twice, beside a shortcut (figure 4, left).

    The middle has the narrower width. The shortcut is x itself, or where the widths differ a norm
    and a 1x1 convolution without bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, labels: int, hidden: int, norm: Norm
    ) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        self.norms = nn.ModuleList(
            SpatiallyAdaptive(width, labels, hidden, norm) for width in (in_channels, middle)
        )
        self.convolutions = nn.ModuleList(
            SpectralConv2d(width, out, 3, padding=1)
            for width, out in ((in_channels, middle), (middle, out_channels))
        )
        self.shortcut_norm: nn.Module | None = None
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut_norm = SpatiallyAdaptive(in_channels, labels, hidden, norm)
            self.shortcut = SpectralConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x_BCHW: Tensor, label_BCHW: Tensor) -> Tensor:
        """(B, Cin, H, W) -> (B, Cout, H, W)."""
        y = x_BCHW
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(functional.leaky_relu(norm(y, label_BCHW), 0.2))
        if self.shortcut is None or self.shortcut_norm is None:
            return x_BCHW + y
        return self.shortcut(self.shortcut_norm(x_BCHW, label_BCHW)) + y


def _check(image_size: tuple[int, int], levels: int, norm: Norm) -> None:
    height, width = image_size
    multiple = 2**levels
    if height % multiple or width % multiple:
        fitting = max(k for k in range(levels) if not (height % 2**k or width % 2**k))
        mend = f"lower generator.levels to {fitting} or " if fitting else ""
        raise UserError(
            f"generator.levels: spade with {levels} starts from 1/{multiple} of the image, and "
            f"sides of {height}x{width} pixels don't divide by that; {mend}choose an image "
            f"size in multiples of {multiple}"
        )
    if norm == "instance" and height == width == multiple:
        raise UserError(
            f"generator.levels: spade with {levels} starts from a single position in images of "
            f"{height}x{width}, over which nothing can be normalised; lower generator.levels to "
            f"{levels - 1}"
        )


class _Body(nn.Module):
    """Everything but what doubles the map.

    Widths from the full resolution inwards are n, 2n, 4n, 8n and 16n from there on. At the smallest
    resolution stands one block, at the next two, then one each.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        levels: int,
        channels: int,
        hidden: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.levels, self.channels, self.hidden, self.normalisation = levels, channels, hidden, norm
        self.widths = [channels * min(2**level, 16) for level in range(levels + 1)]

        def block(wide: int, narrow: int) -> ResidualBlock:
            return ResidualBlock(wide, narrow, in_channels, hidden, norm)

        inner, second = self.widths[levels], self.widths[levels - 1]
        self.first = nn.Conv2d(in_channels, inner, 3, padding=1)
        self.innermost = block(inner, inner)
        self.blocks = nn.ModuleList()
        for level in range(levels - 1, -1, -1):
            here = [block(self.widths[level + 1], self.widths[level])]
            if level == levels - 1:
                here.append(block(second, second))
            self.blocks.append(nn.ModuleList(here))
        self.last = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.apply(_initialise)

    def _generate(self, label_BCHW: Tensor, double: Any) -> Tensor:
        label = (label_BCHW + 1) / 2
        height, width = label.shape[-2:]
        _check((height, width), self.levels, self.normalisation)
        x = self.first(nearest(label, (height >> self.levels, width >> self.levels)))
        x = self.innermost(x, label)
        for step, blocks in enumerate(self.blocks):
            x = double(step, x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, label)
        return torch.tanh(self.last(functional.leaky_relu(x, 0.2)))

    def settings(self) -> dict[str, Any]:
        """What both classes have to be called with to make another of this shape."""
        names = ("in_channels", "out_channels", "levels", "channels", "hidden")
        return {**{name: getattr(self, name) for name in names}, "norm": self.normalisation}


def _initialise(module: nn.Module) -> None:
    if not isinstance(module, SpectralConv2d):  # those have done it themselves
        xavier(module)


class Generator(_Body):
    """A SPADE generator without cells: the paper's, or what a finished search exports.

    Args:
        in_channels, out_channels: channels of label map and image.
        levels, channels, hidden, norm: see `SearchableGenerator`.
        kernel: None doubles the map by the nearest pixel; 8 by transposed convolutions of 8x8.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        levels: int = 5,
        channels: int = 64,
        hidden: int = 128,
        norm: Norm = "instance",
        kernel: Literal[8] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, levels, channels, hidden, norm)
        self.kernel = kernel
        self.doublings = nn.ModuleList(
            plain(width, width, kernel, True) for width in self.widths[:0:-1] if kernel is not None
        )

    def settings(self) -> dict[str, Any]:
        """What the class has to be called with to make another of this shape."""
        return {**super().settings(), "kernel": self.kernel}

    def forward(self, label_BCHW: Tensor) -> Tensor:
        """Label map (B, Cin, H, W) in [-1, 1] -> image (B, Cout, H, W) in [-1, 1]."""

        def double(step: int, x: Tensor) -> Tensor:
            return self.doublings[step](x) if self.kernel is not None else _nearest_doubled(x)

        return self._generate(label_BCHW, double)


def _nearest_doubled(x_BCHW: Tensor) -> Tensor:
    return functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


@GENERATORS.register("spade")
class SearchableGenerator(_Body, OfCells):
    """SPADE's generator with cells of transposed convolutions for its doublings.

    Args:
        in_channels, out_channels: channels of label map and image.
        image_size: side, or height and width, of the images in pixels: multiples of 2^levels.
        channels: n, the width at full resolution; 64 in the paper, and 16n at the smallest.
        levels: doublings, 5 in the paper.
        hidden: width between label map and modulation, 128 in the paper.
        norm: "instance", whose statistics are an image's own, or "batch", the paper's.
        search: "both": cells for the doublings, `levels` of them (a SPADE generator has no
            encoder); "none": the nearest pixel, as in the paper.
        candidates: operators of a cell, "aligned" (E2EAug's) or "rich".

    Parameters at 1 label channel and 5 levels without cells: 92.0 M at n = 64, 10.5 M at 16, 4.2 M
    at 8. A cell of width C adds 116 C^2.

    It draws nothing: there is neither noise nor dropout.

    Raises:
        UserError: the image can't be halved so often.
    """

    plain = Generator

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | Sequence[int],
        channels: PositiveInt = 64,
        levels: PositiveInt = 5,
        hidden: PositiveInt = 128,
        norm: Norm = "instance",
        search: Literal["both", "none"] = "both",
        candidates: Candidates = "aligned",
    ) -> None:
        _check(sides(image_size), levels, norm)
        super().__init__(in_channels, out_channels, levels, channels, hidden, norm)
        self.choose(search, candidates, image_size)
        self.doublings = nn.ModuleList(
            cell(candidates, width, width, True) for width in self.widths[:0:-1] if search == "both"
        )

    @property
    def cell_names(self) -> list[str]:
        """From the smallest map outwards, by the level that they double to; 0 is the image's."""
        cells = range(self.levels - 1, -1, -1) if self.search == "both" else ()
        return [f"doubling.{level}" for level in cells]

    def forward(self, label_BCHW: Tensor, weights: Tensor | None = None) -> Tensor:
        """Label map (B, Cin, H, W) in [-1, 1] -> image (B, Cout, H, W) in [-1, 1].

        Args:
            weights: (cells, K) selection weights; ignored without cells.

        Raises:
            ValueError: ``weights`` of another shape.
            UserError: an image that can't be halved so often.
        """
        rows = self.rows(weights)

        def double(step: int, x: Tensor) -> Tensor:
            if self.search == "none" or rows is None:
                return _nearest_doubled(x)
            return self.doublings[step](x, rows[step])

        return self._generate(label_BCHW, double)

    def of_plain(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The side of the kernels that double the map."""
        return {"kernel": 8 if self.num_cells else None}
