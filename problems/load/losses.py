"""LoAd's losses: the generator's in either stage, and what of it the discriminator is shown."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mlseg import parallel
from mlseg.precision import full

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
    logits_BKHW = full(logits_BKHW)
    if kind == "gumbel":
        return functional.gumbel_softmax(logits_BKHW, tau=temperature, dim=1)
    soft = (logits_BKHW / temperature).softmax(1)
    if kind == "softmax":
        return soft
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the difference is exactly 0


def fooling_loss(logits: Tensor, saturating: bool = False) -> Tensor:
    """What a generator minimises, image by image, from a discriminator's logits x on fakes (B,).

    Non-saturating: -log D = log(1 + e^-x) (LoAd, section 2). Saturating: log(1 - D) = -log(1 + e^x)
    (its workshop version, equation 2), whose gradient vanishes where D is sure of itself.
    """
    if saturating:
        return -functional.softplus(logits)
    return functional.softplus(-logits)


def pixelwise(logits_BKHW: Tensor, target_BHW: Tensor, ignore_index: int | None) -> Tensor:
    """(B,) cross-entropy of each image, mean over its labelled pixels; 0 where there are none."""
    ignore = -100 if ignore_index is None else ignore_index
    losses = functional.cross_entropy(
        full(logits_BKHW), target_BHW, ignore_index=ignore, reduction="none"
    )
    labelled = (target_BHW != ignore).flatten(1).sum(1).clamp_min(1)
    return losses.flatten(1).sum(1) / labelled


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
        full(logits_BKHW), target_BHW, ignore_index=ignore, reduction="none"
    )
    valid_BHW = target_BHW != ignore
    known_BN = torch.where(valid_BHW, target_BHW, classes).flatten(1)
    counts = pixels.new_zeros(batch, classes + 1)
    counts.scatter_add_(1, known_BN, torch.ones_like(known_BN, dtype=counts.dtype))
    weight_BK = mean_pixels_K.to(counts.dtype) / counts[:, :classes].clamp_min(1)
    weight_BN = functional.pad(weight_BK, (0, 1)).gather(1, known_BN)
    return parallel.ratio((pixels.flatten(1) * weight_BN).sum(), valid_BHW.sum())
