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
from mlseg.segmentation.distances import signed_distance

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
    """A weighted sum of terms over pixels, over regions, and over regions' boundaries.

    With p = softmax(logits), t the one-hot truth, and sums over all pixels of the batch that aren't
    ignored (n of them):

        cross-entropy = - (1 / n) sum_i log p_i[t_i]
        I_c = sum_i p_ic t_ic,  P_c = sum_i p_ic,  T_c = sum_i t_ic
        Dice    = mean over c of 1 - (2 I_c + s) / (P_c + T_c + s)
        Jaccard = mean over c of 1 - (I_c + s) / (P_c + T_c - I_c + s)
        Tversky = mean over c of 1 - (I_c + s) / (I_c + a (P_c - I_c) + b (T_c - I_c) + s)
        focal   = - (1 / n) sum_i (1 - p_i[t_i])^gamma log p_i[t_i]
        boundary = (1 / n) sum_i mean over c of phi_c(i) p_ic

    phi_c is the signed distance to class c's region in pixels, negative inside; where an image
    doesn't show the class it is 0. The boundary term has no lower bound of its own and is meant
    beside one of the others, at a small weight. Tversky with a = b = 1/2 and s is Dice with 2 s.

    The means over c, but for the boundary's, are over the classes with T_c > 0: as in
    segmentation-models-pytorch, a class that the batch doesn't show adds nothing; unlike there, it
    doesn't lower the mean either. A batch without a class to score (only ignored pixels) gives 0,
    with zero gradient. Smooth in the logits, so it can be differentiated twice. Nothing is read
    back from the device.

    Sources: Dice, Milletari et al., V-Net, 3DV 2016, section 3 (here without squares); Jaccard,
        Rahman and Wang, ISVC 2016, section 2.3; Tversky, Salehi et al., MLMI 2017, section 2.1;
        focal, Lin et al., ICCV 2017, section 3.2, for several classes; boundary, Kervadec et al.,
        MIDL 2019, section 2.

    Args:
        ignore_index: label of pixels that don't count, or None.
        cross_entropy, dice, jaccard, tversky, focal, boundary: weight of each term, 0 or more; at
            least one but the boundary's above 0. The default is cross-entropy alone.
        smooth: s in the terms over regions, in pixels: keeps their curvature small where a class
            has few pixels.
        background: whether class 0 counts in the terms over regions and boundaries.
        false_positives, false_negatives: a and b, Tversky's weights of either.
        gamma: how much less a pixel counts in the focal term the better it is classified; 0 is
            cross-entropy.

    In several processes all sums are over the whole batch: those of the terms over regions, and the
    number of pixels where some are ignored, take a collective each time.
    """

    in_several = True

    def __init__(
        self,
        ignore_index: int | None = None,
        *,
        cross_entropy: Weight = 1.0,
        dice: Weight = 0.0,
        jaccard: Weight = 0.0,
        tversky: Weight = 0.0,
        focal: Weight = 0.0,
        boundary: Weight = 0.0,
        smooth: Weight = 1.0,
        background: bool = True,
        false_positives: Weight = 0.3,
        false_negatives: Weight = 0.7,
        gamma: Weight = 2.0,
    ) -> None:
        super().__init__()
        if not (cross_entropy or dice or jaccard or tversky or focal):
            raise ValueError("one of cross_entropy, dice, jaccard, tversky, focal must be above 0")
        if tversky and not (false_positives or false_negatives):
            raise ValueError("one of false_positives, false_negatives must be above 0")
        self.ignore_index = ignore_index
        self.cross_entropy, self.dice, self.jaccard = cross_entropy, dice, jaccard
        self.tversky, self.focal, self.boundary = tversky, focal, boundary
        self.smooth, self.background = smooth, background
        self.false_positives, self.false_negatives = false_positives, false_negatives
        self.gamma = gamma

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
            loss = loss + self._mean(self.cross_entropy * total, valid_BHW)
        if self.dice or self.jaccard or self.tversky:
            loss = loss + self._overlap(logits_BKHW, target_BHW, valid_BHW)
        if self.focal:
            loss = loss + self.focal * self._focal(logits_BKHW, target_BHW, valid_BHW)
        if self.boundary:
            loss = loss + self.boundary * self._boundary(logits_BKHW, target_BHW, valid_BHW)
        return loss

    def _mean(self, total: Tensor, valid_BHW: Tensor) -> Tensor:
        """Over the pixels that count."""
        count = valid_BHW.sum()
        if self.ignore_index is None:  # as many in every process's share
            return total / count.clamp_min(1)
        return parallel.ratio(total, count)

    def _focal(self, logits_BKHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
        label_B1HW = torch.where(valid_BHW, target_BHW, 0)[:, None]
        log_BHW = logits_BKHW.log_softmax(1).gather(1, label_B1HW)[:, 0]
        # Above 0 by a rounding, so that every derivative of the power is finite.
        missed_BHW = (-torch.expm1(log_BHW)).clamp_min(torch.finfo(log_BHW.dtype).eps)
        return self._mean(-(missed_BHW**self.gamma * log_BHW * valid_BHW).sum(), valid_BHW)

    def _boundary(self, logits_BKHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
        classes = logits_BKHW.shape[1]
        distance_BKHW = signed_distance(torch.where(valid_BHW, target_BHW, -1), classes)
        first = 0 if self.background else 1
        product_BKHW = (distance_BKHW * logits_BKHW.softmax(1) * valid_BHW[:, None])[:, first:]
        return self._mean(product_BKHW.sum() / (classes - first), valid_BHW)

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
        if self.tversky:
            wrong_K = self.false_positives * (predicted_K - inside_K)
            missed_K = self.false_negatives * (torch.where(present_K, true_K, 1.0) - inside_K)
            whole_K = inside_K + wrong_K + missed_K + self.smooth
            whole_K = torch.where(present_K, whole_K, 1.0)
            loss_K = loss_K + self.tversky * (1 - (inside_K + self.smooth) / whole_K)
        return (loss_K * present_K).sum() / present_K.sum().clamp_min(1)
