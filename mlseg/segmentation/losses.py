"""The loss of a segmentor on labelled pixels."""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mlseg import parallel
from mlseg.config.components import Component
from mlseg.config.registry import Registry
from mlseg.errors import UserError
from mlseg.precision import full

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
    """The loss that ``settings`` name.

    Raises:
        UserError: there are several processes, and nothing says that it can be shared out.
    """
    made: Criterion = settings.build(ignore_index)
    if parallel.several() and not getattr(made, "in_several", False):
        raise UserError(
            f"loss.name: {settings.name!r} may see a batch as a whole, which {parallel.size()} "
            "processes share out; take another one, or where it is a mean over the examples (or "
            "puts its sums together by mlseg.parallel) let it have an attribute in_several = True"
        )
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

    In several processes all sums are over the whole batch: those of the Dice and Jaccard terms, and
    the number of pixels where some are ignored, take a collective each time.
    """

    in_several = True

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
        logits_BKHW = full(logits_BKHW)
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
            if self.ignore_index is None:  # as many in every share
                loss = loss + self.cross_entropy * total / valid_BHW.sum().clamp_min(1)
            else:
                loss = loss + parallel.ratio(self.cross_entropy * total, valid_BHW.sum())
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
        if parallel.several():
            sums = torch.stack([inside_K, predicted_K, true_K])
            inside_K, predicted_K, true_K = parallel.summed(sums)
        present_K = true_K > 0
        if not self.background:
            present_K = present_K & (classes > 0)
        # Where a class is absent its denominator may be 0; 1 there keeps the gradient finite.
        both_K = torch.where(present_K, predicted_K + true_K, 1.0)
        dice_K = 1 - (2 * inside_K + self.smooth) / (both_K + self.smooth)
        jaccard_K = 1 - (inside_K + self.smooth) / (both_K - inside_K + self.smooth)
        loss_K = self.dice * dice_K + self.jaccard * jaccard_K
        return (loss_K * present_K).sum() / present_K.sum().clamp_min(1)
