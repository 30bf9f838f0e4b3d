"""The generator of pix2pix (Isola et al., CVPR 2017), and E2EAug's searchable version of it.

A U-Net from label map to image: strided convolutions halve the map down to one or a few positions,
transposed ones double it again, and each decoder level sees the encoder's map of its size. Widths
C, 2C, 4C, 8C, then 8C on. Activations: LeakyReLU 0.2 in the encoder, ReLU in the decoder, Tanh at
the end. BatchNorm after every operator but the first and the innermost of the encoder and the last
of the decoder. Dropout on the three decoder levels after the innermost stands for the noise vector.
Convolutions N(0, 0.02), BatchNorm scale N(1, 0.02).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.cells import plain
from mlseg.problems.e2eaug.networks.generator import (
    GENERATORS,
    AnyCell,
    Candidates,
    OfCells,
    cell,
    sides,
)
from mlseg.segmentation.nets.layers import BatchNorm, pad_to_multiple

Search = Literal["both", "decoder", "none"]

Probability = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=4, le=8, multiple_of=2)]


def count_levels(image_size: int | Sequence[int], levels: int | None = None) -> int:
    """How often the generator halves an image of this size: `levels`, or as often as it can.

    Raises UserError where the image is too small for `levels`, or for two levels.
    """
    smaller = min(sides(image_size))
    most = max(smaller, 1).bit_length() - 1
    if levels is None:
        levels = most
    if levels < 2 or smaller < 4:
        raise UserError(
            f"a generator needs at least 2 levels and images of 4 pixels a side, not {levels} "
            f"levels and {smaller} pixels"
        )
    if levels > (smaller - 1).bit_length():
        raise UserError(
            f"generator levels {levels} are too many for images of {smaller} pixels: at most {most}"
        )
    return levels


def _normalisation(channels: int) -> BatchNorm:
    norm = BatchNorm(channels)
    nn.init.normal_(norm.weight, 1.0, 0.02)
    return norm


class _Body(nn.Module, ABC):
    """What both generators share: everything but which operator stands at a level."""

    def __init__(
        self, in_channels: int, out_channels: int, levels: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.levels = levels
        self.channels = channels
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dropout = dropout
        widths = [channels * min(2**level, 8) for level in range(levels)]
        # (Cin, Cout) of every operator; the decoder from the innermost level outwards.
        self.encoder_shapes = list(zip([in_channels, *widths[:-1]], widths, strict=True))
        outputs = [out_channels, *widths[:-1]]
        self.decoder_shapes = [
            (widths[level] * (1 if level == levels - 1 else 2), outputs[level])
            for level in range(levels - 1, -1, -1)
        ]
        self.encoder_norms = nn.ModuleList(_normalisation(width) for width in widths[1:-1])
        self.decoder_norms = nn.ModuleList(
            _normalisation(width) for _, width in self.decoder_shapes[:-1]
        )

    @abstractmethod
    def _encode(self, level: int, x: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
        """The operator at this place, applied."""

    @abstractmethod
    def _decode(self, step: int, x: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
        """The operator at this place, applied."""

    def _generate(self, label_BCHW: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
        x, (rows, columns) = pad_to_multiple(label_BCHW, 2**self.levels)
        last = self.levels - 1
        skips = []
        for level in range(self.levels):
            x = self._encode(level, x, weights)
            if 0 < level < last:
                x = self.encoder_norms[level - 1](x)
            if level < last:
                # In place: neither BatchNorm nor a convolution or a sum saves its output. The skip
                # keeps the activated map, since relu(leaky_relu(x)) = relu(x).
                x = functional.leaky_relu(x, 0.2, inplace=True)
                skips.append(x)
        x = functional.relu(x, inplace=True)
        for step in range(self.levels):
            x = self._decode(step, x, weights)
            if step == last:
                break
            x = self.decoder_norms[step](x)
            if 1 <= step <= 3:
                x = functional.dropout(x, self.dropout, self.training)
            x = functional.relu(torch.cat([skips.pop(), x], 1), inplace=True)
        return torch.tanh(x)[..., rows, columns]

    def settings(self) -> dict[str, Any]:
        """What both classes have to be called with to make another of this shape."""
        names = ("in_channels", "out_channels", "levels", "channels", "dropout")
        return {name: getattr(self, name) for name in names}


class Generator(_Body):
    """A pix2pix generator of plain operators: vanilla, or what a finished search exports.

    Args:
        in_channels, out_channels: channels of label map and image.
        levels: number of halvings, at least 2.
        channels: width C of the first level.
        dropout: probability on the three decoder levels after the innermost.
        kernels: side (4, 6 or 8) of every operator's kernel, encoder from the outside in, then the
            decoder from the inside out: 2 `levels` numbers. None is pix2pix's own: 4 everywhere.

    In evaluation mode it is deterministic. Rebuild a saved one from these five values and its state
    dict.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        levels: int,
        channels: int = 64,
        dropout: Probability = 0.5,
        kernels: Sequence[Side] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, levels, channels, dropout)
        self.kernels = list(kernels) if kernels is not None else [4] * (2 * levels)
        if len(self.kernels) != 2 * levels:
            raise ValueError(f"{len(self.kernels)} kernels for {levels} levels")
        self.encoder = nn.ModuleList(
            plain(*shape, size, transposed=False)
            for shape, size in zip(self.encoder_shapes, self.kernels[:levels], strict=True)
        )
        self.decoder = nn.ModuleList(
            plain(*shape, size, transposed=True, bias=step == levels - 1)
            for step, (shape, size) in enumerate(
                zip(self.decoder_shapes, self.kernels[levels:], strict=True)
            )
        )

    def settings(self) -> dict[str, Any]:
        """What the class has to be called with to make another of this shape."""
        return {**super().settings(), "kernels": self.kernels}

    def _encode(self, level: int, x: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
        return self.encoder[level](x)

    def _decode(self, step: int, x: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
        return self.decoder[step](x)

    def forward(self, label_BCHW: Tensor) -> Tensor:
        """Label map (B, Cin, H, W) in [-1, 1] -> image (B, Cout, H, W) in [-1, 1], any H and W."""
        return self._generate(label_BCHW, None)


@GENERATORS.register("pix2pix")
class SearchableGenerator(_Body, OfCells):
    """pix2pix's generator with cells for its strided convolutions (E2EAug, section 3.2).

    Args:
        in_channels, out_channels: channels of label map and image.
        image_size: side, or height and width, of the images in pixels; decides the number of
            levels.
        channels: width C of the first level; deeper ones have up to eight times as many.
        levels: number of halvings; None is as many as the smaller side allows (8 at 256, 6 at 64).
        dropout: probability on the three decoder levels after the innermost.
        search: where cells stand: "both" encoder and decoder (the paper), "decoder" (GenSeg's
            public code), "none" (vanilla pix2pix).
        candidates: operators of a cell, "aligned" (the paper's) or "rich".

    Parameters at 256x256 with 3 channels: 54.4 M with "none", 272.4 M with "decoder", 394.4 M with
    "both"; as in pix2pix's public code, only the last operator has a bias, one per candidate.

    Other sizes than `image_size` work too: sides are padded to multiples of 2^levels by repeating
    the edge, and the output is cropped. A batch of one trains: pix2pix has no BatchNorm at the
    innermost encoder level, the only one whose map may be 1x1.

    Raises UserError for an image too small for its levels.
    """

    plain = Generator

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | Sequence[int],
        channels: PositiveInt = 64,
        levels: PositiveInt | None = None,
        dropout: Probability = 0.5,
        search: Search = "both",
        candidates: Candidates = "aligned",
    ) -> None:
        levels = count_levels(image_size, levels)
        super().__init__(in_channels, out_channels, levels, channels, dropout)
        if search not in ("both", "decoder", "none"):
            raise UserError(f"generator search {search!r}: valid are both, decoder, none")
        self.choose(search, candidates, image_size)
        self.encoder = nn.ModuleList(
            cell(candidates, *shape, False) if search == "both" else plain(*shape, 4, False)
            for shape in self.encoder_shapes
        )
        self.decoder = nn.ModuleList(
            cell(candidates, *shape, True, step == levels - 1)
            if search != "none"
            else plain(*shape, 4, True, step == levels - 1)
            for step, shape in enumerate(self.decoder_shapes)
        )
        self._first_decoder_cell = levels if search == "both" else 0

    @property
    def cell_names(self) -> list[str]:
        """Names of the cells in the order of `weights`: encoder outside in, decoder inside out."""
        encoder = [f"encoder.{level}" for level in range(self.levels)]
        decoder = [f"decoder.{level}" for level in range(self.levels - 1, -1, -1)]
        return {"both": encoder + decoder, "decoder": decoder, "none": []}[self.search]

    def _encode(self, level: int, x: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
        operator = self.encoder[level]
        if weights is None or not isinstance(operator, AnyCell):
            return operator(x)
        return operator(x, weights[level])

    def _decode(self, step: int, x: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
        operator = self.decoder[step]
        if weights is None or not isinstance(operator, AnyCell):
            return operator(x)
        return operator(x, weights[self._first_decoder_cell + step])

    def forward(self, label_BCHW: Tensor, weights: Tensor | None = None) -> Tensor:
        """Label map (B, Cin, H, W) in [-1, 1] -> image (B, Cout, H, W) in [-1, 1], any H and W.

        `weights` (cells, K) in [0, 1] are the selection weights; with search "none" they are
        ignored. ValueError for any other shape.
        """
        return self._generate(label_BCHW, self.rows(weights))

    def of_plain(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The side of every kernel."""
        parts = ("encoder", "decoder")
        names = [f"{part}.{index}.weight" for part in parts for index in range(self.levels)]
        return {"kernels": [state[name].shape[-1] for name in names]}
