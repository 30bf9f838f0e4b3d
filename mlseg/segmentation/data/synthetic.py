"""Dermoscopy-like images with lesion masks, for machines without data: `synthetic_lesions`.

Skin of many tones under uneven light, hair, rulers, ink, stickers and gel bubbles; lesions of any
size and place with an irregular outline, soft borders and several pigments, from nearly black to
hardly darker than the skin; moles, freckles and reddened skin that are not the lesion; and, as in
hand-drawn masks, an outline that follows the visible one only roughly. They are hard enough to tell
a good segmentor from a bad one, and no replacement for real images: figures from them mean nothing
beside published ones.

Image i is a function of the seed and of i alone: it doesn't depend on how many images are asked
for, and at another size it shows the same lesion. Coordinates run from -0.5 to 0.5 over height and
over width.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# RGB of skin and of pigments under a dermatoscope, chosen by eye.
_SKIN = np.array(
    [
        [233, 196, 178],
        [216, 160, 122],
        [226, 128, 112],
        [176, 158, 154],
        [238, 205, 160],
        [206, 150, 150],
        [150, 110, 84],
    ]
)
_PIGMENT = np.array(
    [
        [172, 112, 70],
        [132, 76, 48],
        [78, 42, 30],
        [38, 30, 42],
        [160, 58, 48],
        [196, 120, 104],
        [110, 88, 74],
    ]
)
_INK = np.array([92.0, 58.0, 150.0])
_STICKERS = np.array([[40.0, 160, 80], [235, 205, 40], [60, 90, 190], [225, 110, 50]])


def synthetic_lesions(
    indices: Sequence[int], size: tuple[int, int], seed: int = 0, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Images and masks by number.

    Args:
        indices: N numbers, 0 or above.
        size: (H, W) in pixels.
        seed: another seed, other images.
        channels: 3, or 1 for the same in grey.

    Returns:
        images (N, channels, H, W) uint8 and masks (N, H, W) uint8, 0 skin, 1 lesion. No mask is
        empty.
    """
    images = np.empty((len(indices), channels, *size), np.uint8)
    masks = np.empty((len(indices), *size), np.uint8)
    for position, index in enumerate(indices):
        image, masks[position] = _lesion(np.random.default_rng([seed, index]), *size)
        if channels == 1:
            image = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
        images[position] = np.rint(image).astype(np.uint8).transpose(2, 0, 1)
    return torch.from_numpy(images), torch.from_numpy(masks)


def noise(rng: np.random.Generator, cells: int, size: tuple[int, int]) -> Array:
    """Smooth noise (H, W) of about zero mean and unit deviation, `cells` bumps across each axis."""
    grid = rng.standard_normal((cells + 3, cells + 3))
    # Cubic B-spline weights shrink the deviation to about 0.5.
    return 2.0 * (_weights(cells, size[0]) @ grid @ _weights(cells, size[1]).T)


@lru_cache(maxsize=64)
def _weights(cells: int, length: int) -> Array:
    """(length, cells + 3) uniform cubic B-spline basis at the centres of `length` pixels."""
    place = (np.arange(length) + 0.5) / length * cells
    first = np.minimum(place.astype(int), cells - 1)
    t = place - first
    basis = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 3 * (t + t**2 - t**3) + 1, t**3]) / 6
    weights = np.zeros((length, cells + 3))
    for offset in range(4):
        weights[np.arange(length), first + offset] = basis[offset]
    return weights


@lru_cache(maxsize=8)
def axes(size: tuple[int, int]) -> tuple[Array, Array]:
    """x (1, W) and y (H, 1), -0.5 to 0.5, of the pixels' centres."""
    height, width = size
    return (
        ((np.arange(width) + 0.5) / width - 0.5)[None, :],
        ((np.arange(height) + 0.5) / height - 0.5)[:, None],
    )


def _lesion(rng: np.random.Generator, height: int, width: int) -> tuple[Array, NDArray[np.uint8]]:
    """One RGB image (H, W, 3), 0 to 255, and its mask (H, W)."""
    size = (height, width)
    x, y = axes(size)
    image, tone = _skin(rng, size)

    radius = float(np.exp(rng.uniform(np.log(0.09), np.log(0.46))))
    spread = 0.13 * (1 - radius)
    centre = rng.normal(0, spread, 2)
    distance, drawn = _outline(rng, x - centre[0], y - centre[1], radius, size)

    if rng.random() < 0.3:
        image = _reddened(rng, image, size, centre, radius)
    for _ in range(rng.integers(1, 9) if rng.random() < 0.4 else 0):
        image = _mole(rng, image, size, tone)
    image = _pigmented(rng, image, size, distance, tone)
    image = _artefacts(rng, image, size)

    light = 1 + rng.uniform(0, 0.16) * (rng.normal() * x + rng.normal() * y) * 2
    corner = np.hypot(x, y)
    light = light - rng.uniform(0, 0.5) * np.clip(corner - 0.35, 0, None)
    if rng.random() < 0.15:  # the round field of the dermatoscope
        light = light * np.clip((rng.uniform(0.52, 0.66) - corner) * 60, 0.03, 1)
    image = image * light[..., None]

    mask = drawn < 0
    if not mask.any():
        mask.flat[np.argmin(drawn)] = True
    grain = rng.normal(0, rng.uniform(1.5, 6), (height, width, 3))
    return np.clip(image + grain, 0, 255), mask.astype(np.uint8)


def _skin(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Array, Array]:
    """Skin (H, W, 3) with mottling and texture, and its mean colour."""
    first, second = rng.integers(0, len(_SKIN), 2)
    mix = rng.random()
    tone = (mix * _SKIN[first] + (1 - mix) * _SKIN[second]) * rng.uniform(0.82, 1.06)
    tone = np.clip(tone + rng.normal(0, 5, 3), 40, 250)
    mottled = rng.uniform(2, 9) * noise(rng, int(rng.integers(3, 8)), size)
    fine = rng.uniform(1, 6) * noise(rng, int(rng.integers(18, 40)), size)
    blush = np.array([0.6, 1.1, 1.0])  # mottling is blood: it takes more green and blue than red
    return tone + mottled[..., None] * blush + fine[..., None], tone


def _outline(
    rng: np.random.Generator, x: Array, y: Array, radius: float, size: tuple[int, int]
) -> tuple[Array, Array]:
    """Relative distance from the lesion's outline, below 0 inside: as visible, and as drawn."""
    turn, flat = rng.uniform(0, np.pi), np.sqrt(rng.uniform(0.45, 1.0))
    along = (np.cos(turn) * x + np.sin(turn) * y) * flat
    across = (np.cos(turn) * y - np.sin(turn) * x) / flat
    angle, reach = np.arctan2(across, along), np.hypot(along, across) / radius

    ragged = rng.uniform(0.03, 0.22)
    wave = np.zeros_like(reach)
    smooth = np.zeros_like(reach)
    for order in range(1, 8):
        term = (
            rng.normal() * ragged / order**0.8 * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
        )
        wave += term
        if order <= 3:
            smooth += term
    cells = int(np.clip(round(3 / radius), 6, 40))
    crumbled = rng.uniform(0.0, 0.16) * noise(rng, cells, size)
    visible = reach - np.clip(1 + wave, 0.35, None) + crumbled

    # A mask follows the outline closely or as a rough hand-drawn curve, a little wide on average.
    slack = rng.normal(0.05, 0.05)
    if rng.random() < 0.5:
        return visible, reach - np.clip(1 + smooth, 0.35, None) - slack
    return visible, visible - slack


def _pigmented(
    rng: np.random.Generator, image: Array, size: tuple[int, int], distance: Array, tone: Array
) -> Array:
    """The lesion over the skin: two or three pigments, uneven density, a soft border."""
    strength = 0.3 + 0.7 * rng.beta(2.2, 1.0)
    soft = np.exp(rng.uniform(np.log(0.03), np.log(0.2)))
    cover = _sigmoid(-distance / soft)
    clouds = rng.uniform(0.05, 0.35) * noise(rng, int(rng.integers(4, 10)), size)
    grains = rng.uniform(0.05, 0.35) * noise(rng, int(rng.integers(16, 48)), size)
    density = np.clip(1 + clouds + grains, 0, 1.3)
    if rng.random() < 0.2:  # regression: the middle has faded
        density = density * (1 - rng.uniform(0.3, 0.9) * _sigmoid((-distance - 0.5) / 0.12))
    if rng.random() < 0.35:  # pigment network
        density = density * (
            1 - 0.4 * _sigmoid(5 * (noise(rng, int(rng.integers(20, 36)), size) - 0.4))
        )

    first, second, third = _PIGMENT[rng.integers(0, len(_PIGMENT), 3)]
    first = np.minimum(first, 0.85 * tone)  # a lesion is darker than the skin around it
    share = _sigmoid(2.5 * noise(rng, int(rng.integers(2, 6)), size) - rng.uniform(0, 3))
    colour = first + share[..., None] * (np.minimum(second, tone) - first)
    if rng.random() < 0.3:
        globules = _sigmoid(6 * (noise(rng, int(rng.integers(10, 24)), size) - 1.2))
        colour = colour + globules[..., None] * 0.7 * (third - colour)
    alpha = np.clip(strength * cover * density, 0, 1)[..., None]
    return image + alpha * (colour - image)


def _mole(rng: np.random.Generator, image: Array, size: tuple[int, int], tone: Array) -> Array:
    """A freckle or mole that isn't the lesion."""
    x, y = axes(size)
    place = rng.uniform(-0.5, 0.5, 2)
    radius = rng.uniform(0.012, 0.05)
    reach = np.hypot(x - place[0], (y - place[1]) * rng.uniform(0.7, 1.4)) / radius
    alpha = rng.uniform(0.15, 0.7) * _sigmoid((1 - reach) / 0.25)
    colour = np.minimum(_PIGMENT[rng.integers(0, 3)], tone)
    return image + alpha[..., None] * (colour - image)


def _reddened(
    rng: np.random.Generator, image: Array, size: tuple[int, int], centre: Array, radius: float
) -> Array:
    """Inflamed skin about or beside the lesion."""
    x, y = axes(size)
    place = centre + rng.normal(0, 0.2, 2)
    reach = np.hypot(x - place[0], y - place[1]) / (radius + rng.uniform(0.1, 0.3))
    alpha = rng.uniform(0.1, 0.35) * _sigmoid((1 - reach + 0.3 * noise(rng, 5, size)) / 0.3)
    return image + alpha[..., None] * (np.array([205, 70, 75]) - image)


def _artefacts(rng: np.random.Generator, image: Array, size: tuple[int, int]) -> Array:
    """Hair, ruler, ink, sticker, gel bubbles: what lies between the lens and the skin."""
    x, y = axes(size)
    if rng.random() < 0.45:
        number = int(np.exp(rng.uniform(0, np.log(45))))
        colour = rng.uniform(0.1, 0.5) * np.array([150, 105, 80])
        image = _over(image, rng.uniform(0.4, 0.95) * _hairs(rng, number, size), colour)
    if rng.random() < 0.25:
        image = _over(image, 0.7 * _ruler(rng, size), np.array([45.0, 42, 48]))
    if rng.random() < 0.08:
        image = _over(image, 0.6 * _scribble(rng, size), _INK)
    if rng.random() < 0.08:
        turn, away, radius = (
            rng.uniform(0, 2 * np.pi),
            rng.uniform(0.5, 0.62),
            rng.uniform(0.1, 0.3),
        )
        reach = np.hypot(x - away * np.cos(turn), y - away * np.sin(turn))
        sticker = _STICKERS[rng.integers(0, len(_STICKERS))]
        image = _over(image, np.clip((radius - reach) * 80, 0, 1), sticker)
    for _ in range(rng.integers(1, 12) if rng.random() < 0.15 else 0):
        place, radius = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.01, 0.04)
        ring = np.abs(np.hypot(x - place[0], y - place[1]) - radius) / (0.3 * radius)
        image = _over(image, 0.5 * np.clip(1 - ring, 0, 1), np.array([250.0, 245, 245]))
    return image


def _hairs(rng: np.random.Generator, number: int, size: tuple[int, int]) -> Array:
    """Coverage (H, W) of bent hairs, most of them in one direction."""
    steps = 3 * max(size)
    t = np.linspace(0, 1, steps)
    growth = rng.uniform(0, np.pi)
    direction = growth + rng.normal(0, 0.35, number)
    length = rng.uniform(0.25, 1.1, number)
    bend = rng.normal(0, 0.12, number)
    start = rng.uniform(-0.6, 0.6, (2, number))
    curve = bend * np.sin(np.pi * t)[:, None]
    along = (t[:, None] - 0.5) * length
    x = start[0] + along * np.cos(direction) - curve * np.sin(direction)
    y = start[1] + along * np.sin(direction) + curve * np.cos(direction)
    width = rng.uniform(0.004, 0.011, number) * min(size)  # pixels
    ink = np.broadcast_to(width * length * max(size) / steps, x.shape)
    return np.clip(_splat(x, y, ink, size), 0, 1)


def _ruler(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """Coverage (H, W) of a scale with marks, near an edge."""
    ticks = int(rng.integers(8, 20))
    turn, away, length = rng.uniform(-0.3, 0.3), rng.uniform(0.3, 0.47), rng.uniform(0.4, 0.9)
    along = np.linspace(-0.5, 0.5, 3 * max(size)) * length
    places = np.repeat(np.linspace(-0.5, 0.5, ticks) * length, 12)
    marks = np.tile(np.linspace(0, 0.035, 12), ticks)
    u = np.concatenate([along, places])
    v = np.concatenate([np.zeros_like(along), -marks]) + away
    turn += rng.integers(0, 4) * np.pi / 2
    x, y = u * np.cos(turn) - v * np.sin(turn), u * np.sin(turn) + v * np.cos(turn)
    ink = np.full(x.shape, 0.3 * length)
    return np.clip(_splat(x, y, ink, size), 0, 1)


def _scribble(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """Coverage (H, W) of a pen's scrawl on the skin."""
    walk = rng.normal(0, 0.03, (2, 40)).cumsum(1) + rng.uniform(-0.4, 0.4, (2, 1))
    t = np.linspace(0, 39, 6 * max(size))
    x, y = (np.interp(t, np.arange(40), line) for line in walk)
    return np.clip(_splat(x, y, np.full(x.shape, 0.25), size), 0, 1)


def _splat(x: Array, y: Array, ink: Array, size: tuple[int, int]) -> Array:
    """Points with weights, shared out over the four pixels around each; (H, W)."""
    height, width = size
    column, row = (x.ravel() + 0.5) * width - 0.5, (y.ravel() + 0.5) * height - 0.5
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    canvas = np.zeros(height * width)
    for down in (0, 1):
        for right in (0, 1):
            r, c = top + down, left + right
            weight = (1 - np.abs(row - r)) * (1 - np.abs(column - c)) * ink.ravel()
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            canvas += np.bincount(
                r[inside] * width + c[inside], weight[inside], minlength=height * width
            )
    return canvas.reshape(height, width)


def _over(image: Array, alpha: Array, colour: Array) -> Array:
    return image + alpha[..., None] * (colour - image)


def _sigmoid(value: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(value, -40, 40)))
