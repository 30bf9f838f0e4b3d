"""DeepLabV3 with a ResNet-50 (Chen et al., 2017, arXiv:1706.05587), from torchvision."""

from torch import Tensor, nn

from mlseg.errors import UserError
from mlseg.segmentation.nets.layers import accept_single_values
from mlseg.segmentation.nets.segmentor import SEGMENTORS


@SEGMENTORS.register("deeplabv3")
class DeepLabV3(nn.Module):
    """torchvision's DeepLabV3-ResNet50 with random weights.

    39.6 M parameters with 3 channels in and 2 classes (no auxiliary head). The output is enlarged
    to the size of the input, so any H and W will do. A batch of one trains too: the image-pooling
    branch then normalises with its running statistics (see `layers.BatchNorm`).

    Args:
        in_channels: channels of the image; other than 3, the first convolution is made anew.
        num_classes: K, channels of the output.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        # Here, since it is slow to import and only this network needs it.
        from torchvision.models.segmentation import deeplabv3_resnet50

        self.network = deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=False
        )
        if in_channels != 3:
            first = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            # The initialisation torchvision gives every convolution of its ResNets.
            nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
            self.network.backbone["conv1"] = first
        accept_single_values(self.network)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) image in [-1, 1] -> (B, K, H, W) logits, any H and W."""
        return self.network(image_BCHW)["out"]

    def published_encoder(self, name: str, pixels: str) -> dict[str, Tensor]:
        """The ResNet-50's weights that torchvision downloads (``IMAGENET1K_V1``).

        Args:
            name: ``imagenet``.
            pixels: what the network is to see of pixels, see `layers.normalise`.

        Raises:
            UserError: another name, or other pixels.
            Exception: they can't be downloaded.
        """
        from torchvision.models import ResNet50_Weights

        if name != "imagenet":
            raise UserError(f"torchvision has no weights {name!r} of a ResNet-50; name it imagenet")
        if pixels != "imagenet":
            raise UserError("imagenet was trained on pixels as normalise=imagenet gives them")
        weights = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        return {k: t for k, t in weights.items() if not k.startswith("fc.")}
