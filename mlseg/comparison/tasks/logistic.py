"""Logistic regression whose penalties, one per coefficient, are learned on validation data.

    min_s  mean log(1 + exp(-y_val x_val^T w*(s)))
    s.t.   w*(s) = argmin_w mean log(1 + exp(-y_tr x_tr^T w)) + 1/2 sum_j exp(s_j) w_j^2

with labels y of -1 and 1. Data: breast cancer Wisconsin (diagnostic), 30 features and a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional

from mlseg.comparison.tasks import real_data
from mlseg.comparison.tasks.base import Conditions, task
from mlseg.comparison.tasks.two_levels import TwoLevels, TwoLevelSettings
from mlseg.testing.families import Vector
from mlseg.testing.programs import Call, Parameters


class LogisticSettings(TwoLevelSettings):
    """Settings of the task ``logistic``.

    Attributes:
        training, validation: examples.
        penalty: initial logarithm of every penalty, give or take a random half.
        lower_steps: of gradient descent per step of the penalties.
    """

    training: PositiveInt = 200
    validation: PositiveInt = 200
    penalty: float = -4.0
    lower_steps: PositiveInt = 10


class Logistic(TwoLevels):
    """The program."""

    score_name = "test log loss"
    provenance = "breast cancer Wisconsin (diagnostic), real, with scikit-learn"

    def __init__(self, settings: LogisticSettings, conditions: Conditions) -> None:
        sizes = settings.training, settings.validation
        data = real_data.load("breast_cancer", conditions.seed, *sizes)
        training, validation, self.test = (
            (torch.cat([x, torch.ones_like(x[:, :1])], 1), 2.0 * y - 1.0)
            for x, y in (data.training, data.validation, data.test)
        )
        features = training[0].shape[1]
        generator = torch.Generator().manual_seed(conditions.seed)
        spread = 0.5 * torch.randn(features, generator=generator, dtype=torch.float64)
        low = Vector(torch.zeros(features, dtype=torch.float64))
        top = Vector(settings.penalty + spread)
        super().__init__(settings, conditions, low, top, training, validation)

    def inner(self, low: Call, top: Call, batch: Any) -> Tensor:
        """Log loss and penalties."""
        w = low()
        return _log_loss(w, batch) + 0.5 * (top().exp() * w**2).sum()

    def outer(self, low: Call, top: Call, batch: Any) -> Tensor:
        """Log loss."""
        return _log_loss(low(), batch)

    def implicit(self) -> Parameters:
        """``-exp(s_j) w_j u_j``, ``u`` by a dense solve with the Hessian written out.

        The Hessian is ``X^T diag(p (1 - p)) X / n + diag(exp s)``, ``p`` the probabilities.
        """
        low, top = self.present().values.values()
        w, penalty = low["value"], top["value"].exp()
        x, y = self.validation
        vector = -x.T @ (y * torch.sigmoid(-y * (x @ w))) / len(y)
        x, _ = self.training
        p = torch.sigmoid(x @ w)
        hessian = x.T @ (x * (p * (1.0 - p))[:, None]) / len(x) + torch.diag(penalty)
        return {"value": -penalty * w * torch.linalg.solve(hessian, vector)}

    @torch.no_grad()
    def score(self) -> float:
        """On the test split."""
        w = self.lower.module.value.detach().to("cpu", torch.float64)
        return float(_log_loss(w, self.test))


def _log_loss(w: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return functional.softplus(-y * (x @ w)).mean()


@task("logistic", LogisticSettings, "logistic regression, a penalty per coefficient; dense solve")
def build(settings: LogisticSettings, conditions: Conditions) -> Logistic:
    """The program."""
    return Logistic(settings, conditions)
