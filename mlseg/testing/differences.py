"""Derivatives by differences that know their own error, as references for tests.

A central difference errs by O(h^2) for its step h and by O(u |f| / h) for the rounding unit u:
which of the two prevails, and by how much, depends on the function and on the processor's kernels.
So no step is chosen here: Ridders' method takes steps that halve, extrapolates to h = 0 by
Neville's scheme, and keeps the entry that differs least from its two neighbours in the scheme.
That difference is its error (C. J. F. Ridders, "Accurate computation of F'(x) and F'(x) F''(x)",
Advances in Engineering Software 4(2), 1982), unless they agree by chance: it is never taken to be
less than what the function's noise, as the smallest steps show it, makes of it.
"""

from collections.abc import Callable, Sequence
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


def derivative(function: Callable[[float], Tensor], step: float, rows: int = 4) -> Derivative:
    """Of ``function`` at 0, in float64.

    Args:
        function: a tensor or scalar tensor for a displacement.
        step: the largest displacement; the smallest is ``step / 2 ** (rows - 1)``.
        rows: of Neville's scheme, at least 3: ``2 * rows`` evaluations.
    """
    entries: list[tuple[Tensor, float, float]] = []  # with their errors and steps
    noise, former = 0.0, list[Tensor]()
    for row in range(rows):
        h = step / SHRINK**row
        ahead, behind = (function(x).detach() for x in (h, -h))
        present = [(ahead - behind) / (2.0 * h)]
        for column, above in enumerate(former, 1):
            weight = SHRINK ** (2 * column)
            present.append((weight * present[-1] - above) / (weight - 1.0))
            apart = max(float((present[-1] - other).norm()) for other in (present[-2], above))
            entries.append((present[-1], apart, h))
        former = present
        # At the smallest steps it is noise that keeps the entries of the highest order apart, or
        # as much truncation; below the rounding of the values themselves it can't be.
        if row >= rows - 2:
            unit = torch.finfo(ahead.dtype).eps * float(ahead.norm())
            noise = max(noise, unit, h * entries[-1][1])
    value, error = min(((v, max(e, noise / h)) for v, e, h in entries), key=lambda pair: pair[1])
    return Derivative(value, ROOM * error)


def gradient(function: Callable[[Tensor], Tensor], point: Tensor, step: float) -> Derivative:
    """Of a scalar ``function``, of the shape of ``point``."""
    unit = torch.eye(point.numel(), dtype=point.dtype)
    found = slopes(function, point, [row.view_as(point) for row in unit], step)
    return Derivative(found.value.view_as(point), found.error)


def slopes(
    function: Callable[[Tensor], Tensor],
    point: Tensor,
    directions: Sequence[Tensor],
    step: float,
) -> Derivative:
    """Of a scalar ``function`` in each of the directions."""

    def along(direction: Tensor) -> Derivative:
        return derivative(lambda h: function(point + h * direction), step)

    found = [along(direction) for direction in directions]
    return Derivative(
        torch.stack([one.value for one in found]), sum(one.error**2 for one in found) ** 0.5
    )
