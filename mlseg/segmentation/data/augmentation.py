"""Geometric and colour augmentation on the device: one draw, one resampling, for image and mask.

All geometric operations of a sample are composed, in an order drawn per sample, into one affine map
and applied with one `grid_sample`: bilinear for images, nearest for masks, so that a mask keeps its
values and nothing is interpolated twice. The map is drawn and composed on the CPU from an explicit
generator and copied to the device: the same augmentation on every device.

Convention: centred pixel coordinates (x to the right, y down, the origin in the image's centre); a
matrix takes a point of the source image to where it goes. Angles in degrees, positive is clockwise
on the screen, as in torchvision's `affine`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from mlseg import parallel
from mlseg.config import Settings
from mlseg.errors import UserError
from mlseg.transfer import to_device

# An image or None, and the same comes back.
ImageT = TypeVar("ImageT", Tensor, None)
Probability = Annotated[float, pydantic.Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, pydantic.Field(ge=0.0, lt=1.0)]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the grey of saturation and of Pillow's mode L


class AugmentationSettings(Settings):
    """Ranges of the operations; at the defaults nothing happens.

    Each operation is drawn for every sample, uniformly within its range. In a config the name of a
    preset does instead (``augmentation: genseg``), or a preset with changes
    (``augmentation: {preset: paper, flip_vertical: 0.5}``).

    Attributes:
        flip_horizontal, flip_vertical: probability of a flip.
        rotate: degrees, drawn from [-rotate, rotate]; 0 to 180.
        translate: fraction of height and width, each axis from [-translate, translate].
        scale: lowest and highest factor, drawn per axis.
        shear: degrees, drawn for the x axis from [-shear, shear]; below 90.
        crop: fraction of height and width by which each of the four sides is cropped or, where the
            draw is negative, padded: from [-crop, crop]. Below 0.5.
        window: pixels, one number or [height, width], of a window cut out of the image at a place
            drawn for every sample, before all else; None keeps the whole image.
        fill: what comes in from outside: "black" (and background, or the ignore index where the
            loader knows one, in the mask), "border" (the nearest pixel) or "reflection".
        brightness, contrast, saturation: factor from [1 - x, 1 + x], of the image in [0, 1].
        hue: turn of the colour circle, from [-hue, hue]; at most 0.5. Grey images have neither hue
            nor saturation, and keep what they have.
    """

    flip_horizontal: Probability = 0.0
    flip_vertical: Probability = 0.0
    rotate: Annotated[float, pydantic.Field(ge=0.0, le=180.0)] = 0.0
    translate: Fraction = 0.0
    scale: Annotated[list[float], pydantic.Field(min_length=2, max_length=2)] = [1.0, 1.0]
    shear: Annotated[float, pydantic.Field(ge=0.0, lt=90.0)] = 0.0
    crop: Annotated[float, pydantic.Field(ge=0.0, lt=0.5)] = 0.0
    window: int | list[int] | None = None
    fill: Literal["black", "border", "reflection"] = "black"
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, pydantic.Field(ge=0.0, le=0.5)] = 0.0

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict) or "preset" not in value:
            return value
        name = value["preset"]
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name] | {key: given for key, given in value.items() if key != "preset"}

    @pydantic.field_validator("window")
    @classmethod
    def _check_window(cls, value: int | list[int] | None) -> int | list[int] | None:
        numbers = [1] if value is None else [value] if isinstance(value, int) else value
        if len(numbers) not in (1, 2) or min(numbers) < 1:
            raise ValueError("a number of pixels, or [height, width], each at least 1")
        return value

    @pydantic.field_validator("scale")
    @classmethod
    def _check_scale(cls, value: list[float]) -> list[float]:
        if not 0.0 < value[0] <= value[1]:
            raise ValueError("two factors, the lower first, both above 0")
        return value

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of what comes out, for images of ``size``.

        Raises:
            UserError: the window is larger than the image.
        """
        if self.window is None:
            return size
        window = [self.window] if isinstance(self.window, int) else self.window
        height, width = window[0], window[-1]
        if height > size[0] or width > size[1]:
            raise UserError(
                f"augmentation.window: {height}x{width} pixels don't fit into images of "
                f"{size[0]}x{size[1]}; lower it, or raise data.image_size"
            )
        return height, width

    @classmethod
    def preset(cls, name: str) -> "AugmentationSettings":
        """One of `PRESETS` by name."""
        return cls.model_validate(name)

    @classmethod
    def off(cls) -> "AugmentationSettings":
        """Nothing: image and mask pass unchanged."""
        return cls.preset("off")


PRESETS: dict[str, dict[str, Any]] = {
    "off": {},
    "rotate": {"rotate": 15.0},
    "flip": {"flip_horizontal": 0.5},
    "translate": {"translate": 0.1},
    "combine": {"rotate": 15.0, "flip_horizontal": 0.5, "translate": 0.1},
    "paper": {"rotate": 15.0, "flip_horizontal": 0.5, "translate": 0.1},
    "genseg": {
        "rotate": 15.0,
        "flip_horizontal": 0.5,
        "translate": 0.1,
        "scale": [0.8, 1.2],
        "shear": 8.0,
        "crop": 0.1,
    },
}
"""``paper``: rotation, flip and translation in random order (E2EAug, section 4.1), which names the
operations; the ranges are those of its public code, GenSeg, which also scales, shears and crops
(``genseg``)."""


@dataclass(frozen=True)
class Draw:
    """One draw for a batch: what has to be kept to apply the same augmentation again.

    Attributes:
        theta: (B, 2, 3) float32 on the CPU, output to input in the normalised coordinates of
            `affine_grid` (align_corners=False); None where no geometric operation is on.
        colour: (B, 4) float32 on the CPU: factors of brightness, contrast and saturation, turn of
            hue in radians; None where no colour operation is on.
        windows: (top, left, height, width) of every sample's window; None where none is cut.
    """

    theta: Tensor | None
    colour: Tensor | None
    windows: list[tuple[int, int, int, int]] | None = None

    def of(self, span: slice) -> "Draw":
        """Of some samples."""
        theta = None if self.theta is None else self.theta[span]
        colour = None if self.colour is None else self.colour[span]
        return Draw(theta, colour, None if self.windows is None else self.windows[span])


class Augmentation:
    """Augments batches as `settings` say.

    Args:
        settings: ranges.
        ignore_index: what a mask shows where fill "black" comes in; None: class 0, background.
    """

    def __init__(self, settings: AugmentationSettings, ignore_index: int | None = None) -> None:
        self.settings = settings
        self.mask_fill = 0 if ignore_index is None else ignore_index

    def __call__(
        self,
        image: ImageT,
        mask: Tensor,
        generator: torch.Generator,
        part: parallel.Part | None = None,
    ) -> tuple[ImageT, Tensor]:
        """Draw once and apply to both.

        Args:
            image: (B, C, H, W) float in [-1, 1], or None to augment masks alone.
            mask: (B, H, W) class indices of any integer type, or float.
            generator: on the CPU; the only source of randomness. Several processes draw for the
                whole batch, so that each example's draw is the same however it is shared out.
            part: which part of the whole batch these are; None: an equal share of each process.

        Returns:
            image and mask of the same types and device, of the same shapes but for a window.
        """
        batch, height, width = mask.shape
        place = parallel.part_of_share(batch) if part is None else part
        draw = self.draw(place.total, height, width, generator)
        return self.apply(image, mask, draw if place.total == batch else draw.of(place.span))

    def draw(self, batch: int, height: int, width: int, generator: torch.Generator) -> Draw:
        """Draw for a batch; takes the same random numbers whatever the image's size."""
        windows = self._windows(batch, height, width, generator)
        if windows is not None:
            _, _, height, width = windows[0]
        operations = self._operations(batch, height, width, generator)
        theta = None
        if operations:
            matrix = compose(torch.stack(operations, 1), generator)
            theta = to_theta(matrix, height, width)
        return Draw(theta, self._colour(batch, generator), windows)

    def apply(self, image: ImageT, mask: Tensor, draw: Draw) -> tuple[ImageT, Tensor]:
        """Apply a draw: see `__call__`. Differentiable with respect to the image."""
        if draw.windows is not None:
            mask = _cut(mask, draw.windows)
            image = image if image is None else _cut(image, draw.windows)
        if draw.theta is not None:
            theta = to_device(draw.theta, mask.device)
            size = [len(mask), 1, *mask.shape[-2:]]
            grid = F.affine_grid(theta, size, align_corners=False)
            mask = self._sample(mask.unsqueeze(1), grid, "nearest", self.mask_fill).squeeze(1)
            if image is not None:
                image = self._sample(image, grid.to(image.dtype), "bilinear", -1)
        if draw.colour is not None and image is not None:
            image = jitter(image, draw.colour)
        return image, mask

    def _sample(self, value: Tensor, grid: Tensor, mode: str, fill: int) -> Tensor:
        # grid_sample fills with zeros only, so "black" is shifted there and back. Indices below
        # 2 ** 24 are exact in float32.
        padding = {"black": "zeros"}.get(self.settings.fill, self.settings.fill)
        shifted = (value if value.is_floating_point() else value.to(torch.float32)) - fill
        sampled = F.grid_sample(shifted, grid, mode, padding, align_corners=False) + fill
        if value.is_floating_point():
            return sampled
        return sampled.round().to(value.dtype)

    def _windows(
        self, batch: int, height: int, width: int, generator: torch.Generator
    ) -> list[tuple[int, int, int, int]] | None:
        """A window for each sample, uniform over its places."""
        if self.settings.window is None:
            return None
        high, wide = self.settings.output_size((height, width))
        draw = torch.rand(batch, 2, generator=generator)
        # The draw is on the host, so these are plain numbers there.
        last = torch.tensor([height - high, width - wide])
        places = torch.minimum((draw * (last + 1)).int(), last).tolist()
        return [(top, left, high, wide) for top, left in places]

    def _operations(
        self, batch: int, height: int, width: int, generator: torch.Generator
    ) -> list[Tensor]:
        """A (B, 3, 3) float64 matrix for each operation that is on."""
        settings = self.settings

        def uniform(low: float, high: float) -> Tensor:
            draw = torch.rand(batch, generator=generator, dtype=torch.float64)
            return low + (high - low) * draw

        found = []
        if settings.flip_horizontal or settings.flip_vertical:
            x = torch.where(uniform(0, 1) < settings.flip_horizontal, -1.0, 1.0)
            y = torch.where(uniform(0, 1) < settings.flip_vertical, -1.0, 1.0)
            found.append(_matrix(x, 0, 0, 0, y, 0))
        if settings.rotate:
            angle = uniform(-settings.rotate, settings.rotate) * (math.pi / 180)
            cos, sin = angle.cos(), angle.sin()
            found.append(_matrix(cos, -sin, 0, sin, cos, 0))
        if settings.translate:
            x = uniform(-settings.translate, settings.translate) * width
            y = uniform(-settings.translate, settings.translate) * height
            found.append(_matrix(torch.ones(batch), 0, x, 0, 1, y))
        if settings.scale != [1.0, 1.0]:
            found.append(_matrix(uniform(*settings.scale), 0, 0, 0, uniform(*settings.scale), 0))
        if settings.shear:
            slope = (uniform(-settings.shear, settings.shear) * (math.pi / 180)).tan()
            found.append(_matrix(torch.ones(batch), -slope, 0, 0, 1, 0))
        if settings.crop:
            left, right, top, bottom = (uniform(-settings.crop, settings.crop) for _ in range(4))
            # The window that is kept, [left, 1 - right], is stretched over the whole width.
            x, y = 1 / (1 - left - right), 1 / (1 - top - bottom)
            shift_x, shift_y = (right - left) / 2 * width * x, (bottom - top) / 2 * height * y
            found.append(_matrix(x, 0, shift_x, 0, y, shift_y))
        return found

    def _colour(self, batch: int, generator: torch.Generator) -> Tensor | None:
        ranges = torch.tensor(
            [
                self.settings.brightness,
                self.settings.contrast,
                self.settings.saturation,
                self.settings.hue * 2 * math.pi,
            ]
        )
        if not ranges.any():
            return None
        draw = torch.rand(batch, 4, generator=generator) * 2 - 1
        return torch.tensor([1.0, 1.0, 1.0, 0.0]) + draw * ranges


def _cut(value: Tensor, windows: list[tuple[int, int, int, int]]) -> Tensor:
    """A window of each sample, (B, ..., H, W) -> (B, ..., h, w)."""
    return torch.stack(
        [
            sample[..., top : top + height, left : left + width]
            for sample, (top, left, height, width) in zip(value, windows, strict=True)
        ]
    )


def compose(operations: Tensor, generator: torch.Generator) -> Tensor:
    """Product of a sample's matrices in an order drawn for each sample.

    Args:
        operations: (B, K, 3, 3), source to output.

    Returns:
        (B, 3, 3), source to output, of all K one after the other.
    """
    batch, number = operations.shape[:2]
    order = torch.rand(batch, number, generator=generator).argsort(1)
    product = torch.eye(3, dtype=operations.dtype).expand(batch, 3, 3)
    for position in range(number):
        product = operations[torch.arange(batch), order[:, position]] @ product
    return product


def to_theta(matrix: Tensor, height: int, width: int) -> Tensor:
    """Source-to-output matrices (B, 3, 3) in centred pixels to `affine_grid`'s theta (B, 2, 3).

    The grid is asked from the output's side, so the map is inverted; its coordinates run from -1 to
    1 over height and width, so that a rotation of a rectangle stays a rotation.
    """
    size = torch.tensor([width / 2, height / 2, 1.0], dtype=matrix.dtype)
    inverse = torch.linalg.inv(matrix)
    return (inverse * size / size[:, None])[:, :2].to(torch.float32)


def jitter(image: Tensor, colour: Tensor) -> Tensor:
    """Brightness, then contrast, saturation and hue, of images (B, C, H, W) in [-1, 1].

    Brightness scales the image in [0, 1], contrast its distance from its mean grey, saturation its
    distance from its own grey; hue turns the chroma plane of YIQ. All four are linear, so they are
    one 3x3 matrix and one shift per image. Clipped to the range at the end.

    Args:
        colour: (B, 4) factors and angle on the CPU, see `Draw`.
    """
    batch, channels, height, width = image.shape
    brightness, contrast = colour[:, 0], colour[:, 1]
    if channels == 3:
        luma, matrix = torch.tensor(LUMA), _colour_matrix(colour[:, 2], colour[:, 3])
    else:
        luma, matrix = torch.full((channels,), 1 / channels), torch.eye(channels)
    matrix = matrix * (brightness * contrast)[:, None, None]
    to_shift = luma * (brightness * (1 - contrast))[:, None]
    # One copy to the device for both.
    both = to_device(torch.cat([matrix, to_shift[:, None]], 1).to(image.dtype), image.device)
    value = ((image + 1) / 2).reshape(batch, channels, height * width)
    shift = both[:, channels:] @ value.mean(2, keepdim=True)
    value = torch.baddbmm(shift, both[:, :channels], value).reshape(image.shape)
    return value.clamp(0, 1) * 2 - 1


def _colour_matrix(saturation: Tensor, hue: Tensor) -> Tensor:
    """(B, 3, 3) on RGB: keeps the luma, scales and turns the chroma."""
    red, green, blue = LUMA
    grey = torch.tensor([LUMA] * 3)
    # I and Q from red less luma and blue less luma (NTSC), and the way back; the green follows
    # from the luma of a colour difference being 0.
    to_iq = torch.tensor([[0.736, 0.0, -0.268], [0.478, 0.0, 0.413]])
    red_blue = torch.linalg.inv(to_iq[:, [0, 2]])
    back = torch.stack(
        [red_blue[0], -(red * red_blue[0] + blue * red_blue[1]) / green, red_blue[1]]
    )
    turn = torch.stack([hue.cos(), -hue.sin(), hue.sin(), hue.cos()], 1).reshape(-1, 2, 2)
    return grey + saturation[:, None, None] * (back @ turn @ to_iq @ (torch.eye(3) - grey))


def _matrix(
    xx: Tensor,
    xy: Tensor | int,
    x: Tensor | int,
    yx: Tensor | int,
    yy: Tensor | int,
    y: Tensor | int,
) -> Tensor:
    """(B, 3, 3) float64 of the affine map (x, y) -> (xx x + xy y + x, yx x + yy y + y)."""
    batch = len(xx)
    matrix = torch.zeros(batch, 3, 3, dtype=torch.float64)
    matrix[:, 2, 2] = 1
    for row, column, entry in (
        (0, 0, xx), (0, 1, xy), (0, 2, x), (1, 0, yx), (1, 1, yy), (1, 2, y),
    ):  # fmt: skip
        matrix[:, row, column] = entry
    return matrix
