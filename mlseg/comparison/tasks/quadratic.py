"""A quadratic below a quadratic, of any condition: closed form.

min_s  1/2 ||w*(s) - t||^2 + r/2 ||s||^2    s.t.  w*(s) = argmin_w 1/2 w^T A w - w^T (B s + c)
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from mlseg.comparison.tasks.base import Conditions, task
from mlseg.comparison.tasks.two_levels import TwoLevels, TwoLevelSettings
from mlseg.testing.families import Vector
from mlseg.testing.programs import Call, Parameters


class QuadraticSettings(TwoLevelSettings):
    """Settings of the task ``quadratic``.

    Attributes:
        lower, upper: number of variables of each level.
        condition: largest over smallest absolute eigenvalue of A; they are spaced evenly in their
            logarithm, from 1 down.
        negative: how many of the eigenvalues, chosen at random, are negative: the lower level's
            solution is then a saddle, which implicit methods can differentiate but descent leaves.
        regularisation: r.
        rate: of descent; None for the fastest, 2 / (largest + smallest eigenvalue).
    """

    lower: PositiveInt = 50
    upper: PositiveInt = 10
    condition: float = Field(100.0, ge=1.0)
    negative: NonNegativeInt = 0
    regularisation: NonNegativeFloat = 0.01

    @model_validator(mode="after")
    def _check(self) -> QuadraticSettings:
        if self.negative > self.lower:
            raise ValueError(f"negative: {self.negative} of {self.lower} eigenvalues; lower it")
        return self


class Quadratic(TwoLevels):
    """The program; its data are drawn from the seed."""

    score_name = "excess of the upper loss over its minimum"
    score_note = "of the upper variables, with the lower level solved in closed form"
    provenance = "drawn from the seed"

    def __init__(self, settings: QuadraticSettings, conditions: Conditions) -> None:
        generator = torch.Generator().manual_seed(conditions.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n, m = settings.lower, settings.upper
        exponents = torch.linspace(0.0, -1.0, n, dtype=torch.float64)
        self.eigenvalues = settings.condition**exponents
        self.eigenvalues[torch.randperm(n, generator=generator)[: settings.negative]] *= -1.0
        rotation, _ = torch.linalg.qr(draw(n, n))
        self.a = rotation @ torch.diag(self.eigenvalues) @ rotation.T
        self.a = 0.5 * (self.a + self.a.T)
        self.b, self.c, self.t = draw(n, m) / n**0.5, draw(n) / n**0.5, draw(n)
        self.regularisation = settings.regularisation
        if settings.rate is None:
            size = self.eigenvalues.abs()
            rate = 2.0 / float(size.max() + size.min())
            settings = settings.model_copy(update={"rate": rate})
        low, top = Vector(draw(n)), Vector(draw(m))
        super().__init__(settings, conditions, low, top, (self.a, self.b, self.c), (self.t,))

    def inner(self, low: Call, top: Call, batch: Any) -> Tensor:
        """``1/2 w^T A w - w^T (B s + c)``."""
        a, b, c = batch
        w = low()
        return 0.5 * w @ (a @ w) - w @ (b @ top() + c)

    def outer(self, low: Call, top: Call, batch: Any) -> Tensor:
        """``1/2 ||w - t||^2 + r/2 ||s||^2``."""
        (t,) = batch
        return 0.5 * ((low() - t) ** 2).sum() + 0.5 * self.regularisation * (top() ** 2).sum()

    def solution(self) -> Parameters:
        """``A^-1 (B s + c)``."""
        return {
            "value": torch.linalg.solve(
                self.a, self.b @ self.start.values["upper"]["value"] + self.c
            )
        }

    def implicit(self) -> Parameters:
        """``B^T A^-1 (w - t) + r s``."""
        low, top = self.present().values.values()
        solved = torch.linalg.solve(self.a, low["value"] - self.t)
        return {"value": self.b.T @ solved + self.regularisation * top["value"]}

    def score(self) -> float:
        """``F(s) - min F`` with ``F(s)`` the upper loss at the lower level's solution."""
        response = torch.linalg.solve(self.a, torch.cat([self.b, self.c[:, None]], 1))
        slope, offset = response[:, :-1], response[:, -1] - self.t
        identity = torch.eye(slope.shape[1], dtype=torch.float64)
        hessian = slope.T @ slope + self.regularisation * identity
        best = torch.linalg.lstsq(hessian, -(slope.T @ offset)[:, None]).solution[:, 0]

        def upper_loss(s: Tensor) -> Tensor:
            return 0.5 * ((slope @ s + offset) ** 2).sum() + 0.5 * self.regularisation * (s @ s)

        present = self.upper.module.value.detach().to("cpu", torch.float64)
        return float(upper_loss(present) - upper_loss(best))


@task("quadratic", QuadraticSettings, "a quadratic of any condition below a quadratic; closed form")
def build(settings: QuadraticSettings, conditions: Conditions) -> Quadratic:
    """The program."""
    return Quadratic(settings, conditions)
