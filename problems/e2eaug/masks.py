"""The masks that synthetic images are made of: real ones, augmented, as a generator takes them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mlseg import parallel
from mlseg.segmentation.data import Augmentation


class Masks(Protocol):
    """How augmented masks come about.

    Drawing and making are apart: a draw is part of a batch, and an evaluation of a step again makes
    the same masks of it.
    """

    def draw(
        self, mask: Tensor, generator: torch.Generator, part: parallel.Part | None = None
    ) -> Tensor:
        """What chance has a part in, for masks (B, H, W) of class indices.

        Args:
            generator: on the CPU; the only source of randomness.
            part: which part of the whole batch these are; None: an equal share of each process.
        """

    def __call__(self, mask: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's input, see :func:`encode`, and the target, (B, H, W) class indices."""


class Augmented:
    """Masks augmented at given ranges.

    Args:
        augmentation: of masks alone.
        num_classes: K.
    """

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        self.augmentation, self.num_classes = augmentation, num_classes

    def draw(
        self, mask: Tensor, generator: torch.Generator, part: parallel.Part | None = None
    ) -> Tensor:
        """The augmented masks themselves."""
        return self.augmentation(None, mask, generator, part)[1]

    def __call__(self, mask: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """As they were drawn."""
        return encode(drawn, self.num_classes), drawn


def label_channels(num_classes: int) -> int:
    """Channels of an encoded label map of K classes."""
    return 1 if num_classes == 2 else num_classes


def encode(mask: Tensor, num_classes: int) -> Tensor:
    """A label map as the generator's input.

    Args:
        mask: (B, H, W) class indices; any other value (an ignore index) belongs to no class.
        num_classes: K.

    Returns:
        (B, 1, H, W) for two classes, else one channel per class; 1 inside, -1 outside.
    """
    if num_classes == 2:
        inside = (mask == 1).unsqueeze(1)
    else:
        classes = torch.arange(num_classes, device=mask.device).view(1, -1, 1, 1)
        inside = mask.unsqueeze(1) == classes
    return inside.to(torch.get_default_dtype()) * 2.0 - 1.0
