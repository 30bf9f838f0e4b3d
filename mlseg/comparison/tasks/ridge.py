"""Ridge regression whose penalties, one per coefficient, are learned on validation data.

    min_s  mean (X_val w*(s) - y_val)^2
    s.t.   w*(s) = argmin_w mean (X_tr w - y_tr)^2 + sum_j exp(s_j) w_j^2

Data: diabetes (Efron et al., 2004), with squares and products of its features.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mlseg.comparison.tasks import real_data
from mlseg.comparison.tasks.base import Conditions, task
from mlseg.comparison.tasks.two_levels import TwoLevels, TwoLevelSettings
from mlseg.testing.families import Vector
from mlseg.testing.programs import Call, Parameters


class RidgeSettings(TwoLevelSettings):
    """Settings of the task ``ridge``.

    Attributes:
        training, validation: examples.
        degree: 2 for squares and products of the features, 65 coefficients in place of 10.
        penalty: initial logarithm of every penalty, give or take a random half.
        lower_steps: of gradient descent per step of the penalties.
    """

    training: PositiveInt = 150
    validation: PositiveInt = 150
    degree: int = Field(2, ge=1, le=2)
    penalty: float = -3.0
    lower_steps: PositiveInt = 10


class Ridge(TwoLevels):
    """The program."""

    score_name = "test mean squared error"
    provenance = "diabetes, real, with scikit-learn"

    def __init__(self, settings: RidgeSettings, conditions: Conditions) -> None:
        sizes = settings.training, settings.validation
        data = real_data.load("diabetes", conditions.seed, *sizes, degree=settings.degree)
        self.test = data.test
        features = data.training[0].shape[1]
        generator = torch.Generator().manual_seed(conditions.seed)
        spread = 0.5 * torch.randn(features, generator=generator, dtype=torch.float64)
        low = Vector(torch.zeros(features, dtype=torch.float64))
        top = Vector(settings.penalty + spread)
        super().__init__(settings, conditions, low, top, data.training, data.validation)

    def inner(self, low: Call, top: Call, batch: Any) -> Tensor:
        """Mean squared error and penalties."""
        w = low()
        return _error(w, batch) + (top().exp() * w**2).sum()

    def outer(self, low: Call, top: Call, batch: Any) -> Tensor:
        """Mean squared error."""
        return _error(low(), batch)

    def solution(self) -> Parameters:
        """``(X^T X / n + diag(exp s))^-1 X^T y / n``."""
        x, y = self.training
        return {"value": torch.linalg.solve(self._normal(), x.T @ y / len(y))}

    def implicit(self) -> Parameters:
        """``-exp(s_j) w_j u_j``; ``u`` solves the normal equations for the upper gradient."""
        low, top = self.present().values.values()
        x, y = self.validation
        w = low["value"]
        vector = 2.0 * x.T @ (x @ w - y) / len(y)
        return {"value": -top["value"].exp() * w * torch.linalg.solve(self._normal(), vector)}

    def _normal(self) -> Tensor:
        """Half the lower loss's Hessian."""
        x, _ = self.training
        return x.T @ x / len(x) + torch.diag(self.start.values["upper"]["value"].exp())

    @torch.no_grad()
    def score(self) -> float:
        """On the test split, of the standardised target."""
        return float(_error(self.lower.module.value.detach().to("cpu", torch.float64), self.test))


def _error(w: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return ((x @ w - y) ** 2).mean()


@task("ridge", RidgeSettings, "ridge regression, a penalty per coefficient; closed form")
def build(settings: RidgeSettings, conditions: Conditions) -> Ridge:
    """The program."""
    return Ridge(settings, conditions)
