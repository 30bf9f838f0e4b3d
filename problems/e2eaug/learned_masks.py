"""Ranges and probabilities of mask augmentation as parameters of level three.

A draw is reparametrised: chance gives numbers that depend on nothing, of which the present ranges
make angles, shifts and factors. Whether an operation happens is a relaxed Bernoulli variable
(binary concrete: Maddison, Mnih, Teh, ICLR 2017, appendix B; Jang, Gu, Poole, ICLR 2017)

    z = sigmoid((logit p + log u - log(1 - u)) / temperature),    u uniform in [0, 1],

between 0 and 1, so that at a low temperature most are near either. One-hot masks are resampled
bilinearly (``affine_grid`` and ``grid_sample``: Jaderberg et al., Spatial Transformer Networks,
NeurIPS 2015), and what comes out is differentiable by all of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg import parallel
from mlseg.problems.e2eaug.masks import label_channels
from mlseg.segmentation.data import AugmentationSettings
from mlseg.transfer import to_device

ALWAYS = 0.9
"""The probability from which on an operation is learned that a config applies to every mask: at 1
its derivative is 0."""

_BOUNDS = {
    "rotate": (0.0, 180.0),
    "translate": (0.0, 0.5),
    "scale_low": (1.0, 0.5),
    "scale_high": (1.0, 1.5),
    "flip_horizontal": (0.0, 1.0),
    "flip_vertical": (0.0, 1.0),
    "rotate_probability": (0.0, 1.0),
    "translate_probability": (0.0, 1.0),
    "scale_probability": (0.0, 1.0),
}
"""Of each value: where it does nothing, and the furthest that it may go."""

# Columns of a draw.
_EVENTS = {"flip_horizontal": 0, "flip_vertical": 1, "rotate": 2, "translate": 3, "scale": 4}
_ANGLE, _X, _Y, _WIDE, _HIGH = range(5, 10)
_ORDER = slice(10, 13)
_COLUMNS = 13


def starting_values(settings: AugmentationSettings) -> dict[str, float]:
    """The values that are learned, at a config's: of the operations that it has on.

    Raises:
        ValueError: there are none, one is at a bound, or an operation can't be learned.
    """
    for key in ("shear", "crop"):
        if getattr(settings, key):
            raise ValueError(
                f"level3.mask_augmentation: {key} can't be learned; set mask_augmentation.{key} "
                "to 0"
            )
    low, high = settings.scale
    if settings.scale != [1.0, 1.0] and not low <= 1.0 <= high:
        raise ValueError(
            "level3.mask_augmentation: mask_augmentation.scale is learned as a range about 1; give "
            "a lowest factor of at most 1, and a highest of at least 1"
        )
    given = {
        "rotate": settings.rotate,
        "translate": settings.translate,
        "scale_low": low,
        "scale_high": high,
        "flip_horizontal": settings.flip_horizontal,
        "flip_vertical": settings.flip_vertical,
    }
    values = {}
    for name, value in given.items():
        nothing, furthest = _BOUNDS[name]
        if value == nothing:
            continue
        if abs(value - nothing) >= abs(furthest - nothing):
            key = name.partition("_")[0] if name.startswith("scale") else name
            side = "above" if furthest < nothing else "below"
            raise ValueError(
                f"level3.mask_augmentation: mask_augmentation.{key} begins at the end of what can "
                f"be learned; keep it {side} {furthest:g}"
            )
        values[name] = value
    for operation in ("rotate", "translate", "scale"):
        if any(name.startswith(operation) for name in values):
            values[f"{operation}_probability"] = ALWAYS
    if not values:
        raise ValueError(
            "level3.mask_augmentation: mask_augmentation has no rotation, translation, scale or "
            "flip to learn; give it some, or drop this"
        )
    return values


class LearnedMasks(nn.Module):
    """Masks augmented at ranges that level three learns: soft ones to the generator, hard targets.

    Rotation, translation and scaling are composed in an order drawn for every mask; flips follow,
    which come to the same in any place, the ranges of the others being symmetric. An operation that
    happens by half is half as wide; a flip that does so blends a mask with its mirror image. The
    target is the class that has most of a pixel of the soft mask, and has no gradient.

    Args:
        settings: what to begin with; operations that it has off stay off.
        num_classes: K.
        ignore_index: of masks; None where all pixels have a class.
        temperature: of whether operations happen.

    ``logits`` is its only parameter: each value lies between two bounds, by a sigmoid.

    Raises:
        ValueError: see :func:`starting_values`.
    """

    def __init__(
        self,
        settings: AugmentationSettings,
        num_classes: int,
        ignore_index: int | None,
        temperature: float,
    ) -> None:
        super().__init__()
        start = starting_values(settings)
        self.names = list(start)
        self.fill = settings.fill
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.temperature = temperature
        shares = [
            (value - _BOUNDS[name][0]) / (_BOUNDS[name][1] - _BOUNDS[name][0])
            for name, value in start.items()
        ]
        self.logits = nn.Parameter(
            torch.tensor(shares, dtype=torch.float64).logit().to(torch.get_default_dtype())
        )

    def values(self) -> dict[str, Tensor]:
        """What is learned, by name: degrees, fractions of a side, factors, probabilities."""
        shares = self.logits.sigmoid().unbind()
        return {
            name: _BOUNDS[name][0] + (_BOUNDS[name][1] - _BOUNDS[name][0]) * share
            for name, share in zip(self.names, shares, strict=True)
        }

    def draw(
        self, mask: Tensor, generator: torch.Generator, part: parallel.Part | None = None
    ) -> Tensor:
        """(B, 13) numbers that the values have no part in, as many whatever is learned."""
        place = parallel.part_of_share(len(mask)) if part is None else part
        drawn = torch.rand(place.total, _COLUMNS, generator=generator, dtype=torch.float64)
        drawn[:, : len(_EVENTS)] = drawn[:, : len(_EVENTS)].logit()
        return to_device(drawn[place.span].to(torch.get_default_dtype()), mask.device)

    def forward(self, mask: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Soft label maps, in [-1, 1] as of ``encode``, and targets of :meth:`draw`'s numbers."""
        drawn = drawn.to(self.logits.dtype)
        with torch.autocast(mask.device.type, enabled=False):
            soft = self._resampled(mask, drawn)
            for name, dimension in (("flip_horizontal", -1), ("flip_vertical", -2)):
                if name in self.names:
                    happens = self._happens(name, drawn).view(-1, 1, 1, 1)
                    soft = happens * soft.flip(dimension) + (1 - happens) * soft
        shown = soft[:, 1:] if label_channels(self.num_classes) == 1 else soft
        return shown * 2.0 - 1.0, self._hard(soft.detach())

    def _resampled(self, mask: Tensor, drawn: Tensor) -> Tensor:
        """(B, K, H, W), each class's share of a pixel; what is ignored has no share."""
        classes = torch.arange(self.num_classes, device=mask.device).view(1, -1, 1, 1)
        one_hot = (mask.unsqueeze(1) == classes).to(self.logits.dtype)
        operations = self._operations(drawn, *mask.shape[-2:])
        if not operations:
            return one_hot
        order = drawn[:, _ORDER][:, : len(operations)].argsort(1)[:, :, None, None]
        matrix, *others = torch.stack(operations, 1).take_along_dim(order, 1).unbind(1)
        for other in others:
            matrix = matrix @ other
        grid = functional.affine_grid(matrix[:, :2], list(one_hot.shape), align_corners=False)
        # Zeros come in from outside: shifted there and back they are background, or ignored.
        outside = (classes == 0).to(one_hot.dtype) if self.ignore_index is None else 0.0
        padding = {"black": "zeros"}.get(self.fill, self.fill)
        sampled = functional.grid_sample(
            one_hot - outside, grid, padding_mode=padding, align_corners=False
        )
        return sampled + outside

    def _operations(self, drawn: Tensor, height: int, width: int) -> list[Tensor]:
        """(B, 3, 3) of each operation, from the output to its source, in `affine_grid`'s units."""
        values, found = self.values(), []
        one, nothing = torch.ones_like(drawn[:, 0]), torch.zeros_like(drawn[:, 0])

        def affine(*rows: Tensor) -> Tensor:
            return torch.stack([*rows, nothing, nothing, one], 1).view(-1, 3, 3)

        if "rotate" in values:
            degrees = self._happens("rotate", drawn) * values["rotate"] * _even(drawn[:, _ANGLE])
            angle = degrees * (math.pi / 180)
            cos, sin = angle.cos(), angle.sin()
            up, down = sin * (height / width), sin * (-width / height)
            found.append(affine(cos, up, nothing, down, cos, nothing))
        if "translate" in values:
            # In fractions of a side, which is 2 long.
            reach = self._happens("translate", drawn) * values["translate"] * -2.0
            x, y = reach * _even(drawn[:, _X]), reach * _even(drawn[:, _Y])
            found.append(affine(one, nothing, x, nothing, one, y))
        if "scale_probability" in values:
            low, high = values.get("scale_low", one), values.get("scale_high", one)
            happens = self._happens("scale", drawn)
            wide, tall = (
                1 / (1 + happens * (low + (high - low) * drawn[:, column] - 1))
                for column in (_WIDE, _HIGH)
            )
            found.append(affine(wide, nothing, nothing, nothing, tall, nothing))
        return found

    def _happens(self, operation: str, drawn: Tensor) -> Tensor:
        """(B,) how far an operation happens to each mask, between 0 and 1."""
        flips = operation.startswith("flip")
        logit = self.logits[self.names.index(operation if flips else f"{operation}_probability")]
        return ((logit + drawn[:, _EVENTS[operation]]) / self.temperature).sigmoid()

    def _hard(self, soft: Tensor) -> Tensor:
        """(B, H, W) of shares (B, K, H, W): the class that has most, or what is ignored."""
        if self.ignore_index is None:
            return soft.argmax(1)
        most = torch.cat([soft, 1 - soft.sum(1, keepdim=True)], 1).argmax(1)
        return torch.where(most == self.num_classes, self.ignore_index, most)


def _even(uniform: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return 2 * uniform - 1
