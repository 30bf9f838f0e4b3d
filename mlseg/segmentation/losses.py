"""The loss of a segmentor on labelled pixels."""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mlseg.config import Settings
from mlseg.errors import UserError
from mlseg.precision import full


class LossSettings(Settings):
    """Weights of a segmentation loss's terms; the default is cross-entropy alone.

    Attributes:
        cross_entropy, dice, jaccard: weight of each term, 0 or more; at least one above 0.
        smooth: s in the soft Dice and Jaccard terms, in pixels: keeps their curvature small where a
            class has few pixels.
        background: whether class 0 counts in the Dice and Jaccard terms.
    """

    cross_entropy: float = Field(default=1.0, ge=0)
    dice: float = Field(default=0.0, ge=0)
    jaccard: float = Field(default=0.0, ge=0)
    smooth: float = Field(default=1.0, ge=0)
    background: bool = True

    @model_validator(mode="after")
    def _check_any(self) -> "LossSettings":
        if self.cross_entropy == self.dice == self.jaccard == 0:
            raise UserError("loss: one of cross_entropy, dice, jaccard must be above 0")
        return self


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
        settings: weights of the terms.
        ignore_index: label of pixels that don't count, or None.
    """

    def __init__(self, settings: LossSettings, ignore_index: int | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.ignore_index = ignore_index

    def forward(self, logits_BKHW: Tensor, target_BHW: Tensor) -> Tensor:
        """(B, K, H, W) logits, (B, H, W) int64 labels in 0..K-1 or the ignore index -> scalar."""
        logits_BKHW = full(logits_BKHW)
        settings = self.settings
        if self.ignore_index is None:
            valid_BHW = torch.ones_like(target_BHW, dtype=torch.bool)
        else:
            valid_BHW = target_BHW != self.ignore_index
        loss = logits_BKHW.new_zeros(())
        if settings.cross_entropy:
            total = functional.cross_entropy(
                logits_BKHW,
                target_BHW,
                ignore_index=-100 if self.ignore_index is None else self.ignore_index,
                reduction="sum",
            )
            loss = loss + settings.cross_entropy * total / valid_BHW.sum().clamp_min(1)
        if settings.dice or settings.jaccard:
            loss = loss + self._overlap(logits_BKHW, target_BHW, valid_BHW)
        return loss

    def _overlap(self, logits_BKHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
        settings = self.settings
        classes = torch.arange(logits_BKHW.shape[1], device=logits_BKHW.device)
        valid_B1HW = valid_BHW[:, None]
        truth_BKHW = (target_BHW[:, None] == classes[:, None, None]) & valid_B1HW
        probability_BKHW = logits_BKHW.softmax(1) * valid_B1HW
        pixels = (0, 2, 3)
        inside_K = (probability_BKHW * truth_BKHW).sum(pixels)
        predicted_K = probability_BKHW.sum(pixels)
        true_K = truth_BKHW.sum(pixels).to(inside_K.dtype)
        present_K = true_K > 0
        if not settings.background:
            present_K = present_K & (classes > 0)
        # Where a class is absent its denominator may be 0; 1 there keeps the gradient finite.
        smooth = settings.smooth
        both_K = torch.where(present_K, predicted_K + true_K, 1.0)
        dice_K = 1 - (2 * inside_K + smooth) / (both_K + smooth)
        jaccard_K = 1 - (inside_K + smooth) / (both_K - inside_K + smooth)
        loss_K = settings.dice * dice_K + settings.jaccard * jaccard_K
        return (loss_K * present_K).sum() / present_K.sum().clamp_min(1)
