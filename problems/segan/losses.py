"""The loss of SegAN's game, a conventional GAN's in its place, the Dice term beside either."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mlseg import parallel
from mlseg.precision import full

Reduction = Literal["layer_mean", "concat", "sum"]


def multi_scale_l1(
    predicted: Sequence[Tensor], true: Sequence[Tensor], reduction: Reduction = "layer_mean"
) -> Tensor:
    """SegAN's loss: the L1 distance of two images' features, over all scales (equations 1 and 2).

    With f_i and f'_i the L feature maps of N predicted and true images:

        layer_mean   (1 / L) sum_i mean |f_i - f'_i|, over all entries of layer i
        concat       mean of w_i |f_i - f'_i| over the entries of all layers together; the weights
                     w are 1, 1, 2, ..., 2, 4, as in the authors' public code
        sum          (1 / N) sum_n (1 / L) sum_i ||f_i - f'_i||_1, equation 2 to the letter

    ``layer_mean`` gives every scale the same say. In ``concat`` the first maps, which have most of
    the entries, dominate; ``sum`` does the same and grows with the size of the image and the width.

    Args:
        predicted, true: L maps each, of the same shapes, (N, ...).

    Returns:
        A scalar, float32 or wider.
    """
    distances = [
        # Never in bfloat16: the difference of near features would be its rounding.
        (full(a) - full(b)).abs()
        for a, b in zip(predicted, true, strict=True)
    ]
    if reduction == "layer_mean":
        return torch.stack([distance.mean() for distance in distances]).mean()
    sums = torch.stack([distance.sum() for distance in distances])
    if reduction == "sum":
        return sums.sum() / (len(distances) * len(distances[0]))
    weights = [1.0, 1.0, *(2.0 for _ in distances[2:-1]), 4.0][: len(distances)]
    entries = sum(distance.numel() for distance in distances)
    return torch.stack([w * s for w, s in zip(weights, sums, strict=True)]).sum() / entries


def conventional_gan(predicted: Tensor, true: Tensor) -> Tensor:
    """The value of the conventional game, which the critic raises and the segmentor lowers.

    ``E[log D(true)] + E[log(1 - D(predicted))]``: Goodfellow et al., NeurIPS 2014, equation 1.

    Args:
        predicted, true: (N, 1) logits, of being true.
    """
    return functional.logsigmoid(full(true)).mean() + functional.logsigmoid(-full(predicted)).mean()


def dice_of_maps(maps_BMHW: Tensor, label_BMHW: Tensor, smooth: float = 1.0) -> Tensor:
    """1 minus the soft Dice of label maps, pooled over the batch, mean over the maps.

    In several processes pooled over the whole batch, by a collective.

    Args:
        maps_BMHW: predicted, in [0, 1].
        label_BMHW: true, of the same shape.
        smooth: in pixels, see :class:`mlseg.segmentation.losses.SegmentationLoss`.
    """
    pixels = (0, 2, 3)
    inside_M = (maps_BMHW * label_BMHW).sum(pixels)
    both_M = maps_BMHW.sum(pixels) + label_BMHW.sum(pixels)
    if parallel.several():
        inside_M, both_M = parallel.summed(torch.stack([inside_M, both_M]))
    return (1 - (2 * inside_M + smooth) / (both_M + smooth)).mean()
