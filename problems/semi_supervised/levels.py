"""CTBCT and DCT: two networks that learn from few masks, and from each other on images without any.

Cross teaching between CNN and transformer (CTBCT), on a batch of labelled images L and others U:

    L_sup(p_1, y)_L + lambda Dice(p_1, yhat_2)_U      by the first network's weights
    L_sup(p_2, y)_L + lambda Dice(p_2, yhat_1)_U      by the second's,  yhat_i = argmax p_i

Deep co-training (DCT), each network with labelled images of its own, x_i, and U for both:

    sum_i CE(p_i(x_i), y_i) + lambda_cot JSD(p_1, p_2)_U
        + lambda_adv / 4 sum over x in {x_i, U} of KL(p_1(x) || p_2(x~_1)) + KL(p_2(x) || p_1(x~_2))

where x~_i = clamp(x + epsilon sign grad_x CE(p_i(x), y)) misleads network i. Either is one level:
each network is a problem with its own optimizer, and no hypergradient passes. The sum's gradient by
one network's weights takes the other's predictions as they are, so that each problem has the terms
that its own weights are in. Both step from the weights that both had before: the first one's step
passes the batch through both networks, and the second's takes up the graph that is there.

Passes of each network over a batch in an iteration, counted in
``tests/problems/semi_supervised/test_levels.py``:

======  ============================================================================  ==========
method  for                                                                           passes
======  ============================================================================  ==========
ctbct   labelled and other images together                                            1 F, 1 B
dct     labelled ones; others                                                         2 F, 2 B
dct     from where lambda_adv begins: x~ of both (to the image); the other's x~ of    3 F, 3 B
        labelled images, and of others
======  ============================================================================  ==========

Masks of the others are never read; what their loader gives as such says only where padding is.

Where this departs from the papers or fills a gap is in ``docs/e2eaug.md``.

Sources: Luo et al., MIDL 2022, section 2; Peng et al., Pattern Recognition 107, 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlseg.multilevel.problem import Problem
from mlseg.precision import full
from mlseg.problems.building import Setup
from mlseg.problems.semi_supervised.losses import (
    counted,
    divergence,
    jensen_shannon,
    squared_dice,
)
from mlseg.segmentation.losses import Criterion
from mlseg.segmentation.nets import class_probabilities
from mlseg.segmentation.scoring import evaluating

Weight = Callable[[int], float]
"""Of a term, by how many steps have been taken."""


class Peer(Problem):
    """One of the two networks, ``segmentor`` or ``partner``.

    Args:
        criterion: on labelled images.
        ignore_index: of pixels that don't count.
        consistency: weight of agreement on images without masks; None: there are none.
        leads: it is the first, draws the batch and evaluates both.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        criterion: Criterion,
        ignore_index: int | None,
        consistency: Weight | None,
        leads: bool,
    ) -> None:
        super().__init__(*setup)
        self.criterion, self.ignore_index = criterion, ignore_index
        self.consistency = consistency
        self.leads = leads
        self.outputs: tuple[Any, Any] | None = None

    def get_batch(self) -> Any:
        """The batch of both."""
        return self.draw() if self.leads else self.segmentor.cur_batch

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """The terms that this network's weights are in."""
        if self.leads:
            self.outputs = self.evaluate(batch)
            mine, its = self.outputs
        else:
            its, mine = self.segmentor.outputs
            self.segmentor.outputs = None
        return self.learn(batch, mine, its)

    def draw(self) -> Any:
        """A batch for both."""
        raise NotImplementedError

    def evaluate(self, batch: Any) -> tuple[Any, Any]:
        """What each network makes of it."""
        raise NotImplementedError

    def learn(self, batch: Any, mine: Any, its: Any) -> dict[str, Tensor]:
        """Loss and figures, given what this network and the other one make of the batch."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K, H, W) logits of this network to class probabilities."""
        return class_probabilities(self.module, logits)

    @property
    def steps(self) -> int:
        """That have been taken before this one."""
        return max(self.count - 1, 0)


class CrossTeaching(Peer):
    """A network of CTBCT."""

    def draw(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Labelled images before the others, the masks of the former, where pixels count in U."""
        if self.consistency is None:
            image, mask = super(Peer, self).get_batch()
            return image, mask, None
        (image, mask), (other, place) = super(Peer, self).get_batch()
        return torch.cat([image, other]), mask, counted(place, self.ignore_index)

    def epoch_callback(self) -> None:
        """Tell the partner, which has no loader of its own."""
        if self.leads:
            self.partner.step_scheduler("epoch")

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits of both networks, each by one pass: BatchNorm's statistics mix L and U."""
        return self(batch[0]), self.partner(batch[0])

    def learn(self, batch: Any, mine: Tensor, its: Tensor) -> dict[str, Tensor]:
        """``L_sup`` on L, and the other's decisions as labels on U."""
        _, mask, where = batch
        supervised = self.criterion(mine[: len(mask)], mask)
        if self.consistency is None:
            return {"loss": supervised}
        label = its[len(mask) :].detach().argmax(1)
        found = self.probabilities(mine[len(mask) :])
        agreement = squared_dice(found, label, where)
        weight = self.consistency(self.steps)
        return {
            "loss": supervised + weight * agreement,
            "supervised": supervised,
            "agreement": agreement,
        }


class Seen(NamedTuple):
    """What a network makes of an iteration's images.

    Attributes:
        labelled, others: logits of its own labelled images, and of U.
        adversarial: logits of what misleads the other network, made of that one's labelled images
            and of U; None where that has no weight.
    """

    labelled: Tensor
    others: Tensor | None
    adversarial: tuple[Tensor, Tensor] | None = None


class CoTraining(Peer):
    """A network of DCT.

    Args:
        adversarial: weight of agreement on images that mislead one of the networks.
        epsilon: how far those may be from the image, in [-1, 1], at each pixel.
    """

    def __init__(self, setup: Setup, *, adversarial: Weight, epsilon: float, **common: Any) -> None:
        super().__init__(setup, **common)
        self.adversarial, self.epsilon = adversarial, epsilon

    def draw(self) -> tuple[Any, Any, Any]:
        """A labelled batch for each network, in its own order, and one without masks."""
        if self.consistency is None:
            return super(Peer, self).get_batch(), self.partner.draw_labelled(), None
        labelled, (image, place) = super(Peer, self).get_batch()
        return labelled, self.partner.draw_labelled(), (image, counted(place, self.ignore_index))

    def draw_labelled(self) -> tuple[Tensor, Tensor]:
        """The second network's own labelled batch."""
        batch: tuple[Tensor, Tensor] = self.get_batch_single_loader(0)
        return batch

    def evaluate(self, batch: Any) -> tuple[Seen, Seen]:
        """What both make of the images, and of those that mislead the other."""
        *labelled, others = batch
        peers = (self, self.partner)
        seen = [
            Seen(peer(image), None if others is None else peer(others[0]))
            for peer, (image, _) in zip(peers, labelled, strict=True)
        ]
        if others is None or not self.adversarial(self.steps):
            return seen[0], seen[1]
        misleading = [
            peer.mislead(*own, others[0]) for peer, own in zip(peers, labelled, strict=True)
        ]
        first, second = (
            one._replace(adversarial=tuple(peer(image) for image in images))
            for one, peer, images in zip(seen, peers, misleading[::-1], strict=True)
        )
        return first, second

    def mislead(self, image: Tensor, mask: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Images near these on which this network does worse, at its present weights.

        By one step along the gradient's sign; where there is no mask, away from its own decisions.

        Args:
            image, mask: labelled, (B, C, H, W) in [-1, 1] and (B, H, W).
            other: (U, C, H, W), without masks.

        Source: Goodfellow et al., ICLR 2015, section 4; here in evaluation mode, which has no
        statistics of a batch to change.
        """
        both = torch.cat([image, other]).detach().requires_grad_()
        with evaluating(self.module), torch.enable_grad():
            logits = full(self(both))
            target = torch.cat([mask, logits[len(mask) :].detach().argmax(1)])
            # The sum, which has the sign of any mean: no image has a part in another's gradient.
            probability = self.probabilities(logits).clamp_min(1e-10)
            ignored = -100 if self.ignore_index is None else self.ignore_index
            loss = torch.nn.functional.nll_loss(
                probability.log(), target, ignore_index=ignored, reduction="sum"
            )
            (gradient,) = torch.autograd.grad(loss, both)
        moved = (both.detach() + self.epsilon * gradient.sign()).clamp_(-1.0, 1.0)
        return moved[: len(mask)], moved[len(mask) :]

    def learn(self, batch: Any, mine: Seen, its: Seen) -> dict[str, Tensor]:
        """``CE``, and the networks' distance on U and on what misleads the other network."""
        own, others_labelled = (batch[0], batch[1]) if self.leads else (batch[1], batch[0])
        supervised = self.criterion(mine.labelled, own[1])
        if self.consistency is None or mine.others is None or its.others is None:
            return {"loss": supervised}
        where = batch[2][1]
        other = self.partner if self.leads else self.segmentor
        theirs = other.probabilities(its.others.detach())
        distance = jensen_shannon(self.probabilities(mine.others), theirs, where)
        loss = supervised + self.consistency(self.steps) * distance
        figures = {"supervised": supervised, "distance": distance}
        if mine.adversarial is not None:
            clean = other.probabilities(its.labelled.detach()), theirs
            counts = counted(others_labelled[1], self.ignore_index), where
            # Two of the four terms of the mean; the other network's weights are in the other two.
            terms = [
                divergence(target, self.probabilities(logits), here)
                for target, logits, here in zip(clean, mine.adversarial, counts, strict=True)
            ]
            figures["adversarial"] = (terms[0] + terms[1]) / 4
            loss = loss + self.adversarial(self.steps) * figures["adversarial"]
        return {"loss": loss, **figures}
