"""Networks, a file each, and the segmentors by name.

`SegmentorSettings` is what a config says about a segmentor, `build_segmentor` makes it, and
`segmentor_names` lists what can be named; `class_probabilities` and `decide` turn its logits into
a prediction.
"""

from typing import Any

from pydantic import Field, model_validator
from torch import nn

from mlseg.config import Settings
from mlseg.errors import UserError
from mlseg.segmentation.nets.deeplab import DeepLabV3
from mlseg.segmentation.nets.prediction import class_probabilities, decide, temperature
from mlseg.segmentation.nets.unet import UNet

_DEFAULTS: dict[str, dict[str, Any]] = {
    "unet": {"channels": 64, "levels": 4},
    "deeplabv3": {},
    "segan": {"channels": 64, "levels": 6, "expansion": 0.25, "global_kernel": 7},
}
# segmentation-models-pytorch has a U-Net and a DeepLabV3 of its own; these are their names here.
_PREFIX = "smp_"


def segmentor_names() -> list[str]:
    """Every name that `SegmentorSettings` takes."""
    from mlseg.segmentation.nets import smp

    others = [_PREFIX + name if name in _DEFAULTS else name for name in smp.ARCHITECTURES]
    return [*_DEFAULTS, *others]


def _architecture(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _defaults(name: str) -> dict[str, Any]:
    """The settings that the named segmentor takes, with their defaults. UserError if unknown."""
    if name in _DEFAULTS:
        return _DEFAULTS[name]
    # Imported here because it takes seconds and most runs never need it.
    from mlseg.segmentation.nets import smp

    if name not in segmentor_names():
        raise UserError(f"unknown segmentor {name!r}; valid names: {', '.join(segmentor_names())}")
    return {"encoder": smp.default_encoder(_architecture(name)), "options": {}}


class SegmentorSettings(Settings):
    """A segmentor by name, with the settings that this network takes and no others.

    | name | settings |
    |---|---|
    | `unet` | `channels`: width of the first level (64); `levels`: number of downsamplings (4) |
    | `deeplabv3` | none: torchvision's DeepLabV3 with a ResNet-50 |
    | `segan` | `channels` (64); `levels`: 2 to 6 (6); `expansion`, `global_kernel`: see `SegAN` |
    | others | `encoder`: `resnet34`, `mit_b0`, ...; `options`: keywords of the architecture |

    The others are the architectures of segmentation-models-pytorch (`unetplusplus`, `fpn`,
    `segformer`, ...), its own U-Net and DeepLabV3 as `smp_unet` and `smp_deeplabv3`.

    After validation the settings of the named network hold their defaults, the others are None.
    No network ever downloads weights.
    """

    name: str = "unet"
    channels: int | None = Field(default=None, ge=1)
    levels: int | None = Field(default=None, ge=1, le=8)
    expansion: float | None = Field(default=None, gt=0)
    global_kernel: int | None = Field(default=None, ge=1)
    encoder: str | None = None
    options: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("name", "unet"), str):
            return data
        name = data.get("name", "unet")
        defaults = _defaults(name)
        given = {key: value for key, value in data.items() if value is not None}
        for key in given:
            if key in cls.model_fields and key != "name" and key not in defaults:
                valid = ", ".join(defaults) or "none but name"
                raise UserError(f"segmentor {name!r} has no setting {key!r}; valid: {valid}")
        return defaults | given

    @model_validator(mode="after")
    def _check_library_settings(self) -> "SegmentorSettings":
        if self.name in _DEFAULTS:
            return self
        from mlseg.segmentation.nets import smp

        assert self.encoder is not None
        smp.check_encoder(self.encoder)
        valid = smp.valid_options(_architecture(self.name))
        for key in self.options or {}:
            if key not in valid:
                raise UserError(
                    f"segmentor {self.name!r} has no option {key!r}; valid: {', '.join(valid)}"
                )
        return self


def build_segmentor(settings: SegmentorSettings, in_channels: int, num_classes: int) -> nn.Module:
    """Make the segmentor that `settings` describes, with random weights.

    Args:
        settings: the network and its settings.
        in_channels: channels of the image, 1 or more.
        num_classes: K, at least 2 (binary: background and foreground).

    Returns:
        A module (B, in_channels, H, W) in [-1, 1] -> (B, K, H, W) logits, for any H and W.

    Raises:
        UserError: for fewer than 2 classes, or settings that the network's library refuses.
    """
    if num_classes < 2:
        raise UserError(
            f"a segmentor needs at least 2 classes (background counts as one), not {num_classes}"
        )
    if settings.name == "unet":
        assert settings.channels is not None
        assert settings.levels is not None
        return UNet(in_channels, num_classes, settings.channels, settings.levels)
    if settings.name == "deeplabv3":
        return DeepLabV3(in_channels, num_classes)
    if settings.name == "segan":
        from mlseg.problems.segan.networks.segmentor import SegAN

        own = settings.model_dump(exclude={"name"}, exclude_none=True)
        return SegAN(in_channels, num_classes, **own)
    from mlseg.segmentation.nets.smp import SmpSegmentor

    return SmpSegmentor(
        _architecture(settings.name), in_channels, num_classes, settings.encoder, settings.options
    )


__all__ = [
    "SegmentorSettings",
    "build_segmentor",
    "class_probabilities",
    "decide",
    "segmentor_names",
    "temperature",
]
