"""LoAd's discriminators: does this label map belong to this image, and did a human draw it?

They see the image split by class: K copies of it, each zero outside of one class's pixels, stacked
into 3 K channels (LoAd, figure 2 and section 4), or the label map alone, and give one logit.
"""

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from mlseg.config import Settings
from mlseg.errors import UserError
from mlseg.segmentation.nets.layers import BatchNorm

_TIMM = {"mobilenet_v1": "mobilenetv1_100", "vgg16": "vgg16"}
_SMALLEST = {"cnn": 16, "vgg16": 32, "mobilenet_v1": 1}
"""Pixels a side, which halvings without padding leave something of."""


class DiscriminatorSettings(Settings):
    """A discriminator by name.

    Attributes:
        name: ``mobilenet_v1`` (width 1, the paper's), ``vgg16``, or ``cnn``, four small strided
            convolutions.
        input_size: pixels, height and width to which the split image is resized; None: its own.
        dropout: before the last layer.
        channels: of the first convolution of ``cnn``.
        sees: ``split``, the image split by class, or ``maps``, the label map alone: whether it
            belongs to the image can't be told then.
        masked_range: images are split with values in ``signed`` [-1, 1], where a pixel of another
            class is mid grey, or ``unit`` [0, 1], where it is black.
    """

    name: Literal["mobilenet_v1", "vgg16", "cnn"] = "mobilenet_v1"
    input_size: PositiveInt | None = 224
    dropout: float = Field(default=0.01, ge=0.0, lt=1.0)
    channels: PositiveInt = 32
    sees: Literal["split", "maps"] = "split"
    masked_range: Literal["signed", "unit"] = "signed"


def require_input_size(settings: DiscriminatorSettings, size: tuple[int, int]) -> None:
    """Raise UserError for an input that is too small for the network.

    Args:
        settings: which network.
        size: (H, W) of the images it is given.
    """
    side = settings.input_size or min(size)
    if side < _SMALLEST[settings.name]:
        raise UserError(
            f"discriminator.input_size: {side} pixels are too few for {settings.name!r}; give "
            f"{_SMALLEST[settings.name]} or more"
        )


class Discriminator(nn.Module):
    """One logit per pair of image and label map; positive means drawn by a human.

    Args:
        settings: which network.
        in_channels: C of the image.
        num_classes: K.
    """

    def __init__(self, settings: DiscriminatorSettings, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.size, self.sees = settings.input_size, settings.sees
        self.unit = settings.masked_range == "unit"
        channels = num_classes if self.sees == "maps" else in_channels * num_classes
        if settings.name == "cnn":
            self.network: nn.Module = _cnn(channels, settings.channels, settings.dropout)
        else:
            # Here, since it is slow to import and most runs need none of it.
            import timm

            options: dict[str, Any] = {"in_chans": channels, "drop_rate": settings.dropout}
            name = _TIMM[settings.name]
            self.network = timm.create_model(name, pretrained=False, num_classes=1, **options)

    def forward(self, image_BCHW: Tensor, maps_BKHW: Tensor) -> Tensor:
        """(B, C, H, W) image, (B, K, H, W) label maps, zero where ignored -> (B,) logits."""
        if self.sees == "maps":
            x = maps_BKHW
        else:
            x = split_by_class((image_BCHW + 1) / 2 if self.unit else image_BCHW, maps_BKHW)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            # After masking: resized before, neighbouring classes would run into one another.
            x = functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(x).squeeze(1)


def split_by_class(image_BCHW: Tensor, maps_BKHW: Tensor) -> Tensor:
    """X o Y_c for every class c, stacked: (B, K C, H, W), class by class."""
    return (maps_BKHW.unsqueeze(2) * image_BCHW.unsqueeze(1)).flatten(1, 2)


def one_hot(labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Label maps as (B, K, H, W) float planes; what is no class (an ignore index) is zero in all.

    Args:
        labels_BHW: (B, H, W) of any integer type.
        num_classes: K.
    """
    classes = torch.arange(num_classes, device=labels_BHW.device, dtype=labels_BHW.dtype)
    return (labels_BHW.unsqueeze(1) == classes.view(1, -1, 1, 1)).float()


def _cnn(in_channels: int, channels: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    widths = [in_channels, *(channels * factor for factor in (1, 2, 4, 4))]
    for before, after in pairwise(widths):
        layers += [
            nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False),
            BatchNorm(after),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(widths[-1], 1)]
    return nn.Sequential(*layers, *end)
