"""SegAN: a segmentor against a critic, with one multi-scale loss for both.

    min_S max_C  mean_n (1/L) sum_i || f_i(x_n o S(x_n)) - f_i(x_n o y_n) ||_1

f_i is the critic's i-th feature map, the masked image itself the first; x o y is the image times a
label map, channel by channel. Each batch: one step of the critic on minus the loss, after which its
parameters are clamped; then one step of the segmentor on the loss, its gradient passing through the
critic's features: of its L terms the first, the pixel level, is a plain L1 distance that no weight
of the critic has a part in (``critic.pixel_level: false`` leaves it out). As a graph of levels the
critic is the lower one, the segmentor its upper; ``u2l`` is empty for this plain alternation and
{S: [C]} for the Stackelberg game, where the segmentor also sees how the critic will answer.

Passes over a batch per iteration, counted in ``tests/problems/segan/test_passes.py``:

=========  ==================================================================  ==========
network    for                                                                 passes
=========  ==================================================================  ==========
segmentor  both steps: the critic's on the detached maps, then its own         1 F, 1 B
critic     its own step: true and predicted, one after the other               2 F, 2 B
critic     the segmentor's step: true and predicted by the new weights         2 F, 1 B
=========  ==================================================================  ==========

One forward pass of the segmentor serves both steps, since nothing changes it in between. The true
image's features are computed twice, since the critic's step does change them. A Stackelberg
iteration goes back through the segmentor twice, directly and through the critic's response, and
adds the method's evaluations of the critic. With ``unroll_steps`` of the critic above 1 all but the
last of its steps have a forward pass of the segmentor to themselves, without a trace in its
BatchNorm statistics.

Where this departs from the paper or fills a gap is in ``docs/segan.md``.

Source: Xue, Xu and Huang, ISBI 2018, section 2, equations 1 to 3; section 3 for the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlseg.errors import UserError
from mlseg.hypergradients import Interface
from mlseg.multilevel.problem import Problem
from mlseg.problems.building import Setup
from mlseg.problems.segan.losses import (
    Reduction,
    conventional_gan,
    dice_of_maps,
    multi_scale_l1,
)
from mlseg.problems.segan.networks.critic import check_label_maps
from mlseg.problems.segan.settings import LogisticSettings
from mlseg.segmentation.nets import class_probabilities


class Critic(Problem):
    """The lower level: raises the loss between predicted and true label maps.

    Args:
        num_classes, ignore_index: of the masks.
        reduction: of the multi-scale loss.
        scalar: the critic has one output, and the loss is a conventional GAN's.
        signed: whether label maps mask images in [-1, 1], or in [0, 1].
        clamp, clamp_norm: every parameter's bound, None for none, and whether BatchNorm's have it.
        logistic: how the segmentor's k is annealed, if it has one.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        num_classes: int,
        ignore_index: int | None = None,
        reduction: Reduction = "layer_mean",
        scalar: bool = False,
        signed: bool = False,
        clamp: float | None = None,
        clamp_norm: bool = True,
        logistic: LogisticSettings | None = None,
    ) -> None:
        super().__init__(*setup)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.reduction, self.scalar, self.signed = reduction, scalar, signed
        self.clamp, self.clamp_norm = clamp, clamp_norm
        self.logistic = logistic

    def get_batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Image, true label maps, and where pixels count."""
        image, mask = super().get_batch()
        label, counted = label_maps(mask, self.num_classes, self.ignore_index)
        check_label_maps(image, label)
        return image, label, counted

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Minus the loss, S fixed."""
        image, label, counted = batch
        if self.replaying:
            return {"loss": -self.distance(image, self.segmentor.maps(image, counted), label)}
        maps = self.segmentor.predict(image, counted, keep=self.is_segmentors_turn)
        if self.is_differentiated:
            self.interface = Interface(
                [maps],
                lambda tensors: -self.distance(image, tensors[0], label),
                self.random_state(),
                rest=None,
            )
        # A method that unrolls this step follows its graph into the segmentor.
        seen = maps if self.is_differentiated else maps.detach()
        distance = self.distance(image, seen, label)
        return {"loss": -distance, "distance": distance}

    def distance(
        self, image: Tensor, maps: Tensor, label: Tensor, critic_fixed: bool = False
    ) -> Tensor:
        """The multi-scale L1 loss or the conventional one, the mean over the critics.

        True and predicted images pass one after the other: each by its own BatchNorm statistics.

        Args:
            critic_fixed: no gradient by the critic's parameters is wanted, so that the true image's
                features need no graph.
        """
        masked = image if self.signed else (image + 1.0) / 2.0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not critic_fixed):
            true = self(masked, label)
        predicted = self(masked, maps)
        losses = [
            conventional_gan(p[0], t[0]) if self.scalar else multi_scale_l1(p, t, self.reduction)
            for p, t in zip(predicted, true, strict=True)
        ]
        return torch.stack(losses).mean()

    @property
    def is_segmentors_turn(self) -> bool:
        """Whether the segmentor steps on this batch, after this step."""
        return self._count % (self._unroll_steps * self.gas) == 0

    def param_callback(self) -> None:
        """Clamp every parameter, after each step."""
        if self.clamp is None:
            return
        parameters = [p.data for p in self.clamped_parameters()]
        torch._foreach_clamp_min_(parameters, -self.clamp)
        torch._foreach_clamp_max_(parameters, self.clamp)

    def clamped_parameters(self) -> list[nn.Parameter]:
        """All, or all but BatchNorm's."""
        return [
            parameter
            for module in self.module.modules()
            if self.clamp_norm or not isinstance(module, nn.BatchNorm2d)
            for parameter in module.parameters(recurse=False)
        ]

    def epoch_callback(self) -> None:
        """Tell the segmentor, which has no loader of its own; anneal its logistic."""
        self.segmentor.step_scheduler("epoch")
        annealed = getattr(self.segmentor.module, "logistic", None)
        if annealed is not None and self.logistic is not None:
            annealed.end_epoch(self.logistic.decay, self.logistic.every, self.logistic.floor)


class Segmentor(Problem):
    """The upper level: lowers the same loss, on the critic's batch and through the critic.

    Args:
        dice_weight: of the Dice term beside it.
    """

    def __init__(self, setup: Setup, *, dice_weight: float = 0.0) -> None:
        super().__init__(*setup)
        self.dice_weight = dice_weight
        self._kept: Tensor | None = None

    @property
    def in_warmup(self) -> bool:
        """Whether the critic rests: it has no part in the graph of the warm-up's stage."""
        return not self.children

    def get_batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The critic's batch; in the warm-up, where the critic rests, the next one."""
        return self.critic.get_batch() if self.in_warmup else self.critic.cur_batch

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """The loss, C fixed, with the Dice term if one is wanted."""
        image, label, counted = batch
        if self.in_warmup:
            return {"loss": dice_of_maps(self.maps(image, counted), label), **self._k()}
        maps = self._kept if self._kept is not None else self.maps(image, counted)
        self._kept = None
        fixed = not self.critic.is_differentiated
        distance = self.critic.distance(image, maps, label, critic_fixed=fixed)
        if not self.dice_weight:
            return {"loss": distance, **self._k()}
        dice = dice_of_maps(maps, label)
        loss = distance + self.dice_weight * dice
        return {"loss": loss, "distance": distance, "dice": dice, **self._k()}

    def _k(self) -> dict[str, Tensor]:
        """The present k of the network's logistic, for the records, if it has one."""
        annealed = getattr(self.module, "logistic", None)
        return {} if annealed is None else {"k": annealed.k}

    def maps(self, image: Tensor, counted: Tensor | None) -> Tensor:
        """(B, M, H, W) label maps f(z) of an image; 0 where pixels don't count."""
        found = class_probabilities(self.module, self(image))
        found = found[:, 1:] if found.shape[1] == 2 else found
        return found if counted is None else found * counted

    def predict(self, image: Tensor, counted: Tensor | None, keep: bool) -> Tensor:
        """Label maps for the critic's step.

        Args:
            keep: the segmentor steps on this batch next and will take the same forward pass, which
                therefore counts in its BatchNorm statistics. Others don't.
        """
        if keep:
            self._kept = self.maps(image, counted)
            return self._kept
        with torch.set_grad_enabled(self.critic.is_differentiated), untracked(self.module):
            return self.maps(image, counted)


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Within this block a forward pass in training mode leaves the BatchNorm statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracks in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracks


def label_maps(
    mask: Tensor, num_classes: int, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Class indices as label maps.

    Args:
        mask: (B, H, W).
        num_classes: K; of two, the foreground has the one map.

    Returns:
        (B, M, H, W) maps of 0 and 1, all 0 where a pixel is ignored; and (B, 1, H, W), 1 where a
        pixel counts, or None where all do.
    """
    if mask.dim() != 3:
        raise UserError(
            f"masks of shape {tuple(mask.shape)}: class indices must be (B, H, W), one per pixel"
        )
    classes = torch.arange(1 if num_classes == 2 else 0, num_classes, device=mask.device)
    maps = (mask[:, None] == classes[:, None, None]).float()
    if ignore_index is None:
        return maps, None
    counted = (mask != ignore_index)[:, None].float()
    return maps * counted, counted
