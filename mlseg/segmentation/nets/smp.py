"""Any architecture of segmentation-models-pytorch, by name; weights where they are asked for."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional

from mlseg.errors import UserError
from mlseg.segmentation.nets.layers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    accept_single_values,
    pad_to_multiple,
)
from mlseg.segmentation.nets.segmentor import SEGMENTORS

# segmentation-models-pytorch is imported where it is needed: that takes seconds.

_PREFIX = "smp_"
"""Of the names of architectures that a network here bears too."""

# Set by mlseg itself: shapes come from the data, weights from `starting`, outputs are logits.
_OURS = {
    "self",
    "kwargs",
    "encoder_name",
    "encoder_weights",
    "in_channels",
    "classes",
    "activation",
    "aux_params",
}

# PAN halves its deepest map (stride 16) three times and needs 8 positions a side there.
_SMALLEST_SIDE = {"pan": 128}


@cache
def _signature(architecture: str) -> Mapping[str, inspect.Parameter]:
    import segmentation_models_pytorch as smp

    return inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[architecture].__init__).parameters


def default_encoder(architecture: str) -> str:
    """The encoder segmentation-models-pytorch gives this architecture if none is named."""
    return str(_signature(architecture)["encoder_name"].default)


def check_encoder(encoder: str) -> str:
    """Raise UserError for an encoder that segmentation-models-pytorch doesn't know.

    Encoders of timm ("tu-...") are not in its list and are checked when they are built.
    """
    import segmentation_models_pytorch as smp

    known = smp.encoders.get_encoder_names()
    if encoder in known or encoder.startswith("tu-"):
        return encoder
    near = difflib.get_close_matches(encoder, known, n=3)
    few = near or ["resnet18", "resnet34", "efficientnet-b0", "mobilenet_v2", "mit_b0"]
    raise UserError(
        f"unknown encoder {encoder!r}; {'nearest' if near else 'for example'}: {', '.join(few)} "
        "(all: segmentation_models_pytorch.encoders.get_encoder_names(), or tu-<a timm model>)"
    )


def check_options(architecture: str, options: dict[str, Any]) -> dict[str, Any]:
    """Raise UserError for a keyword that this architecture doesn't take or mlseg sets itself."""
    valid = sorted(set(_signature(architecture)) - _OURS)
    for key in options:
        if key not in valid:
            raise UserError(f"{architecture!r} has no option {key!r}; valid: {', '.join(valid)}")
    return options


@SEGMENTORS.source
def architectures() -> dict[str, Callable[..., nn.Module]]:
    """All of segmentation-models-pytorch, by the names that they have in a config."""
    import segmentation_models_pytorch as smp

    return {
        _PREFIX + name if name in SEGMENTORS.registered() else name: _builder(name)
        for name in smp.MODEL_ARCHITECTURES_MAPPING
    }


@cache
def _builder(architecture: str) -> Callable[..., nn.Module]:
    def build(
        in_channels: int,
        num_classes: int,
        *,
        encoder: Annotated[str, AfterValidator(check_encoder)] = default_encoder(architecture),
        options: Annotated[
            dict[str, Any], AfterValidator(lambda given: check_options(architecture, given))
        ] = {},  # noqa: B006, only read
    ) -> nn.Module:
        """Of segmentation-models-pytorch, from random weights.

        Args:
            encoder: name of an encoder of that library, or ``tu-`` and a name of timm's.
            options: further keywords of the architecture.
        """
        return SmpSegmentor(architecture, in_channels, num_classes, encoder, options)

    build.__name__ = architecture
    return build


class SmpSegmentor(nn.Module):
    """A segmentation-models-pytorch network that takes images of any size and batches of one.

    Sides that the network's stride doesn't divide are padded by repeating the edge, and the output
    is cropped. A vision transformer with a fixed input size (DPT) sees the image resized to that
    size, and its logits are resized back.

    Args:
        architecture: as segmentation-models-pytorch names it.
        in_channels: channels of the image.
        num_classes: K, channels of the output.
        encoder: encoder name, or None for the architecture's default.
        options: further keywords of the architecture, see `check_options`.

    Raises:
        UserError: if the library refuses the encoder or an option; the text holds its reason.
    """

    def __init__(
        self,
        architecture: str,
        in_channels: int,
        num_classes: int,
        encoder: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        import segmentation_models_pytorch as smp

        super().__init__()
        encoder = encoder or default_encoder(architecture)
        check_encoder(encoder)
        self.made_of = (architecture, encoder, options or {})
        try:
            self.network = smp.create_model(
                architecture,
                encoder_name=encoder,
                encoder_weights=None,
                in_channels=in_channels,
                classes=num_classes,
                **(options or {}),
            )
        except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{architecture!r} of segmentation-models-pytorch can't be built with encoder "
                f"{encoder!r}: {reason}"
            ) from error
        accept_single_values(self.network)
        self.fixed_size = self._find_fixed_size()
        stride = int(self.network.encoder.output_stride)
        # FPN and PSPNet enlarge by a fixed factor that may exceed a shallow encoder's stride.
        self.multiple = stride if architecture.startswith("deeplab") else max(stride, 32)
        self.smallest = _SMALLEST_SIDE.get(architecture, 1)

    def _find_fixed_size(self) -> tuple[int, int] | None:
        embedding = getattr(getattr(self.network.encoder, "model", None), "patch_embed", None)
        if embedding is None or not getattr(embedding, "strict_img_size", False):
            return None
        size = getattr(embedding, "img_size", None)
        return None if size is None else (int(size[0]), int(size[1]))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) image in [-1, 1] -> (B, K, H, W) logits, any H and W."""
        if self.fixed_size is not None:
            resized = functional.interpolate(image_BCHW, self.fixed_size, mode="bilinear")
            logits = self.network(resized)
            return functional.interpolate(logits, image_BCHW.shape[-2:], mode="bilinear")
        x, (rows, columns) = pad_to_multiple(image_BCHW, self.multiple, self.smallest)
        return self.network(x)[..., rows, columns]

    def published_encoder(self, name: str, pixels: str) -> dict[str, Tensor]:
        """The encoder's weights that segmentation-models-pytorch downloads, for three channels.

        Args:
            name: under which it has them, such as ``imagenet``.
            pixels: what the network is to see of pixels, see `layers.normalise`.

        Raises:
            UserError: there are none of that name, or they are of other pixels.
            Exception: they can't be downloaded.
        """
        import segmentation_models_pytorch as smp

        architecture, encoder, options = self.made_of
        if not encoder.startswith("tu-"):
            known = sorted(smp.encoders.encoders[encoder]["pretrained_settings"])
            if name not in known:
                published = ", ".join(known) or "none"
                raise UserError(f"{encoder} has no weights {name!r}; published: {published}")
        elif name != "imagenet":
            raise UserError(f"timm has one set of weights of {encoder}; name it imagenet")
        whole = smp.create_model(
            architecture, encoder_name=encoder, encoder_weights=name, in_channels=3, **options
        )
        found = smp.encoders.get_preprocessing_params(encoder, pretrained=name)
        wanted = _pixels(found)
        if wanted != pixels:
            raise UserError(
                f"{name} of {encoder} was trained on pixels as normalise={wanted} gives them; set "
                "segmentor.normalise to that"
                if wanted
                else f"{name} of {encoder} was trained on pixels as mlseg gives none ({found})"
            )
        return dict(whole.encoder.state_dict())


def _pixels(found: Mapping[str, Any]) -> str | None:
    """Which of mlseg's ranges of pixels a library's own description means; None: none of them."""
    if found.get("input_space", "RGB") != "RGB" or list(found.get("input_range") or [0, 1]) != [
        0,
        1,
    ]:
        return None
    mean, std = (tuple(float(x) for x in found.get(key) or ()) for key in ("mean", "std"))
    known: dict[tuple[tuple[float, ...], tuple[float, ...]], str] = {
        (IMAGENET_MEAN, IMAGENET_STD): "imagenet",
        ((0.5,) * 3, (0.5,) * 3): "none",
        ((0.0,) * 3, (1.0,) * 3): "unit",
        ((), ()): "unit",
    }
    return known.get((mean, std))
