"""Discriminators by name.

A discriminator is a class ``Net(in_channels, *, its settings)`` derived from `PairCritic`; it takes
label map and image, concatenated. Where it is defined it registers itself.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mlseg.config.registry import Registry

Judgement = list[list[Tensor]]
"""By scale, the outputs of the layers; the last one of a scale are its logits."""


class PairCritic(nn.Module, ABC):
    """A network that judges pairs of label map and image.

    Attributes:
        has_features: whether what it returns holds more than the logits.
        limit: the setting that bounds the images' size from below, as a config's key.
    """

    has_features = False
    limit = "layers"

    @property
    @abstractmethod
    def smallest_side(self) -> int:
        """The smallest image side, in pixels, that it can judge."""

    def judge(self, pair_BCHW: Tensor) -> Judgement:
        """What ``forward`` returns, scale by scale and layer by layer."""
        found = self(pair_BCHW)
        return [[found]] if isinstance(found, Tensor) else found


DISCRIMINATORS: Registry[type[PairCritic]] = Registry(
    "discriminator",
    base=PairCritic,
    packages=["mlseg.problems.e2eaug.networks"],
    example="my_package.nets:MyDiscriminator",
)
