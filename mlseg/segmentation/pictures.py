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
FRAME = (170, 170, 170)
_BAND = 256

# Of two classes, whose own colours are black and white: a white tint can't be seen on skin or on an
# X-ray, and red is to some eyes the brown and green around it. Sky blue of Okabe and Ito (2008).
TWO_CLASSES = (86, 180, 233)
TRUTH = (230, 159, 0)
"""Outline of the true foreground beside the predicted one: their orange."""

# Probabilities from 0 to 1: cividis, even in lightness and alike to all eyes (Nunez, Anderton and
# Renslow 2018, PLOS ONE 13(7), e0199239), at 17 places; between them it is linear.
_HEAT = (
    (0, 34, 78), (0, 46, 106), (26, 56, 111), (50, 67, 109), (67, 78, 108), (83, 90, 109),
    (97, 101, 111), (111, 112, 115), (125, 124, 120), (140, 136, 120), (155, 148, 118),
    (171, 160, 114), (188, 174, 108), (205, 187, 99), (222, 201, 88), (240, 216, 70),
    (254, 232, 56),
)  # fmt: skip

Picture = NDArray[np.uint8]
"""(H, W, 3)."""


@dataclass(frozen=True)
class Row:
    """Pictures of one size, and the words above them."""

    pictures: Sequence[Picture]
    words: str = ""


@dataclass(frozen=True)
class Legend:
    """Colours and what they stand for.

    Attributes:
        entries: colours and words.
        scale: what the colours of :func:`heat` are of; "": none are shown.
    """

    entries: list[tuple[tuple[int, ...], str]] = field(default_factory=list)
    scale: str = ""


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


def heat(probability_HW: NDArray[Any]) -> Picture:
    """Probabilities as (H, W, 3): dark blue is 0, yellow 1."""
    places = np.linspace(0, 1, len(_HEAT))
    table = np.asarray(_HEAT, dtype=np.float64)
    steps = np.linspace(0, 1, 256)
    colours = np.stack([np.interp(steps, places, table[:, c]) for c in range(3)], -1)
    index = (np.clip(probability_HW, 0, 1) * 255).round().astype(np.uint8)
    return colours.round().astype(np.uint8)[index]


def _edges(
    mask_HW: NDArray[np.uint8], width: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The highest class around each pixel, and whether another is there too.

    Args:
        width: of what is marked so, pixels; None: about 1 of 150 of the picture's.
    """
    from scipy import ndimage  # here: it takes long to load

    reach = 1 + (width or max(1, round(min(mask_HW.shape) / 150)))
    highest_HW = ndimage.maximum_filter(mask_HW, reach)
    return highest_HW, highest_HW != ndimage.minimum_filter(mask_HW, reach)


def overlay(
    image_HWC: Picture,
    mask_HW: NDArray[np.uint8],
    palette: Sequence[Sequence[int]],
    truth_HW: NDArray[np.uint8] | None = None,
    width: int | None = None,
) -> Picture:
    """The image with every class but the first tinted in its colour and outlined.

    Args:
        truth_HW: of two classes, outlined as well.
        width: of the outlines, pixels; None: it grows with the picture, about 1 of 150.
    """
    tints = [palette[0], TWO_CLASSES] if len(palette) == 2 else palette
    highest_HW, edge_HW = _edges(mask_HW, width)
    made = np.empty((*mask_HW.shape, 3), np.uint8)
    for top in range(0, len(made), _BAND):  # floats of a whole photograph take gigabytes
        rows = slice(top, top + _BAND)
        mask, edge = mask_HW[rows], edge_HW[rows]
        shown = mask > 0
        out = image_HWC[rows].astype(np.float32)
        out[shown] = (1 - OPACITY) * out[shown] + OPACITY * colour(mask[shown], tints)
        out[edge] = colour(highest_HW[rows][edge], tints)
        made[rows] = out.round()
    if truth_HW is not None and len(palette) == 2:
        made[_edges((truth_HW == 1).astype(np.uint8), width)[1]] = TRUTH
    return made


def chosen_probability(probabilities_KHW: Tensor, labels_HW: Tensor) -> NDArray[Any]:
    """What a heat map shows, (H, W): the foreground's probability, or that of the class chosen."""
    if len(probabilities_KHW) == 2:
        return probabilities_KHW[1].float().cpu().numpy()
    chosen = probabilities_KHW.gather(0, labels_HW.long()[None].to(probabilities_KHW.device))
    return chosen[0].float().cpu().numpy()


def probability_of(spec: DatasetSpec) -> str:
    """What :func:`chosen_probability` is of, in words."""
    return f"probability of {spec.classes[1] if spec.num_classes == 2 else 'the class chosen'}"


def comparison(
    images: Tensor,
    truths: Tensor,
    predictions: Tensor,
    spec: DatasetSpec,
    words: Sequence[str] | None = None,
    probabilities: Tensor | None = None,
) -> Picture:
    """A row per image: image, truth, prediction, and the prediction over the image.

    With ``probabilities`` a heat map of them comes before the last.

    Args:
        images: (N, C, H, W) uint8.
        truths, predictions: (N, H, W) uint8 class indices.
        words: N texts about them, such as their names and scores.
        probabilities: (N, K, H, W), of which ``predictions`` are the decision.

    Returns:
        (H', W', 3) uint8.
    """
    rows = []
    heads = ["image", "truth", "prediction", "prediction over image"]
    colours = legend(spec, truths, outlined=spec.num_classes == 2)
    if probabilities is not None:
        heads.insert(3, probability_of(spec))
        colours = Legend(colours.entries, "probability")
    for index, (image, truth, predicted) in enumerate(
        zip(images, truths.cpu().numpy(), predictions.cpu().numpy(), strict=True)
    ):
        rgb = enlarged(to_rgb(image))
        maps = [enlarged(labels) for labels in (truth, predicted)]
        pictures = [rgb, *(colour(labels, spec.palette) for labels in maps)]
        if probabilities is not None:
            shown = chosen_probability(probabilities[index], predictions[index])
            pictures.append(enlarged(heat(shown)))
        pictures.append(overlay(rgb, maps[1], spec.palette, maps[0]))
        rows.append(Row(pictures, words[index] if words else ""))
    return sheet(heads, rows, colours)


def legend(
    spec: DatasetSpec, truths: Tensor, tinted: bool = True, outlined: bool = False
) -> Legend:
    """The colours of a data set's classes.

    Args:
        truths: the masks shown; where they hold what doesn't count, its grey is explained too.
        tinted: with the tint of the foreground over an image, where that isn't its colour.
        outlined: with the true foreground's outline.
    """
    entries: list[tuple[tuple[int, ...], str]] = list(zip(spec.palette, spec.classes, strict=True))
    if tinted and spec.num_classes == 2:
        entries.append((TWO_CLASSES, f"{spec.classes[1]}, over the image"))
    if outlined:
        entries.append((TRUTH, "outline of the truth"))
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
    scale = colours.scale if colours is not None else ""
    bar = (entries[-1][1] + LINE) if entries else 0  # the scale's own line, below the entries
    below = bar + (LINE if scale else 0) + (GAP if entries or scale else 0)
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
            left, begin = GAP + column * (width + GAP), top + line
            # A line around it, without which white beside white is one picture.
            frame = (left - 1, begin - 1, left + width, begin + height)
            draw.rectangle(frame, outline=FRAME)
            canvas.paste(Image.fromarray(picture), (left, begin))
        top += line + height + GAP
    for left, down, shade, name in entries:
        box = (left, top + down + 2, left + LINE - 4, top + down + LINE - 2)
        draw.rectangle(box, fill=shade, outline=INK)
        _write(draw, (left + LINE + 2, top + down), name, across)
    if scale:
        _scale(canvas, draw, top + bar, scale, across)
    return np.asarray(canvas)


def _scale(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, top: int, words: str, width: int
) -> None:
    """The colours of :func:`heat` from 0 to 1 in a line of their own."""
    bar = heat(np.linspace(0, 1, 160)[None].repeat(LINE - 6, 0))
    _write(draw, (GAP, top), "0", width)
    canvas.paste(Image.fromarray(bar), (GAP + 16, top + 4))
    _write(draw, (GAP + 184, top), f"1   {words}", width - GAP - 184)


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
