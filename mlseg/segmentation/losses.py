"""Losses of segmentors and of their adversaries."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mlseg.config.components import Component
from mlseg.config.registry import Registry

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(B, K, H, W) logits and (B, H, W) int64 labels, in 0..K-1 or the ignore index, to a scalar."""


LOSSES: Registry[Callable[..., Criterion]] = Registry(
    "loss", packages=["mlseg.segmentation.losses"], example="my_package.losses:Focal"
)
"""By name. Each is a class or function ``Loss(ignore_index, *, its settings)`` that makes a
:data:`Criterion`; ``ignore_index`` is the label of pixels that don't count, or None."""


class LossSettings(Component):
    """A segmentor's loss by name; without one, a :class:`SegmentationLoss` by its weights."""

    registry = LOSSES
    given = 1

    name: str = "weighted_sum"

    @model_validator(mode="after")
    def _made_once(self) -> "LossSettings":
        self.build(None)  # to hear what it has to say about its settings
        return self


def build_loss(settings: LossSettings, ignore_index: int | None = None) -> Criterion:
    """The loss that ``settings`` name."""
    made: Criterion = settings.build(ignore_index)
    return made


Weight = Annotated[float, Field(ge=0)]


@LOSSES.register("weighted_sum")
class SegmentationLoss(nn.Module):
    """Pixel cross-entropy, soft Dice and soft Jaccard as a weighted sum.

    With p = softmax(logits), t the one-hot truth, and sums over all pixels of the batch that aren't
    ignored (n of them):

        cross-entropy = - (1 / n) sum_i log p_i[t_i]
        I_c = sum_i p_ic t_ic,  P_c = sum_i p_ic,  T_c = sum_i t_ic
        Dice    = mean over c of 1 - (2 I_c + s) / (P_c + T_c + s)
        Jaccard = mean over c of 1 - (I_c + s) / (P_c + T_c - I_c + s)

    The means are over the classes with T_c > 0: as in segmentation-models-pytorch, a class that the
    batch doesn't show adds nothing; unlike there, it doesn't lower the mean either. A batch without
    a class to score (only ignored pixels) gives 0, with zero gradient. Smooth in the logits, so it
    can be differentiated twice. Nothing is read back from the device.

    Sources: Dice, Milletari et al., V-Net, 3DV 2016, section 3 (here without squares); Jaccard,
        Rahman and Wang, ISVC 2016, section 2.3.

    Args:
        ignore_index: label of pixels that don't count, or None.
        cross_entropy, dice, jaccard: weight of each term, 0 or more; at least one above 0. The
            default is cross-entropy alone.
        smooth: s in the soft Dice and Jaccard terms, in pixels: keeps their curvature small where a
            class has few pixels.
        background: whether class 0 counts in the Dice and Jaccard terms.
    """

    def __init__(
        self,
        ignore_index: int | None = None,
        *,
        cross_entropy: Weight = 1.0,
        dice: Weight = 0.0,
        jaccard: Weight = 0.0,
        smooth: Weight = 1.0,
        background: bool = True,
    ) -> None:
        super().__init__()
        if not (cross_entropy or dice or jaccard):
            raise ValueError("one of cross_entropy, dice, jaccard must be above 0")
        self.ignore_index = ignore_index
        self.cross_entropy, self.dice, self.jaccard = cross_entropy, dice, jaccard
        self.smooth, self.background = smooth, background

    def forward(self, logits_BKHW: Tensor, target_BHW: Tensor) -> Tensor:
        """(B, K, H, W) logits, (B, H, W) int64 labels in 0..K-1 or the ignore index -> scalar."""
        logits_BKHW = _full(logits_BKHW)
        if self.ignore_index is None:
            valid_BHW = torch.ones_like(target_BHW, dtype=torch.bool)
        else:
            valid_BHW = target_BHW != self.ignore_index
        loss = logits_BKHW.new_zeros(())
        if self.cross_entropy:
            total = functional.cross_entropy(
                logits_BKHW,
                target_BHW,
                ignore_index=-100 if self.ignore_index is None else self.ignore_index,
                reduction="sum",
            )
            loss = loss + self.cross_entropy * total / valid_BHW.sum().clamp_min(1)
        if self.dice or self.jaccard:
            loss = loss + self._overlap(logits_BKHW, target_BHW, valid_BHW)
        return loss

    def _overlap(self, logits_BKHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
        classes = torch.arange(logits_BKHW.shape[1], device=logits_BKHW.device)
        valid_B1HW = valid_BHW[:, None]
        truth_BKHW = (target_BHW[:, None] == classes[:, None, None]) & valid_B1HW
        probability_BKHW = logits_BKHW.softmax(1) * valid_B1HW
        pixels = (0, 2, 3)
        inside_K = (probability_BKHW * truth_BKHW).sum(pixels)
        predicted_K = probability_BKHW.sum(pixels)
        true_K = truth_BKHW.sum(pixels).to(inside_K.dtype)
        present_K = true_K > 0
        if not self.background:
            present_K = present_K & (classes > 0)
        # Where a class is absent its denominator may be 0; 1 there keeps the gradient finite.
        both_K = torch.where(present_K, predicted_K + true_K, 1.0)
        dice_K = 1 - (2 * inside_K + self.smooth) / (both_K + self.smooth)
        jaccard_K = 1 - (inside_K + self.smooth) / (both_K - inside_K + self.smooth)
        loss_K = self.dice * dice_K + self.jaccard * jaccard_K
        return (loss_K * present_K).sum() / present_K.sum().clamp_min(1)


def gan_loss(logits: Tensor, real: bool) -> Tensor:
    """The vanilla GAN loss (Goodfellow et al., 2014): binary cross-entropy, mean over all patches.

    Args:
        logits: the discriminator's output, any shape; positive means real.
        real: the label; True gives mean log(1 + e^-x), False mean log(1 + e^x).

    A discriminator minimises it with the true label, a generator with `real=True` on its own images
    (the non-saturating form).
    """
    target = torch.full_like(logits, float(real))
    return functional.binary_cross_entropy_with_logits(logits, target)


Reduction = Literal["layer_mean", "concat", "sum"]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
        (a.to(_wide(a)) - b.to(_wide(b))).abs()
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


def dice_of_maps(maps_BMHW: Tensor, label_BMHW: Tensor, smooth: float = 1.0) -> Tensor:
    """1 minus the soft Dice of label maps, pooled over the batch, mean over the maps.

    Args:
        maps_BMHW: predicted, in [0, 1].
        label_BMHW: true, of the same shape.
        smooth: in pixels, see `SegmentationLoss`.
    """
    pixels = (0, 2, 3)
    inside_M = (maps_BMHW * label_BMHW).sum(pixels)
    both_M = maps_BMHW.sum(pixels) + label_BMHW.sum(pixels)
    return (1 - (2 * inside_M + smooth) / (both_M + smooth)).mean()


def _full(logits: Tensor) -> Tensor:
    """Half-precision logits in single precision, others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


Relaxation = Literal["softmax", "gumbel", "straight_through"]


def relax(logits_BKHW: Tensor, kind: Relaxation, temperature: float = 1.0) -> Tensor:
    """Label maps that a gradient passes through, in place of the hard ones that argmax gives.

    With the logits z and the temperature tau:

        softmax            softmax(z / tau)
        gumbel             softmax((z + n) / tau), n drawn from Gumbel(0, 1)
        straight_through   one-hot argmax z forward, the gradient of softmax(z / tau) backward

    LoAd's workshop version draws Gumbel noise at temperature 20 (section 4); the full paper doesn't
    say what the discriminator sees of the segmentor.

    Sources: Jang et al., Categorical reparameterization with Gumbel-softmax, ICLR 2017; Bengio et
        al., 2013 (arXiv:1308.3432) for the straight-through estimate.

    Returns:
        (B, K, H, W), summing to 1 over the classes.
    """
    logits_BKHW = _full(logits_BKHW)
    if kind == "gumbel":
        return functional.gumbel_softmax(logits_BKHW, tau=temperature, dim=1)
    soft = (logits_BKHW / temperature).softmax(1)
    if kind == "softmax":
        return soft
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the difference is exactly 0


def fooling_loss(logits: Tensor, saturating: bool = False) -> Tensor:
    """What a generator minimises, mean over the batch, from a discriminator's logits x on fakes.

    Non-saturating: -log D = log(1 + e^-x) (LoAd, section 2). Saturating: log(1 - D) = -log(1 + e^x)
    (its workshop version, equation 2), whose gradient vanishes where D is sure of itself.
    """
    if saturating:
        return -functional.softplus(logits).mean()
    return functional.softplus(-logits).mean()


def balanced_cross_entropy(
    logits_BKHW: Tensor, target_BHW: Tensor, mean_pixels_K: Tensor, ignore_index: int | None = None
) -> Tensor:
    """Cross-entropy in which a class that an image shows little of counts more there.

    A pixel of class c in image b weighs n_c / n_bc: the mean number of pixels of c in an image,
    over the data set, by its number in this image. The sum is divided by the number of labelled
    pixels. Source: LoAd, section 4, Stanford Background.

    Args:
        logits_BKHW: (B, K, H, W).
        target_BHW: (B, H, W) int64 labels in 0..K-1 or the ignore index.
        mean_pixels_K: (K,) n_c, float.
    """
    batch, classes = logits_BKHW.shape[:2]
    ignore = -100 if ignore_index is None else ignore_index
    pixels = functional.cross_entropy(
        _full(logits_BKHW), target_BHW, ignore_index=ignore, reduction="none"
    )
    valid_BHW = target_BHW != ignore
    known_BN = torch.where(valid_BHW, target_BHW, classes).flatten(1)
    counts = pixels.new_zeros(batch, classes + 1)
    counts.scatter_add_(1, known_BN, torch.ones_like(known_BN, dtype=counts.dtype))
    weight_BK = mean_pixels_K.to(counts.dtype) / counts[:, :classes].clamp_min(1)
    weight_BN = functional.pad(weight_BK, (0, 1)).gather(1, known_BN)
    return (pixels.flatten(1) * weight_BN).sum() / valid_BHW.sum().clamp_min(1)
