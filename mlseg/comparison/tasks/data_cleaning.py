"""Data cleaning: a weight per training example, learned from clean validation data.

    min_s  CE(D_val; w*(s))
    s.t.   w*(s) = argmin_w 1/n sum_i sigmoid(s_i) CE(x_i, y_i; w) + decay/2 ||w||^2

with softmax regression, which is strongly convex. After Franceschi et al.: Forward and reverse
gradient-based hyperparameter optimization, ICML 2017, section 5.1, on smaller data.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from mlseg.comparison.tasks.base import Conditions, task
from mlseg.comparison.tasks.digits import CLASSES, Digits, DigitsSettings, Network, draw
from mlseg.testing.families import Vector
from mlseg.testing.programs import Call


class DataCleaningSettings(DigitsSettings):
    """Settings of the task ``data_cleaning``."""

    lower_steps: PositiveInt = 10


class DataCleaning(Digits):
    """The program."""

    def networks(self, features: int, examples: int) -> tuple[nn.Module, nn.Module]:
        """Softmax regression; a logit per example, near zero."""
        layers = draw(nn.Linear(features, CLASSES), self.generator, 0.1)
        logits = 0.1 * torch.randn(examples, generator=self.generator, dtype=torch.float64)
        return Network(layers), Vector(logits)

    def inner(self, low: Call, top: Call, batch: Any) -> Tensor:
        """Weighted cross-entropy and decay."""
        x, y = batch
        losses = functional.cross_entropy(low(x), y, reduction="none")
        return (top().sigmoid() * losses).mean() + self.penalty(low)


@task("data_cleaning", DataCleaningSettings, "corrupted labels, a weight per example; dense solve")
def build(settings: DataCleaningSettings, conditions: Conditions) -> DataCleaning:
    """The program."""
    return DataCleaning(settings, conditions)
