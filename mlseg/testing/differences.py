"""Derivatives by differences that know their own error, as references for tests.

A central difference errs by O(h^2) for its step h and by O(u |f| / h) for the rounding unit u:
which of the two prevails, and by how much, depends on the function and on the processor's kernels.
So no step is chosen here: Ridders' method takes steps that halve, extrapolates to h = 0 by
Neville's scheme, and keeps the entry that differs least from its two neighbours in the scheme.
That difference is its error, rounding included (C. J. F. Ridders, "Accurate computation of F'(x)
and F'(x) F''(x)", Advances in Engineering Software 4(2), 1982).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK = 2.0
ROOM = 10.0
"""An estimate of an error may be off; by how much it is taken to be."""


@dataclass(frozen=True)
class Derivative:
    """A derivative by differences.

    Attributes:
        value: of the shape of the function's values.
        error: norm of what the value may be off by.
    """

    value: Tensor
    error: float

    @property
    def relative(self) -> float:
        return self.error / float(self.value.norm())

    def check(self, found: Tensor, within: float) -> None:
        """Raise unless ``found`` is within this relative error, beside the value's own.

        The own error must be smaller than ``within``: a larger one could hide a mistake.
        """
        away = float((found.detach() - self.value).norm() / self.value.norm())
        told = f"{away:.1e} away, {within:.1e} allowed, the reference is off by {self.relative:.1e}"
        assert self.relative < within, told
        assert away < within + self.relative, told


def derivative(function: Callable[[float], Tensor], step: float, rows: int = 5) -> Derivative:
    """Of ``function`` at 0, in float64.

    Args:
        function: a tensor or scalar tensor for a displacement.
        step: the largest displacement; the smallest is ``step / 2 ** (rows - 1)``.
        rows: of Neville's scheme: ``2 * rows`` evaluations.
    """
    best, least = torch.zeros(()), float("inf")
    former: list[Tensor] = []
    for row in range(rows):
        h = step / SHRINK**row
        ahead, behind = (function(x).detach() for x in (h, -h))
        # What differences of the values can't resolve, whatever neighbours they are among.
        unit = torch.finfo(ahead.dtype).eps * float(ahead.norm()) / h
        entries = [(ahead - behind) / (2.0 * h)]
        for column, above in enumerate(former, 1):
            weight = SHRINK ** (2 * column)
            entries.append((weight * entries[-1] - above) / (weight - 1.0))
            apart = max(float((entries[-1] - other).norm()) for other in (entries[-2], above))
            if apart + unit < least:
                best, least = entries[-1], apart + unit
        former = entries
    return Derivative(best, ROOM * least)


def gradient(function: Callable[[Tensor], Tensor], point: Tensor, step: float) -> Derivative:
    """Of a scalar ``function``, a coordinate of ``point`` at a time."""
    found = []
    for index in range(point.numel()):
        direction = torch.zeros_like(point)
        direction.view(-1)[index] = 1.0
        found.append(along(function, point, direction, step))
    value = torch.stack([one.value for one in found]).view_as(point)
    return Derivative(value, sum(one.error**2 for one in found) ** 0.5)


def along(
    function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, step: float
) -> Derivative:
    """Of ``function`` at ``point`` in a direction."""
    return derivative(lambda h: function(point + h * direction), step)
