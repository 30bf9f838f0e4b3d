"""SegAN's critic: features of a masked image at several scales.

Source: Xue, Xu and Huang, ISBI 2018, section 2.2, figure 1.
"""

from typing import Any

from torch import Tensor, nn

from mlseg.errors import UserError
from mlseg.problems.segan.networks.segmentor import LEAK, convolution
from mlseg.segmentation.nets.layers import BatchNorm

KERNELS = (13, 11, 9, 7, 4, 3)
WIDTHS = (1, 2, 4, 8, 8, 8)


class Critic(nn.Module):
    """Six convolutions of stride 2 (kernels 13, 11, 9, 7, 4, 3; widths C, 2C, 4C, 8C, 8C, 8C).

    LeakyReLU 0.2; BatchNorm after all but the first. In training it always normalises by the
    statistics of its batch, so real and predicted images have to pass separately.

    Args:
        in_channels: of the masked image; K times the image's for K stacked images.
        channels: C, 64 in figure 1.
        layers: of them, 1 to 6; with fewer, the deepest ones are left out.
        global_kernel: smallest kernel that becomes a global convolution; None: none does, as in the
            public code.
        pixel_level: whether the masked image is the first of the features.
        scalar: one output in place of the features: a linear map of the last one's mean over the
            image, as a conventional GAN's discriminator has.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 64,
        layers: int = len(KERNELS),
        global_kernel: int | None = 9,
        pixel_level: bool = True,
        scalar: bool = False,
    ) -> None:
        super().__init__()
        self.pixel_level = pixel_level
        if not 1 <= layers <= len(KERNELS):
            raise ValueError(f"layers: from 1 to {len(KERNELS)}, not {layers}")
        self.layers = layers
        widths = [in_channels, *(channels * width for width in WIDTHS[:layers])]
        self.blocks = nn.ModuleList()
        for index in range(layers):
            first = index == 0
            self.blocks.append(
                nn.Sequential(
                    convolution(
                        widths[index], widths[index + 1], KERNELS[index], 2, first, global_kernel
                    ),
                    *([] if first else [BatchNorm(widths[index + 1])]),
                    nn.LeakyReLU(LEAK),
                )
            )
        self.head = nn.Linear(widths[-1], 1) if scalar else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, LEAK)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, masked_BCHW: Tensor) -> list[Tensor]:
        """(B, C, H, W) masked image -> L = layers + 1 feature maps, the image itself the first.

        Without the pixel level L = layers; a scalar critic gives a list of (B, 1) logits.
        """
        features = [masked_BCHW]
        for block in self.blocks:
            features.append(block(features[-1]))
        if self.head is not None:
            return [self.head(features[-1].mean((2, 3)))]
        return features if self.pixel_level else features[1:]


class ClassCritics(nn.Module):
    """One critic per label map, or one for the masked images of all maps, stacked.

    Args:
        in_channels: of the image.
        maps: M, number of label maps.
        stacked: one critic on all M masked images as 3M channels, in place of M critics.
        settings: of each `Critic`.
    """

    def __init__(self, in_channels: int, maps: int, stacked: bool, **settings: Any) -> None:
        super().__init__()
        number, each = (1, maps) if stacked else (maps, 1)
        self.critics = nn.ModuleList(Critic(in_channels * each, **settings) for _ in range(number))

    def forward(self, image_BCHW: Tensor, maps_BMHW: Tensor) -> list[list[Tensor]]:
        """Features of the image masked by each map, channel by channel.

        Args:
            image_BCHW: the image, (B, C, H, W).
            maps_BMHW: label maps in [0, 1], (B, M, H, W).

        Returns:
            one list of feature maps per critic.
        """
        check_label_maps(image_BCHW, maps_BMHW)
        # (B, M, C, H, W): every channel times its map.
        masked = image_BCHW[:, None] * maps_BMHW[:, :, None]
        if len(self.critics) == 1:
            return [self.critics[0](masked.flatten(1, 2))]
        return [critic(masked[:, index]) for index, critic in enumerate(self.critics)]


def check_label_maps(image_BCHW: Tensor, maps_BMHW: Tensor) -> None:
    """Raise UserError for label maps that would be broadcast into something else.

    (B, C, H, W) times (B, H, W) is, where B = C or either is 1, a product of the wrong pairs, and
    otherwise a confusing error.
    """
    if maps_BMHW.dim() != 4:
        raise UserError(
            f"label maps of shape {tuple(maps_BMHW.shape)}: they must be (B, maps, H, W); give a "
            "label its channel dimension with label.unsqueeze(1)"
        )
    if (maps_BMHW.shape[0], *maps_BMHW.shape[2:]) != (image_BCHW.shape[0], *image_BCHW.shape[2:]):
        raise UserError(
            f"label maps of shape {tuple(maps_BMHW.shape)} don't fit images of shape "
            f"{tuple(image_BCHW.shape)}: batch, height and width must agree"
        )
