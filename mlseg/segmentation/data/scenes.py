"""Street-like scenes with several classes, for machines without data: `synthetic_scenes`.

Sky, a skyline, a road with pavements in perspective, trees, fences, poles, signs, vehicles and
people in front of one another, with a light, a season and colours of its own in every image, so
that neither colour nor place alone tells a class. A class that the list below doesn't know is drawn
as blobs of a hue of its own.

Image i is a function of the seed and of i alone, as in `mlseg.segmentation.data.synthetic`.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlseg.segmentation.data.synthetic import Array, axes, noise

Mask = NDArray[np.bool_]


@dataclass
class Canvas:
    """What is painted so far: colour (H, W, 3), class per pixel (H, W), and the scene's frame."""

    rng: np.random.Generator
    size: tuple[int, int]
    image: Array
    labels: NDArray[np.uint8]
    horizon: float
    vanishing: float

    def paint(self, where: Mask, label: int, colour: Array, texture: float) -> None:
        """Fill a region with a mottled colour."""
        grain = noise(self.rng, int(self.rng.integers(4, 20)), self.size)
        filled = colour + texture * grain[..., None]
        self.image[where] = filled[where]
        self.labels[where] = label

    def colour(self, *near: float) -> Array:
        """A colour near the one given."""
        return np.array(near) * self.rng.uniform(0.7, 1.15) + self.rng.normal(0, 14, 3)

    def ground(self) -> tuple[float, float]:
        """A place on the ground, y and how large things look there."""
        y = self.horizon + (0.5 - self.horizon) * self.rng.uniform(0.05, 0.85)
        return y, 0.12 + 0.9 * (y - self.horizon)


def synthetic_scenes(
    indices: Sequence[int],
    size: tuple[int, int],
    classes: Sequence[str],
    ignore_index: int | None = None,
    seed: int = 0,
    channels: int = 3,
) -> tuple[Tensor, Tensor]:
    """Images and label maps by number.

    Args:
        indices: N numbers, 0 or above.
        size: (H, W) in pixels.
        classes: K names, 2 to 255; the first fills what nothing else covers.
        ignore_index: if given, thin borders between regions carry it, as in hand-drawn labels.
        seed: another seed, other images.
        channels: 3, or 1 for the same in grey.

    Returns:
        images (N, channels, H, W) uint8 and label maps (N, H, W) uint8.
    """
    images = np.empty((len(indices), channels, *size), np.uint8)
    masks = np.empty((len(indices), *size), np.uint8)
    for position, index in enumerate(indices):
        canvas = _scene(np.random.default_rng([seed, 1, index]), size, classes)
        image = canvas.image
        if channels == 1:
            image = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
        images[position] = np.rint(np.clip(image, 0, 255)).astype(np.uint8).transpose(2, 0, 1)
        masks[position] = canvas.labels
        if ignore_index is not None:
            masks[position][_borders(canvas.labels)] = ignore_index
    return torch.from_numpy(images), torch.from_numpy(masks)


def _scene(rng: np.random.Generator, size: tuple[int, int], classes: Sequence[str]) -> Canvas:
    canvas = Canvas(
        rng,
        size,
        np.zeros((*size, 3)),
        np.zeros(size, np.uint8),
        horizon=rng.uniform(-0.2, 0.08),
        vanishing=rng.normal(0, 0.15),
    )
    everywhere = np.ones(size, bool)
    canvas.paint(everywhere, 0, _hue(rng, 0, len(classes)), 12)
    # From far to near; what the list of classes doesn't name comes last, as blobs.
    order = sorted(range(len(classes)), key=lambda k: list(_PAINTERS).index(_known(classes[k])))
    for label in order:
        painter = _PAINTERS[_known(classes[label])]
        if label == 0 and painter is _blobs:
            continue
        painter(canvas, label, len(classes))
    x, y = axes(size)
    light = rng.uniform(0.6, 1.15) + rng.normal(0, 0.2) * x + rng.normal(0, 0.1) * y
    tint = 1 + rng.normal(0, 0.05, 3)
    grain = rng.normal(0, rng.uniform(3, 12), (*size, 3))
    canvas.image = canvas.image * light[..., None] * tint + grain
    return canvas


def _sky(canvas: Canvas, label: int, _: int) -> None:
    y = axes(canvas.size)[1]
    tone = canvas.rng.uniform(0, 1)
    colour = (1 - tone) * np.array([120, 165, 225]) + tone * np.array([205, 205, 205])
    canvas.paint(_wide(y < canvas.horizon + 0.02, canvas.size), label, colour, 10)


def _buildings(canvas: Canvas, label: int, _: int) -> None:
    x, y = axes(canvas.size)
    left = -0.6
    while left < 0.5:
        width = canvas.rng.uniform(0.08, 0.3)
        top = canvas.horizon - canvas.rng.uniform(0.03, 0.38)
        where = (x >= left) & (x < left + width) & (y > top) & (y < canvas.horizon + 0.1)
        if canvas.rng.random() < 0.75:
            colour = canvas.colour(*canvas.rng.uniform(80, 190, 3))
            canvas.paint(where, label, colour, 8)
            rows, columns = canvas.rng.integers(18, 34, 2)
            windows = where & ((y * rows % 1) > 0.55) & ((x * columns % 1) > 0.55)
            canvas.image[windows] *= canvas.rng.uniform(0.4, 1.4)
        left += width


def _surface(outer: float, *near: float) -> Callable[[Canvas, int, int], None]:
    def paint(canvas: Canvas, label: int, _: int) -> None:
        x, y = axes(canvas.size)
        depth = (y - canvas.horizon) / (0.5 - canvas.horizon)
        half = outer * np.clip(depth, 0, None) * canvas.rng.uniform(0.85, 1.15) + 0.02
        middle = canvas.vanishing * (1 - depth)
        where = (y > canvas.horizon + 0.02) & (np.abs(x - middle) < half)
        canvas.paint(where, label, canvas.colour(*near), 9)

    return paint


def _trees(canvas: Canvas, label: int, _: int) -> None:
    x, y = axes(canvas.size)
    colour = canvas.colour(*((70, 95, 50) if canvas.rng.random() < 0.7 else (130, 100, 50)))
    for _number in range(canvas.rng.integers(1, 6)):
        place = canvas.rng.uniform(-0.5, 0.5)
        radius = canvas.rng.uniform(0.05, 0.17)
        top = canvas.horizon - radius * canvas.rng.uniform(0.3, 1.5)
        crown = np.hypot(x - place, y - top) + 0.25 * radius * noise(canvas.rng, 14, canvas.size)
        trunk = (np.abs(x - place) < 0.1 * radius) & (y > top) & (y < canvas.horizon + 0.06)
        canvas.paint((crown < radius) | trunk, label, colour, 26)


def _fences(canvas: Canvas, label: int, _: int) -> None:
    x, y = axes(canvas.size)
    for side in (-1, 1):
        if canvas.rng.random() < 0.5:
            low = canvas.horizon + 0.1
            band = (y > low - canvas.rng.uniform(0.05, 0.1)) & (y < low)
            where = band & (side * (x - canvas.vanishing) > canvas.rng.uniform(0.15, 0.3))
            canvas.paint(where, label, canvas.colour(120, 115, 125), 20)


def _boxes(
    number: tuple[int, int], wide: float, tall: float, raised: float = 0.0
) -> Callable[[Canvas, int, int], None]:
    """Things that stand on the ground: rounded boxes whose size follows from their place."""

    def paint(canvas: Canvas, label: int, _: int) -> None:
        x, y = axes(canvas.size)
        for _number in range(canvas.rng.integers(*number)):
            foot, near = canvas.ground()
            place = canvas.rng.uniform(-0.5, 0.5)
            half = 0.5 * wide * near * canvas.rng.uniform(0.8, 1.25)
            height = tall * near * canvas.rng.uniform(0.8, 1.2)
            middle = foot - height / 2 - raised * near
            reach = (np.abs(x - place) / half) ** 4 + (np.abs(y - middle) / (height / 2)) ** 4
            colour = canvas.rng.uniform(20, 235, 3)
            canvas.paint(reach < 1, label, colour, 14)
            shade = (reach < 0.5) & (y < middle)
            canvas.image[shade] *= canvas.rng.uniform(0.5, 1.2)

    return paint


def _poles(canvas: Canvas, label: int, _: int) -> None:
    x, y = axes(canvas.size)
    for _number in range(canvas.rng.integers(0, 4)):
        foot, near = canvas.ground()
        place = canvas.rng.uniform(-0.5, 0.5)
        half = max(0.02 * near, 0.6 / canvas.size[1])
        where = (np.abs(x - place) < half) & (y < foot) & (y > foot - 0.9 * near - 0.1)
        canvas.paint(where, label, canvas.colour(110, 110, 110), 5)


def _blobs(canvas: Canvas, label: int, classes: int) -> None:
    x, y = axes(canvas.size)
    for _number in range(canvas.rng.integers(0, 3)):
        place = canvas.rng.uniform(-0.45, 0.45, 2)
        radius = canvas.rng.uniform(0.05, 0.18)
        reach = np.hypot(x - place[0], (y - place[1]) * canvas.rng.uniform(0.7, 1.4))
        where = reach + 0.25 * radius * noise(canvas.rng, 8, canvas.size) < radius
        canvas.paint(where, label, _hue(canvas.rng, label, classes), 18)


_PAINTERS: dict[str, Callable[[Canvas, int, int], None]] = {
    "sky": _sky,
    "building": _buildings,
    "pavement": _surface(30.0, 150, 130, 140),
    "road": _surface(0.75, 95, 92, 95),
    "tree": _trees,
    "fence": _fences,
    "pole": _poles,
    "sign": _boxes((0, 3), 0.16, 0.2, raised=0.45),
    "car": _boxes((0, 5), 0.42, 0.25),
    "bicyclist": _boxes((0, 3), 0.14, 0.34),
    "pedestrian": _boxes((0, 4), 0.09, 0.36),
    "": _blobs,
}


def _known(name: str) -> str:
    return name if name in _PAINTERS else ""


def _hue(rng: np.random.Generator, label: int, classes: int) -> Array:
    hue = label / classes + rng.normal(0, 0.03)
    return 255 * np.array(
        colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.3, 0.7), rng.uniform(0.4, 0.9))
    )


def _borders(labels: NDArray[np.uint8]) -> Mask:
    """Pixels whose right or lower neighbour is of another class."""
    found = np.zeros(labels.shape, bool)
    found[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    found[:-1] |= labels[:-1] != labels[1:]
    return found


def _wide(rows: Mask, size: tuple[int, int]) -> Mask:
    return np.broadcast_to(rows, size)
