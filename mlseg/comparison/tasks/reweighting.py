"""Reweighting: a small network learns how much an example's loss is worth.

    min_s  CE(D_val; w*(s))
    s.t.   w*(s) = argmin_w 1/n sum_i V(L_i(w); s) L_i(w) + decay/2 ||w||^2,  L_i = CE(x_i, y_i; w)

After Shu et al.: Meta-Weight-Net, NeurIPS 2019. They hold V's input fixed in the lower level's
step, which then descends along no loss's gradient; here V's input is differentiated, so that the
lower level is a minimisation and its Hessian symmetric.

The classifier is a network with one hidden layer: not convex, so that the lower level's Hessian may
have negative eigenvalues on the way to the point that it settles at.
"""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from mlseg.comparison.tasks.base import Conditions, task
from mlseg.comparison.tasks.digits import CLASSES, Digits, DigitsSettings, Network, draw
from mlseg.testing.programs import Call


class ReweightingSettings(DigitsSettings):
    """Settings of the task ``reweighting``.

    Attributes:
        hidden: units of the classifier.
        weighting_hidden: units of the network that weighs.
    """

    hidden: PositiveInt = 8
    weighting_hidden: PositiveInt = 8
    imbalance: float = 5.0
    corrupted: NonNegativeFloat = 0.3
    rate: PositiveFloat | None = 0.3
    lower_steps: PositiveInt = 10


class Reweighting(Digits):
    """The program."""

    def __init__(self, settings: ReweightingSettings, conditions: Conditions) -> None:
        self.widths = settings.hidden, settings.weighting_hidden
        super().__init__(settings, conditions)

    def networks(self, features: int, examples: int) -> tuple[nn.Module, nn.Module]:
        """Classifier and weighting network, both with tanh, which is smooth."""
        hidden, small = self.widths
        layers = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))
        weighting = nn.Sequential(nn.Linear(1, small), nn.Tanh(), nn.Linear(small, 1))
        return Network(draw(layers, self.generator)), draw(weighting, self.generator)

    def inner(self, low: Call, top: Call, batch: Any) -> Tensor:
        """Weighted cross-entropy and decay."""
        x, y = batch
        losses = functional.cross_entropy(low(x), y, reduction="none")
        weights = top(losses.unsqueeze(1)).squeeze(1).sigmoid()
        return (weights * losses).mean() + self.penalty(low)


@task("reweighting", ReweightingSettings, "a small network weighs examples by loss; dense solve")
def build(settings: ReweightingSettings, conditions: Conditions) -> Reweighting:
    """The program."""
    return Reweighting(settings, conditions)
