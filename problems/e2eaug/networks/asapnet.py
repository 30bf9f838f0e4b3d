"""The generator of ASAP-Net (Rott Shaham et al., CVPR 2021), and a searchable version of it.

Every pixel's colour is a small MLP of its label and of its position within a tile. All pixels of a
tile share one MLP, whose parameters come from a network that sees the label map at low resolution
(section 3). E2EAug's figure 7 makes it searchable without saying where: here the low-resolution
network's strided convolutions become cells. The label map is taken in [-1, 1] as pix2pix takes it,
and used in [0, 1].
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
    reflect,
    sides,
    xavier,
)

MLP_LAYERS = 5
TRUNK_LAYERS = 7


def tile_side(image_size: tuple[int, int], grid: int, levels: int) -> int:
    """Pixels along a tile's side, d: the smaller side of the image holds ``grid`` tiles.

    Raises:
        UserError: the image can't be tiled so, or a tile is no whole number of the low-resolution
            network's pixels.
    """
    height, width = image_size
    side = min(height, width) // grid
    if side < 2 or min(height, width) % grid or height % side or width % side:
        raise UserError(
            f"generator.grid: asapnet can't cut images of {height}x{width} into square tiles, "
            f"{grid} along the smaller side and each of 2 pixels or more; choose a grid that "
            "divides both sides"
        )
    if side & (side - 1) or side < 2**levels:
        raise UserError(
            f"generator.levels: asapnet's tiles are {side} pixels wide ({height}x{width} in a grid "
            f"of {grid}), and have to be a power of two and at least 2^levels = {2**levels}; "
            f"choose generator.grid, generator.levels and the image size so"
        )
    return side


def _reduced(x_BCHW: Tensor, factor: int) -> Tensor:
    """Reduced by a power of two with a tent of twice that width; reflected at the borders."""
    if factor == 1:
        return x_BCHW
    channels = x_BCHW.shape[1]
    taps = torch.arange(2 * factor, device=x_BCHW.device, dtype=x_BCHW.dtype)
    tent = (1 - (taps + 0.5 - factor).abs() / factor) / factor
    kernel = (tent[:, None] * tent).expand(channels, 1, -1, -1)
    padded = reflect(x_BCHW, factor // 2, factor // 2)
    return functional.conv2d(padded, kernel, stride=factor, groups=channels)


def positions(side: int, like: Tensor) -> Tensor:
    """(4 log2 d, d, d): sines and cosines of x and y at the periods d, d/2, ..., 2 pixels.

    At each period: cosine and sine of x, then of y; x runs over the last dimension. At the period 2
    the sine is 0 at every pixel, as in the paper.
    """
    place = torch.arange(side, device=like.device, dtype=like.dtype)
    parts = []
    for power in range(side.bit_length() - 1):
        angle = place * (2 * math.pi * 2**power / side)
        for wave in (angle.cos(), angle.sin()):
            parts.append(wave[None, :].expand(side, side))
        for wave in (angle.cos(), angle.sin()):
            parts.append(wave[:, None].expand(side, side))
    return torch.stack(parts)


class _Body(nn.Module):
    """Everything but the strided operators."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: int,
        tile: int,
        levels: int,
        channels: int,
        deep_channels: int,
        mlp_channels: int,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.grid, self.tile = (
            in_channels,
            out_channels,
            grid,
            tile,
        )
        self.levels, self.channels, self.deep_channels = levels, channels, deep_channels
        self.mlp_channels = mlp_channels
        inputs = in_channels + 4 * (tile.bit_length() - 1)
        self.mlp_widths = [inputs, *[mlp_channels] * (MLP_LAYERS - 1), out_channels]
        # (Cin, Cout) of the strided operators.
        self.strided_shapes = [
            (channels, channels if level < levels - 1 else deep_channels) for level in range(levels)
        ]
        self.first = nn.Conv2d(in_channels, channels, 3)
        self.trunk = nn.ModuleList(
            nn.Conv2d(deep_channels, deep_channels, 3) for _ in range(TRUNK_LAYERS)
        )
        widths = [channels, *(out for _, out in self.strided_shapes)]
        self.norms = nn.ModuleList(
            nn.InstanceNorm2d(width, affine=True)
            for width in [*widths, *[deep_channels] * TRUNK_LAYERS]
        )
        self.head = nn.Conv2d(deep_channels, sum(self.mlp_sizes), 1)
        self.apply(xavier)
        self._start_the_mlps()

    @property
    def mlp_sizes(self) -> list[int]:
        """Of each layer of an MLP, biases and weights; their sum is P."""
        pairs = zip(self.mlp_widths[:-1], self.mlp_widths[1:], strict=True)
        return [wide * (narrow + 1) for narrow, wide in pairs]

    @torch.no_grad()
    def _start_the_mlps(self) -> None:
        """All MLPs start as one with He's initialisation, to which the label map adds a little."""
        parts = []
        for narrow, wide in zip(self.mlp_widths[:-1], self.mlp_widths[1:], strict=True):
            weight = torch.randn(wide * narrow) * math.sqrt(2 / narrow)
            parts += [torch.zeros(wide), weight]
        assert self.head.bias is not None
        self.head.bias.copy_(torch.cat(parts))

    def predict(self, label_BCHW: Tensor, stride: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The MLPs' parameters, (B, P, rows, columns): the low-resolution part."""
        height, width = label_BCHW.shape[-2:]
        side = tile_side((height, width), self.grid, self.levels)
        if side != self.tile:
            raise UserError(
                f"data.image_size: this asapnet has tiles of {self.tile} pixels, and images of "
                f"{height}x{width} need {side}"
            )
        x = self.first(reflect(_reduced(label_BCHW, self.tile >> self.levels), 1, 1))
        norms = iter(self.norms)
        x = functional.relu(next(norms)(x))
        for level in range(self.levels):
            x = functional.relu(next(norms)(stride(level, x)))
        for convolution, norm in zip(self.trunk, norms, strict=True):
            x = functional.relu(norm(convolution(reflect(x, 1, 1))))
        return self.head(x)

    def paint(self, label_BCHW: Tensor, parameters: Tensor) -> Tensor:
        """The image (B, Cout, H, W) that the MLPs of ``parameters`` make: the pixels' part."""
        batch, _, rows, columns = parameters.shape
        side = self.tile
        # Tiles by pixels by channels.
        tiles = label_BCHW.reshape(batch, -1, rows, side, columns, side)
        tiles = tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch * rows * columns, side * side, -1)
        place = positions(side, label_BCHW).flatten(1).t().expand(tiles.shape[0], -1, -1)
        x = torch.cat([tiles, place], 2)
        flat = parameters.permute(0, 2, 3, 1).reshape(tiles.shape[0], -1)
        for layer, part in enumerate(flat.split(self.mlp_sizes, 1)):
            wide = self.mlp_widths[layer + 1]
            bias, weight = part[:, None, :wide], part[:, wide:].reshape(tiles.shape[0], -1, wide)
            x = torch.baddbmm(bias, x, weight)
            if layer < MLP_LAYERS - 1:
                x = functional.leaky_relu(x, 0.01)
        image = torch.tanh(x).reshape(batch, rows, columns, side, side, -1)
        return image.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * side, columns * side)

    def _generate(self, label_BCHW: Tensor, stride: Callable[[int, Tensor], Tensor]) -> Tensor:
        label = (label_BCHW + 1) / 2
        return self.paint(label, self.predict(label, stride))

    def settings(self) -> dict[str, Any]:
        """What both classes have to be called with to make another of this shape."""
        names = ("in_channels", "out_channels", "grid", "levels", "channels")
        more = ("deep_channels", "mlp_channels")
        return {name: getattr(self, name) for name in (*names, *more)}


class Generator(_Body):
    """An ASAP-Net without cells: the paper's, or what a finished search exports.

    Args:
        tile: pixels along a tile's side, a power of two.
        in_channels, out_channels, grid, levels, channels, deep_channels, mlp_channels: see
            `SearchableGenerator`.
        kernel: None: 3x3 kernels with stride 2, reflected at the borders, as in the paper; 8: 8x8.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: int = 16,
        tile: int = 16,
        levels: int = 4,
        channels: int = 64,
        deep_channels: int = 1024,
        mlp_channels: int = 64,
        kernel: Literal[8] | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, grid, tile, levels, channels, deep_channels, mlp_channels
        )
        self.kernel = kernel
        self.strided = _strided(self.strided_shapes) if kernel is None else _merged(self)

    def settings(self) -> dict[str, Any]:
        """What the class has to be called with to make another of this shape."""
        return {**super().settings(), "tile": self.tile, "kernel": self.kernel}

    def forward(self, label_BCHW: Tensor) -> Tensor:
        """Label map (B, Cin, H, W) in [-1, 1] -> image (B, Cout, H, W) in [-1, 1]."""

        def stride(level: int, x: Tensor) -> Tensor:
            return self.strided[level](reflect(x, 1, 1) if self.kernel is None else x)

        return self._generate(label_BCHW, stride)


def _strided(shapes: Sequence[tuple[int, int]]) -> nn.ModuleList:
    found = nn.ModuleList(nn.Conv2d(*shape, 3, stride=2) for shape in shapes)
    return found.apply(xavier)


def _merged(body: _Body) -> nn.ModuleList:
    return nn.ModuleList(plain(*shape, 8, False, bias=True) for shape in body.strided_shapes)


@GENERATORS.register("asapnet")
class SearchableGenerator(_Body, OfCells):
    """ASAP-Net with cells for the strided convolutions of its low-resolution network.

    Args:
        in_channels, out_channels: channels of label map and image.
        image_size: side, or height and width, of the images in pixels. The smaller one holds
            ``grid`` tiles, whose side must be a power of two.
        channels, deep_channels: widths of the low-resolution network, 64 and 1024 in the paper:
            one 3x3 convolution and all strided ones but the last have the former, the last strided
            one and the seven after it the latter.
        mlp_channels: width of the MLPs, 64 in the paper.
        grid: tiles along the smaller side, 16 in the paper.
        levels: strided convolutions, 4 in the paper. The label map is reduced to 2^levels pixels a
            tile before them.
        search: "both": cells for the strided convolutions (there is no decoder); "none": 3x3
            kernels with stride 2, as in the paper.
        candidates: operators of a cell, "aligned" (E2EAug's) or "rich".

    Parameters at 1 label channel and 256x256 without cells: 81.0 M; 1.6 M at 16, 128 and 32. After
    every convolution stand instance normalisation and ReLU.

    It draws nothing: there is neither noise nor dropout.

    Raises:
        UserError: the image can't be tiled so.
    """

    plain = Generator

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | Sequence[int],
        channels: PositiveInt = 64,
        deep_channels: PositiveInt = 1024,
        mlp_channels: PositiveInt = 64,
        grid: PositiveInt = 16,
        levels: PositiveInt = 4,
        search: Literal["both", "none"] = "both",
        candidates: Candidates = "aligned",
    ) -> None:
        if grid < 2:
            raise UserError(
                "generator.grid: 1 leaves a map of a single position, over which nothing can be "
                "normalised; 2 or more"
            )
        tile = tile_side(sides(image_size), grid, levels)
        super().__init__(
            in_channels, out_channels, grid, tile, levels, channels, deep_channels, mlp_channels
        )
        self.choose(search, candidates, image_size)
        self.strided = (
            _strided(self.strided_shapes)
            if search == "none"
            else nn.ModuleList(
                cell(candidates, *shape, False, True) for shape in self.strided_shapes
            )
        )

    @property
    def cell_names(self) -> list[str]:
        """From the outside in."""
        return [f"strided.{level}" for level in range(self.levels) if self.search == "both"]

    def forward(self, label_BCHW: Tensor, weights: Tensor | None = None) -> Tensor:
        """Label map (B, Cin, H, W) in [-1, 1] -> image (B, Cout, H, W) in [-1, 1].

        Args:
            weights: (cells, K) selection weights; ignored without cells.

        Raises:
            ValueError: ``weights`` of another shape.
            UserError: an image that needs other tiles.
        """
        rows = self.rows(weights)

        def stride(level: int, x: Tensor) -> Tensor:
            if self.search == "none" or rows is None:
                return self.strided[level](reflect(x, 1, 1))
            return self.strided[level](x, rows[level])

        return self._generate(label_BCHW, stride)

    def of_plain(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Its tiles, and the side of its strided kernels."""
        return {"tile": self.tile, "kernel": 8 if self.num_cells else None}
