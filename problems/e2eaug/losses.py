"""The losses of E2EAug's generator and discriminator."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mlseg.problems.e2eaug.networks.discriminator import Judgement
from mlseg.problems.e2eaug.networks.perceptual import WEIGHTS

Adversarial = Literal["vanilla", "hinge"]


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


def fooling(kind: Adversarial, judged: Judgement) -> Tensor:
    """The generator's adversarial loss on its own images, mean over the scales.

    "vanilla": `gan_loss` as if they were real. "hinge": minus the mean logit (Lim and Ye, 2017;
    SPADE, appendix A).
    """
    if kind == "vanilla":
        return _mean([gan_loss(scale[-1], real=True) for scale in judged])
    return _mean([-scale[-1].mean() for scale in judged])


def telling(kind: Adversarial, real: Judgement, fake: Judgement) -> Tensor:
    """The discriminator's loss, mean over the scales.

    "vanilla": half of `gan_loss` on either. "hinge": mean max(0, 1 - D(real)) + mean max(0, 1 +
    D(fake)).
    """
    if kind == "vanilla":
        on_real = _mean([gan_loss(scale[-1], real=True) for scale in real])
        return 0.5 * (on_real + _mean([gan_loss(scale[-1], real=False) for scale in fake]))
    on_real = _mean([functional.relu(1 - scale[-1]).mean() for scale in real])
    return on_real + _mean([functional.relu(1 + scale[-1]).mean() for scale in fake])


def feature_matching(fake: Judgement, real: Judgement) -> Tensor:
    """L1 between a discriminator's features of fake and real images (Wang et al., CVPR 2018).

    Summed over all layers but the last, mean over the scales; nothing goes back to ``real``.
    """
    return _mean(
        [
            _sum(
                [
                    functional.l1_loss(mine, its.detach())
                    for mine, its in zip(one[:-1], other[:-1], strict=True)
                ]
            )
            for one, other in zip(fake, real, strict=True)
        ]
    )


def perceptual_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """L1 between features of fake and real images, weighted from the first stage to the last."""
    return _sum(
        [
            weight * functional.l1_loss(mine, its.detach())
            for weight, mine, its in zip(WEIGHTS, fake, real, strict=True)
        ]
    )


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return _sum(parts) / len(parts) if len(parts) > 1 else parts[0]
