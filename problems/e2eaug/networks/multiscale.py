"""The discriminator of SPADE (Park et al., CVPR 2019, appendix A), after pix2pixHD's."""

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from mlseg.problems.e2eaug.networks.discriminator import DISCRIMINATORS, Judgement, PairCritic
from mlseg.problems.e2eaug.networks.generator import xavier
from mlseg.problems.e2eaug.networks.spectral import SpectralConv2d


class _Patches(nn.Module):
    """One scale: 4x4 convolutions, padding 2, LeakyReLU 0.2 between.

    Widths C, 2C, 4C, 8C; `layers` of stride 2, one of stride 1, one to a single channel. All but
    the first and the last have spectral normalisation, then instance normalisation without
    parameters, and no bias.
    """

    def __init__(self, in_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        self.first = nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=2)
        self.inner = nn.ModuleList(
            SpectralConv2d(
                widths[layer - 1],
                widths[layer],
                4,
                stride=2 if layer < layers else 1,
                padding=2,
                bias=False,
            )
            for layer in range(1, layers + 1)
        )
        self.last = nn.Conv2d(widths[layers], 1, 4, padding=2)
        for convolution in (self.first, self.last):
            xavier(convolution)

    def forward(self, pair_BCHW: Tensor) -> list[Tensor]:
        features = [functional.leaky_relu(self.first(pair_BCHW), 0.2)]
        for convolution in self.inner:
            normal = functional.instance_norm(convolution(features[-1]))
            features.append(functional.leaky_relu(normal, 0.2))
        return [*features, self.last(features[-1])]


@DISCRIMINATORS.register("multiscale")
class MultiScale(PairCritic):
    """Judges patches of a (label map, image) pair at several scales.

    Each scale has a network of its own, and sees the pair at half the size of the one before, by
    3x3 means with stride 2 that don't count the padding. No normalisation is over a batch: whether
    real and generated pairs pass together or apart makes no difference.

    Args:
        in_channels: channels of the label map plus those of the image. 5 (2 + 3) gives 5.53 M
            parameters (5,531,778).
        channels: width C of the first layer.
        layers: of stride 2 at each scale.
        scales: 2 in the paper.
    """

    has_features = True
    limit = "scales"

    def __init__(
        self,
        in_channels: int,
        channels: PositiveInt = 64,
        layers: PositiveInt = 3,
        scales: PositiveInt = 2,
    ) -> None:
        super().__init__()
        self.layers, self.scales = layers, scales
        self.networks = nn.ModuleList(
            _Patches(in_channels, channels, layers) for _ in range(scales)
        )

    @property
    def smallest_side(self) -> int:
        """Two pixels at the smallest scale: of one alone there is nothing to normalise."""
        return 2**self.scales

    def forward(self, pair_BCHW: Tensor) -> Judgement:
        """(B, C, H, W) -> by scale the outputs of its layers, the logits last."""
        found = []
        for scale, network in enumerate(self.networks):
            if scale:
                pair_BCHW = functional.avg_pool2d(
                    pair_BCHW, 3, stride=2, padding=1, count_include_pad=False
                )
            found.append(network(pair_BCHW))
        return found
