"""What two networks teach each other by, and how its weight grows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg import parallel
from mlseg.precision import full
from mlseg.segmentation.losses import LOSSES

_TINY = 1e-10
"""Within a logarithm, so that it has a derivative at 0."""


def squared_dice(
    probability_BKHW: Tensor, target_BHW: Tensor, counted_BHW: Tensor | None = None
) -> Tensor:
    """Soft Dice with squares in the denominator, mean over all classes, background included.

        mean over c of 1 - (2 sum p_c y_c + s) / (sum p_c^2 + sum y_c^2 + s),  s = 1e-5

    The sums go over all pixels of the batch that count; in several processes over the whole batch,
    by a collective.

    Args:
        probability_BKHW: (B, K, H, W), of each class.
        target_BHW: (B, H, W) class indices; any where a pixel doesn't count.
        counted_BHW: where it does; None: everywhere.

    Source: Luo et al., MIDL 2022, equations 2 and 4; the squares and s from their public code.
    """
    classes = torch.arange(probability_BKHW.shape[1], device=probability_BKHW.device)
    true = target_BHW[:, None] == classes[:, None, None]
    if counted_BHW is not None:
        true = true & counted_BHW[:, None]
        probability_BKHW = probability_BKHW * counted_BHW[:, None]
    pixels = (0, 2, 3)
    both_K = 2 * (probability_BKHW * true).sum(pixels)
    each_K = probability_BKHW.square().sum(pixels) + true.sum(pixels)
    if parallel.several():
        both_K, each_K = parallel.summed(torch.stack([both_K, each_K]))
    return (1 - (both_K + 1e-5) / (each_K + 1e-5)).mean()


@LOSSES.register("cross_entropy_and_squared_dice")
class CrossEntropyAndSquaredDice(nn.Module):
    """Half the mean cross-entropy and half of :func:`squared_dice`: cross teaching's loss on masks.

    Args:
        ignore_index: label of pixels that don't count, or None.

    Source: Luo et al., MIDL 2022, equation 2.
    """

    in_several = True

    def __init__(self, ignore_index: int | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits_BKHW: Tensor, target_BHW: Tensor) -> Tensor:
        """(B, K, H, W) logits, (B, H, W) int64 labels or the ignore index -> scalar."""
        logits = full(logits_BKHW)
        ignored = -100 if self.ignore_index is None else self.ignore_index
        total = functional.cross_entropy(logits, target_BHW, ignore_index=ignored, reduction="sum")
        counts = counted(target_BHW, self.ignore_index)
        # With no pixel left out there are as many in every process's share.
        everywhere = target_BHW.numel()
        mean = total / everywhere if counts is None else parallel.ratio(total, counts.sum())
        return 0.5 * (mean + squared_dice(logits.softmax(1), target_BHW, counts))


def jensen_shannon(
    first_BKHW: Tensor, second_BKHW: Tensor, counted_BHW: Tensor | None = None
) -> Tensor:
    """``H((p + q) / 2) - (H(p) + H(q)) / 2``, mean over the pixels that count; from 0 to log 2.

    Args:
        first_BKHW, second_BKHW: (B, K, H, W) class probabilities p and q.
        counted_BHW: where pixels count; None: everywhere.

    Source: Peng et al., Pattern Recognition 107, 2020, equation 3; H with p log(p + 1e-10), which
    has a derivative at p = 0, from their public code.
    """
    mixed = _entropy((first_BKHW + second_BKHW) / 2)
    return _mean(mixed - (_entropy(first_BKHW) + _entropy(second_BKHW)) / 2, counted_BHW)


def divergence(
    target_BKHW: Tensor, probability_BKHW: Tensor, counted_BHW: Tensor | None = None
) -> Tensor:
    """``KL(p || q)`` of a fixed p, mean over the pixels that count.

    Args:
        target_BKHW: (B, K, H, W) class probabilities p; no gradient goes there.
        probability_BKHW: q.
    """
    p = target_BKHW.detach()
    difference = (p + _TINY).log() - (probability_BKHW + _TINY).log()
    return _mean((p * difference).sum(1), counted_BHW)


def _entropy(probability_BKHW: Tensor) -> Tensor:
    return -(probability_BKHW * (probability_BKHW + _TINY).log()).sum(1)


def _mean(value_BHW: Tensor, counted_BHW: Tensor | None) -> Tensor:
    if counted_BHW is None:
        return value_BHW.mean()
    # Not a product: where nothing counts the value may be anything.
    kept = torch.where(counted_BHW, value_BHW, 0.0)
    return parallel.ratio(kept.sum(), counted_BHW.sum())


def counted(mask_BHW: Tensor, ignore_index: int | None) -> Tensor | None:
    """Where pixels count; None: everywhere."""
    return None if ignore_index is None else mask_BHW != ignore_index


def ramp(epoch: int, begin: int, end: int) -> float:
    """``exp(-5 (1 - s)^2)``, s growing from 0 at ``begin`` to 1 at ``end``; 0 before, 1 after.

    Source: Laine and Aila, ICLR 2017, appendix A, whose ramp both methods take.
    """
    if epoch < begin:
        return 0.0
    s = 1.0 if epoch >= end else (epoch - begin) / (end - begin)
    return math.exp(-5.0 * (1.0 - s) ** 2)
