"""Handwritten digits with wrong labels, for the tasks that learn which examples to trust."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from mlseg.comparison.tasks import real_data
from mlseg.comparison.tasks.base import Conditions
from mlseg.comparison.tasks.two_levels import TwoLevels, TwoLevelSettings
from mlseg.testing.programs import Call

CLASSES = 10


class DigitsSettings(TwoLevelSettings):
    """Settings of tasks on digits.

    Attributes:
        training, validation: examples; only validation labels are all right.
        corrupted: share of training labels that are replaced by a random other class.
        imbalance: training examples of the most over those of the rarest class (digit 0 is the
            most frequent, each next one rarer by the same factor).
        decay: weight of half the squared norm of the lower level's parameters.
    """

    training: PositiveInt = 300
    validation: PositiveInt = 200
    corrupted: float = Field(0.5, ge=0.0, lt=1.0)
    imbalance: float = Field(1.0, ge=1.0)
    decay: NonNegativeFloat = 1e-2


class Digits(TwoLevels):
    """A classifier of digits under the upper level's weights for its examples."""

    score_name = "test error"
    provenance = "digits (UCI), real, with scikit-learn; training labels corrupted on purpose"

    def __init__(self, settings: DigitsSettings, conditions: Conditions) -> None:
        self.decay = settings.decay
        self.generator = torch.Generator().manual_seed(conditions.seed)
        data = real_data.load("digits", conditions.seed, settings.training, settings.validation)
        self.test = data.test
        x, y = _imbalanced(*data.training, settings.imbalance)
        noisy, self.is_wrong = self._corrupt(y, settings.corrupted)
        low, top = self.networks(x.shape[1], len(x))
        for module in (low, top):
            module.to(torch.float64)
        super().__init__(settings, conditions, low, top, (x, noisy), data.validation)

    @abstractmethod
    def networks(self, features: int, examples: int) -> tuple[nn.Module, nn.Module]:
        """Lower and upper module; random values are drawn from ``self.generator``."""

    def penalty(self, low: Call) -> Tensor:
        """``decay`` times half the squared norm; of the network whose parameters ``low`` uses."""
        return 0.5 * self.decay * low(None)

    def outer(self, low: Call, top: Call, batch: Any) -> Tensor:
        """Cross-entropy on clean validation data."""
        x, y = batch
        return functional.cross_entropy(low(x), y)

    @torch.no_grad()
    def score(self) -> float:
        """Share of the test split that is misclassified."""
        x, y = self.test
        module = self.lower.module
        device = next(module.parameters()).device
        logits = module(x.to(device, self.conditions.dtype)).cpu()
        return float((logits.argmax(1) != y).double().mean())

    def _corrupt(self, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
        wrong = torch.zeros(len(y), dtype=torch.bool)
        wrong[torch.randperm(len(y), generator=self.generator)[: round(share * len(y))]] = True
        other = (y + torch.randint(1, CLASSES, y.shape, generator=self.generator)) % CLASSES
        return torch.where(wrong, other, y), wrong


class Network(nn.Module):
    """Layers whose squared norm can be asked for by calling it with None."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor | None) -> Tensor:
        """(N, D) features to (N, K) logits; the parameters' squared norm for None."""
        if x is None:
            return sum(((p**2).sum() for p in self.parameters()), start=torch.zeros(()))
        return self.layers(x)


def draw(module: nn.Module, generator: torch.Generator, spread: float = 1.0) -> nn.Module:
    """Give every layer normal weights of variance ``spread^2`` / inputs, and no bias."""
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
            if p.ndim > 1:
                p.normal_(0.0, spread / p.shape[1] ** 0.5, generator=generator)
    return module


def _imbalanced(x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Keep of class k a share of ``factor^(-k/9)``, the first ones."""
    if factor == 1.0:
        return x, y
    kept = []
    for k in range(CLASSES):
        places = (y == k).nonzero()[:, 0]
        kept.append(places[: max(1, round(len(places) * factor ** (-k / (CLASSES - 1))))])
    order = torch.cat(kept).sort().values
    return x[order], y[order]
