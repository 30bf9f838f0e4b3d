"""Sheets of pictures: what went in, what should have come out, what did; headed, with a legend."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mlseg.segmentation.data import DatasetSpec

SIDE = 256  # pixels that a panel's shorter side has at least
GAP = 8
LINE = 20  # height of a line of text
TEXT = 15
OPACITY = 0.5
INK = (0, 0, 0)
_BAND = 256

# Of two classes, whose own colours are black and white: a white tint can't be seen on skin or on an
# X-ray, and red is to some eyes the brown and green around it. Sky blue of Okabe and Ito (2008).
TWO_CLASSES = (86, 180, 233)

Picture = NDArray[np.uint8]
"""(H, W, 3)."""


@dataclass(frozen=True)
class Row:
    """Pictures of one size, and the words above them."""

    pictures: Sequence[Picture]
    words: str = ""


@dataclass(frozen=True)
class Legend:
    """Colours and what they stand for."""

    entries: list[tuple[tuple[int, ...], str]] = field(default_factory=list)


def to_rgb(image_CHW: Tensor) -> Picture:
    """A uint8 image of 1 or 3 channels as (H, W, 3)."""
    return image_CHW.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()


def colour(mask_HW: NDArray[np.uint8], palette: Sequence[Sequence[int]]) -> Picture:
    """A label map as (H, W, 3) in its classes' colours; see `ignored_colour` for anything else."""
    table = np.full((256, 3), ignored_colour(palette), dtype=np.uint8)
    table[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    return table[mask_HW]


def ignored_colour(palette: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    """Of pixels that don't count: mid grey, or white or magenta where that is a class's."""
    taken = {tuple(rgb) for rgb in palette}
    candidates = ((128, 128, 128), (255, 255, 255), (255, 0, 255))
    return next((rgb for rgb in candidates if rgb not in taken), candidates[0])


def overlay(
    image_HWC: Picture, mask_HW: NDArray[np.uint8], palette: Sequence[Sequence[int]]
) -> Picture:
    """The image with every class but the first tinted in its colour and outlined.

    The outline's width grows with the picture: about 1 pixel of 150.
    """
    from scipy import ndimage  # here: it takes long to load

    tints = [palette[0], TWO_CLASSES] if len(palette) == 2 else palette
    reach = 1 + max(1, round(min(mask_HW.shape) / 150))
    highest_HW = ndimage.maximum_filter(mask_HW, reach)
    edge_HW = highest_HW != ndimage.minimum_filter(mask_HW, reach)
    made = np.empty((*mask_HW.shape, 3), np.uint8)
    for top in range(0, len(made), _BAND):  # floats of a whole photograph take gigabytes
        rows = slice(top, top + _BAND)
        mask, edge = mask_HW[rows], edge_HW[rows]
        shown = mask > 0
        out = image_HWC[rows].astype(np.float32)
        out[shown] = (1 - OPACITY) * out[shown] + OPACITY * colour(mask[shown], tints)
        out[edge] = colour(highest_HW[rows][edge], tints)
        made[rows] = out.round()
    return made


def comparison(
    images: Tensor,
    truths: Tensor,
    predictions: Tensor,
    spec: DatasetSpec,
    words: Sequence[str] | None = None,
) -> Picture:
    """A row per image: image, truth, prediction, and the prediction over the image.

    Args:
        images: (N, C, H, W) uint8.
        truths, predictions: (N, H, W) uint8 class indices.
        words: N texts about them, such as their names and scores.

    Returns:
        (H', W', 3) uint8.
    """
    rows = []
    for index, (image, truth, predicted) in enumerate(
        zip(images, truths.cpu().numpy(), predictions.cpu().numpy(), strict=True)
    ):
        rgb = enlarged(to_rgb(image))
        maps = [enlarged(labels) for labels in (truth, predicted)]
        pictures = [rgb, *(colour(labels, spec.palette) for labels in maps)]
        pictures.append(overlay(rgb, maps[1], spec.palette))
        rows.append(Row(pictures, words[index] if words else ""))
    heads = ("image", "truth", "prediction", "prediction over image")
    return sheet(heads, rows, legend(spec, truths))


def legend(spec: DatasetSpec, truths: Tensor, tinted: bool = True) -> Legend:
    """The colours of a data set's classes.

    Args:
        truths: the masks shown; where they hold what doesn't count, its grey is explained too.
        tinted: with the tint of the foreground over an image, where that isn't its colour.
    """
    entries: list[tuple[tuple[int, ...], str]] = list(zip(spec.palette, spec.classes, strict=True))
    if tinted and spec.num_classes == 2:
        entries.append((TWO_CLASSES, f"{spec.classes[1]}, over the image"))
    if spec.ignore_index is not None and bool((truths == spec.ignore_index).any()):
        entries.append((ignored_colour(spec.palette), "ignored"))
    return Legend(entries)


def enlarged(picture: NDArray[Any]) -> NDArray[Any]:
    """(H, W, ...) with every pixel repeated until the shorter side has `SIDE`."""
    times = max(1, -(-SIDE // min(picture.shape[:2])))
    return picture.repeat(times, 0).repeat(times, 1)


def sheet(heads: Sequence[str], rows: Sequence[Row], colours: Legend | None = None) -> Picture:
    """Pictures in rows and columns on white, the columns headed, a legend below.

    Pictures are enlarged to panels of at least `SIDE` pixels; texts that don't fit are cut.

    Args:
        heads: a word for each column.
        rows: at least one; pictures of one size.
    """
    panels = [[enlarged(picture) for picture in row.pictures] for row in rows]
    height, width = panels[0][0].shape[:2]
    across = len(heads) * (width + GAP) + GAP
    lines = [LINE + GAP // 2 if row.words else 0 for row in rows]
    entries = [] if colours is None else _placed(colours, across)
    below = (entries[-1][1] + LINE + GAP) if entries else 0
    top = LINE + 2 * GAP
    tall = top + sum(line + height + GAP for line in lines) + below
    canvas = Image.new("RGB", (across, tall), "white")
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        _write(draw, (GAP + column * (width + GAP), GAP), head, width)
    for row, pictures, line in zip(rows, panels, lines, strict=True):
        if row.words:
            _write(draw, (GAP, top), row.words, across - 2 * GAP)
        for column, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (GAP + column * (width + GAP), top + line))
        top += line + height + GAP
    for left, down, shade, name in entries:
        box = (left, top + down + 2, left + LINE - 4, top + down + LINE - 2)
        draw.rectangle(box, fill=shade, outline=INK)
        _write(draw, (left + LINE + 2, top + down), name, across)
    return np.asarray(canvas)


def _placed(colours: Legend, across: int) -> list[tuple[int, int, tuple[int, ...], str]]:
    """Each entry's left and top within the legend, its colour and name, in lines that fit."""
    found = []
    left, down = GAP, 0
    for shade, name in colours.entries:
        text = _shortened(name, across - LINE - 3 * GAP)
        wide = LINE + round(_font().getlength(text)) + 3 * GAP
        if left > GAP and left + wide > across:
            left, down = GAP, down + LINE
        found.append((left, down, shade, text))
        left += wide
    return found


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    draw.text(place, _shortened(text, width), INK, _font())


def _shortened(text: str, width: int) -> str:
    """What fits; a name that isn't UTF-8 has marks in place of what can't be shown."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)
