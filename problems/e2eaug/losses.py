"""The loss of E2EAug's generator and discriminator."""

import torch
from torch import Tensor
from torch.nn import functional


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
