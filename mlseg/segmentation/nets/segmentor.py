"""Segmentors by name: what a config says of one, and how it is made.

A segmentor is a class or function ``Net(in_channels, num_classes, *, its settings)``; the module
takes (B, in_channels, H, W) in [-1, 1] to (B, num_classes, H, W) logits, for any H and W. Where it
is defined it registers itself; one of a user's own is found by dotted path as well:

    segmentor: {name: my_package.nets:MyNet, width: 32}
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from mlseg.config import Tree, parse
from mlseg.config.components import Component, parameters_of
from mlseg.config.registry import NotTrusted, Registry, import_module, say_foreign
from mlseg.errors import UserError
from mlseg.segmentation.nets.layers import normalise

SEGMENTORS: Registry[Callable[..., nn.Module]] = Registry(
    "segmentor", packages=["mlseg.segmentation.nets"], example="my_package.nets:MyNet"
)


_Text = Annotated[str, Field(min_length=1)]


def _beside(annotation: Any, meaning: str) -> tuple[Any, Any]:
    return annotation | None, Field(default=None, description=meaning)


class SegmentorSettings(Component):
    """A segmentor by name, with the settings that this network takes and no others.

    Beside the registered ones there are the architectures of segmentation-models-pytorch
    (``unetplusplus``, ``fpn``, ``segformer``, ...; its own U-Net and DeepLabV3 as ``smp_unet`` and
    ``smp_deeplabv3``), with the settings ``encoder`` (``resnet34``, ``mit_b0``, ...) and
    ``options``, keywords of the architecture.

    Every network that has no keywords of these names takes besides what ``beside`` lists, for
    :mod:`mlseg.segmentation.nets.starting`.
    """

    registry = SEGMENTORS
    given = 2
    beside: ClassVar = {
        "weights": _beside(
            _Text, "a file (or a run) with the weights of a whole segmentor to start from"
        ),
        "weights_classes": _beside(
            Annotated[list[str], Field(min_length=1)],
            "names of the classes in that file, in their order",
        ),
        "encoder_weights": _beside(
            _Text,
            "weights of the encoder alone: a file, or a name, such as imagenet, under which the "
            "library that knows the encoder downloads them",
        ),
        "normalise": _beside(
            Literal["none", "unit", "imagenet"],
            "what the network sees of pixels: none, [-1, 1]; unit, [0, 1]; imagenet, without "
            "ImageNet's mean and divided by its standard deviation, the default where weights are "
            "named",
        ),
    }

    name: str = "unet"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.said("weights") and self.said("encoder_weights"):
            raise ValueError("weights: they hold an encoder's too; drop encoder_weights")
        if self.said("weights_classes") and not self.said("weights"):
            raise ValueError("weights_classes: of no file; name weights, or drop it")
        return self

    @property
    def normalised(self) -> str:
        """What the network sees of pixels: ``none``, ``unit`` or ``imagenet``."""
        named = self.said("weights") or self.said("encoder_weights")
        return self.said("normalise") or ("imagenet" if named else "none")

    def seen_by(self, found: Mapping[str, Any]) -> str:
        """What another network of this class has seen of pixels: see :attr:`normalised`.

        Args:
            found: its settings, as a checkpoint holds them. A key that this class takes for
                itself means nothing of pixels there either.
        """
        taken = parameters_of(self.registry.get(self.name))
        said = {key: found.get(key) for key in self.beside if key not in taken}
        named = said.get("weights") or said.get("encoder_weights")
        return str(said.get("normalise") or ("imagenet" if named else "none"))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds of it: plain values, from which :func:`described` makes it."""
        settings = self.model_dump(mode="json", exclude_none=True)
        own = self.module.split(".")[0] == "mlseg"
        return {"settings": settings, **({} if own else {"module": self.module})}


def described(found: Mapping[str, Any], source: str) -> SegmentorSettings:
    """The settings that a checkpoint holds.

    Args:
        found: what :meth:`SegmentorSettings.describe` has given.
        source: where it stands, for errors.

    Raises:
        UserError: the network is a user's own that can't be imported here, isn't trusted, or has
            other settings by now.
    """
    module = found.get("module")
    say_foreign({"imports": [module], "settings": found["settings"]})
    if module is not None:
        try:
            import_module(module)
        except NotTrusted as error:
            raise UserError(f"{source}: segmentor: {error}") from None
        except UserError as error:
            raise UserError(
                f"{source}: its segmentor is defined in {module}: {error}; run this in the folder "
                "that holds it, or add that folder to PYTHONPATH"
            ) from None
    return parse(SegmentorSettings, Tree(dict(found["settings"]), source=source))


def segmentor_names() -> list[str]:
    """Every name that `SegmentorSettings` takes, beside dotted paths."""
    return SEGMENTORS.names()


def build_segmentor(settings: SegmentorSettings, in_channels: int, num_classes: int) -> nn.Module:
    """Make the segmentor that `settings` describes, with random weights.

    Its channels are last in memory, the layout that CPUs and tensor cores like, wherever it is
    used: each layout's kernels round in their own way, and a run's figures have to come out again.

    Args:
        settings: the network and its settings.
        in_channels: channels of the image, 1 or more.
        num_classes: K, at least 2 (binary: background and foreground).

    Raises:
        UserError: for fewer than 2 classes, or settings that the network refuses.
    """
    if num_classes < 2:
        raise UserError(
            f"a segmentor needs at least 2 classes (background counts as one), not {num_classes}"
        )
    made = settings.build(in_channels, num_classes)
    if not isinstance(made, nn.Module):
        raise UserError(f"segmentor {settings.name!r}: it must make a torch.nn.Module")
    normalise(made, settings.normalised, in_channels)
    return made.to(memory_format=torch.channels_last)
