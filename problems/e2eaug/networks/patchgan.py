"""PatchGAN, the discriminator of pix2pix (Isola et al., CVPR 2017, section 3.2.2)."""

from pydantic import PositiveInt
from torch import Tensor, nn

from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.discriminator import DISCRIMINATORS, PairCritic
from mlseg.segmentation.nets.layers import BatchNorm


@DISCRIMINATORS.register("patchgan")
class PatchGAN(PairCritic):
    """Judges every patch of a (label map, image) pair as real or fake.

    4x4 convolutions, `layers` of them with stride 2 and widths C, 2C, 4C, 8C, then two with stride
    1; LeakyReLU 0.2; BatchNorm after all but the first and the last; N(0, 0.02), BatchNorm scale
    N(1, 0.02). With three layers each logit sees 70x70 pixels (16, 34, 70, 142 for 1 to 4 layers).

    Args:
        in_channels: channels of the label map plus those of the image. 6 (3 + 3) gives 2.77 M
            parameters (2,768,705).
        channels: width C of the first layer.
        layers: number of stride-2 layers; fewer for small images.
    """

    def __init__(
        self, in_channels: int, channels: PositiveInt = 64, layers: PositiveInt = 3
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"a discriminator needs at least 1 layer, not {layers}")
        self.layers = layers
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        modules: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            modules += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride, padding=1, bias=False),
                BatchNorm(widths[layer]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        modules.append(nn.Conv2d(widths[layers], 1, 4, padding=1))
        self.network = nn.Sequential(*modules)
        for module in self.network:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @property
    def smallest_side(self) -> int:
        """The smallest image side, in pixels, that leaves a patch to judge."""
        return 3 * 2**self.layers

    def forward(self, pair_BCHW: Tensor) -> Tensor:
        """Label map and image, concatenated (B, C, H, W) -> (B, 1, h, w) logits, above 0 for real.

        h = H / 2^layers - 2, likewise w. UserError for an image smaller than `smallest_side`.
        """
        height, width = pair_BCHW.shape[-2:]
        if min(height, width) < self.smallest_side:
            raise UserError(
                f"images of {height}x{width} are too small for a discriminator with {self.layers} "
                f"layers, which needs {self.smallest_side} pixels a side: lower its layers"
            )
        return self.network(pair_BCHW)
