"""Building blocks that every network here shares: a normalisation and a padding that never fail."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.errors import UserError


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that also accepts a single value per channel while it trains.

    `torch.nn.BatchNorm2d` raises where a batch of one meets a 1x1 map, as in the pooling branch of
    DeepLabV3 or at the bottom of a U-Net: a variance over one value says nothing. There this layer
    normalises with its running statistics, as in evaluation, and leaves them as they are;
    everywhere else it is `torch.nn.BatchNorm2d`. Its state dict is the same. The choice depends on
    the shape alone, so nothing is read back from the device.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        if self.training and input.numel() == input.shape[1]:
            return functional.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=False,
                eps=self.eps,
            )
        return super().forward(input)


def accept_single_values(network: nn.Module) -> None:
    """Replace every plain `torch.nn.BatchNorm2d` in `network` by `BatchNorm`, keeping its tensors.

    For networks built elsewhere (torchvision, segmentation-models-pytorch). Subclasses with a
    behaviour of their own stay as they are.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is not nn.BatchNorm2d:
                continue
            norm = BatchNorm(
                child.num_features,
                child.eps,
                child.momentum,
                child.affine,
                child.track_running_stats,
            )
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)


def _extend(x_BCHW: Tensor, dim: int, before: int, after: int) -> Tensor:
    if not before and not after:
        return x_BCHW
    first = x_BCHW.narrow(dim, 0, 1)
    last = x_BCHW.narrow(dim, x_BCHW.shape[dim] - 1, 1)
    sizes = [-1] * x_BCHW.dim()
    sizes[dim] = before
    parts = [first.expand(sizes)] if before else []
    sizes[dim] = after
    parts += [x_BCHW] + ([last.expand(sizes)] if after else [])
    return torch.cat(parts, dim)


def _split(side: int, multiple: int, smallest: int) -> tuple[int, int]:
    total = -(-max(side, smallest) // multiple) * multiple - side
    return total // 2, total - total // 2


def pad_to_multiple(
    x_BCHW: Tensor, multiple: int, smallest: int = 1
) -> tuple[Tensor, tuple[slice, slice]]:
    """Repeat the edges of an image until both sides are multiples of `multiple`.

    Args:
        x_BCHW: (B, C, H, W); H and W at least 1.
        multiple: both sides of the result are divisible by it.
        smallest: both sides of the result are at least this long, in pixels.

    Returns:
        The padded image, and the two slices that cut the original region out of anything of the
        padded size: `padded[..., rows, columns]`.

    The edge is repeated by expand and cat, whose gradients are deterministic on every device and
    can be differentiated again; the backward of `torch.nn.functional.pad(mode="replicate")` is not
    deterministic on CUDA.
    """
    height, width = x_BCHW.shape[-2:]
    top, bottom = _split(height, multiple, smallest)
    left, right = _split(width, multiple, smallest)
    padded = _extend(_extend(x_BCHW, -2, top, bottom), -1, left, right)
    return padded, (slice(top, top + height), slice(left, left + width))


def freeze_batch_norm(network: nn.Module) -> None:
    """Let every batch normalisation use its running statistics, and keep them as they are.

    Scale and shift still learn. Lasts until the network's next ``train()``.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


# Of ImageNet's training images in [0, 1], by channel: what torchvision and
# segmentation-models-pytorch divide by.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(network: nn.Module, pixels: str, in_channels: int) -> None:
    """Let a network see images in another range than [-1, 1], in which it is given them.

    Args:
        pixels: ``none``, ``unit`` for [0, 1], or ``imagenet``, without the mean of ImageNet's
            images and divided by their standard deviation; of one channel by the mean of the
            three channels' figures.

    Raises:
        UserError: ImageNet's figures for neither one channel nor three.

    The state dict is as before: the two constants are of the settings.
    """
    if pixels == "none":
        return
    mean, std = torch.zeros(in_channels), torch.ones(in_channels)
    if pixels == "imagenet":
        if in_channels not in (1, 3):
            raise UserError(
                f"segmentor.normalise: imagenet is for 1 or 3 channels, the data have "
                f"{in_channels}; set normalise to none or unit"
            )
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        if in_channels == 1:
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    # ((x + 1) / 2 - mean) / std
    network.register_buffer("pixel_scale", (0.5 / std)[:, None, None], persistent=False)
    network.register_buffer("pixel_shift", ((0.5 - mean) / std)[:, None, None], persistent=False)
    network.register_forward_pre_hook(_rescaled)


def _rescaled(network: nn.Module, given: tuple[Tensor]) -> Tensor:
    (image_BCHW,) = given
    return image_BCHW * network.get_buffer("pixel_scale") + network.get_buffer("pixel_shift")
