"""Segmentors by name: what a config says of one, and how it is made.

A segmentor is a class or function ``Net(in_channels, num_classes, *, its settings)``; the module
takes (B, in_channels, H, W) in [-1, 1] to (B, num_classes, H, W) logits, for any H and W. Where it
is defined it registers itself; one of a user's own is found by dotted path as well:

    segmentor: {name: my_package.nets:MyNet, width: 32}
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mlseg.config import Tree, parse
from mlseg.config.components import Component
from mlseg.config.registry import NotTrusted, Registry, import_module, say_foreign
from mlseg.errors import UserError

SEGMENTORS: Registry[Callable[..., nn.Module]] = Registry(
    "segmentor", packages=["mlseg.segmentation.nets"], example="my_package.nets:MyNet"
)


class SegmentorSettings(Component):
    """A segmentor by name, with the settings that this network takes and no others.

    Beside the registered ones there are the architectures of segmentation-models-pytorch
    (``unetplusplus``, ``fpn``, ``segformer``, ...; its own U-Net and DeepLabV3 as ``smp_unet`` and
    ``smp_deeplabv3``), with the settings ``encoder`` (``resnet34``, ``mit_b0``, ...) and
    ``options``, keywords of the architecture. None of these ever downloads weights.
    """

    registry = SEGMENTORS
    given = 2

    name: str = "unet"

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
    return made
