"""Features of VGG-19 (Simonyan and Zisserman, ICLR 2015), for a perceptual loss.

relu1_1, 2_1, 3_1, 4_1 and 5_1, as pix2pixHD and SPADE compare them. Weights are never downloaded:
they come from a file, or are random. Liu et al. (CVPR 2021, arXiv 2103.10571) find random ones
about as good for losses of dense predictions where they are initialised to keep the variance from
layer to layer.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg import checkpoint
from mlseg.errors import UserError, one_line
from mlseg.files import reachable, require_file

STAGES = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512,))
"""Widths of the 3x3 convolutions between poolings, as far as relu5_1."""

WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
"""Of the differences at each, from the first stage to the last."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's images in [0, 1], which torchvision's weights expect to be taken out."""

SMALLEST_SIDE = 2 ** (len(STAGES) - 1)
"""Pixels: what four poolings leave something of."""


class PerceptualFeatures(nn.Module):
    """Image (B, C, H, W) in [-1, 1] to the first features of each stage; nothing in it is trained.

    One channel is taken as three. Its parameters are named as those of torchvision's
    ``vgg19().features``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[tuple[str, nn.Conv2d]] = []
        index, width = 0, 3
        for stage in STAGES:
            for wide in stage:
                layers.append((str(index), nn.Conv2d(width, wide, 3, padding=1)))
                index, width = index + 2, wide  # each is followed by a ReLU
            index += 1  # a pooling
        self.features = nn.ModuleDict(dict(layers))
        for convolution in self.features.values():
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.requires_grad_(False)

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        """relu1_1 to relu5_1."""
        x = image_BCHW if image_BCHW.shape[1] == 3 else image_BCHW.expand(-1, 3, -1, -1)
        x = ((x + 1) / 2 - self.mean) / self.std
        convolutions = iter(self.features.values())
        found = []
        for number, stage in enumerate(STAGES):
            if number:
                x = functional.max_pool2d(x, 2)
            for place, _ in enumerate(stage):
                x = functional.relu(next(convolutions)(x))
                if place == 0:
                    found.append(x)
        return found


def load_weights(features: PerceptualFeatures, file: str | Path, key: str) -> None:
    """Take over the state dict of torchvision's VGG-19, whole or of its ``features`` alone.

    Args:
        key: the setting that names the file, for messages.

    Raises:
        UserError: there is no such file, or it holds something else; nothing in it is executed.
    """
    path = reachable(file)
    if not path.is_file():
        raise UserError(
            f"{key}: {path}: no such file; name a state dict of torchvision's vgg19, or choose "
            "random or none"
        )
    require_file(path)
    try:
        if zipfile.is_zipfile(path):
            checkpoint.verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file may hold makes the unpickler fail in any way
        raise UserError(
            f"{key}: {path}: damaged, or not a file of weights alone ({one_line(error)})"
        ) from error
    try:
        _take(features, state)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{key}: {path}: no state dict of torchvision's vgg19 ({one_line(error)})"
        ) from error


def _take(features: PerceptualFeatures, state: Any) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}")
    own = dict(features.features.named_parameters())
    prefix = "features." if any(str(k).startswith("features.") for k in state) else ""
    found = {}
    for name, parameter in own.items():
        tensor = state.get(f"{prefix}{name}")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"features.{name} is missing")
        if not tensor.is_floating_point() or tensor.shape != parameter.shape:
            raise ValueError(
                f"features.{name} is {tuple(tensor.shape)} of {tensor.dtype}, not "
                f"{tuple(parameter.shape)} of floats"
            )
        found[name] = tensor
    endless = checkpoint.first_not_finite(found)
    if endless is not None:
        raise ValueError(f"features.{endless} is not finite")
    features.features.load_state_dict(found)
