"""The step of all of a level's parameters as one differentiable map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlseg.hypergradients.optimizers.base import (
    COUNT,
    Moments,
    Optimizer,
    constant,
    free,
    safe_sqrt,
)
from mlseg.hypergradients.second_order.products import dual_level
from mlseg.hypergradients.trajectory import Step
from mlseg.hypergradients.vectors import filled, flatten, unflatten


@dataclass
class _Flat:
    """Weights, gradients and moments of bundles, each one flat tensor, and the rates."""

    weights: list[Tensor]
    gradients: list[Tensor]
    moments: list[Moments]
    rates: list[Tensor] | None = None

    def leaves(self) -> list[Tensor]:
        """All that is differentiated by, in a row."""
        moments = [m[k] for m in self.moments for k in _differentiable(m)]
        return [*self.weights, *self.gradients, *moments, *(self.rates or ())]

    def like(self, leaves: Sequence[Tensor]) -> _Flat:
        """The same with other values, in the order of :meth:`leaves`."""
        rest = iter(leaves)
        return _Flat(
            [next(rest) for _ in self.weights],
            [next(rest) for _ in self.gradients],
            [m | {k: next(rest) for k in _differentiable(m)} for m in self.moments],
            None if self.rates is None else [next(rest) for _ in self.rates],
        )


def _bundles(step: Step) -> list[list[int]]:
    """The parameters that step, those together that the optimizer treats alike."""
    alike: dict[Any, list[int]] = {}
    for i, (w, settings, moments) in enumerate(
        zip(step.weights, step.groups, step.moments, strict=True)
    ):
        if settings is None or not step.stepped[i]:
            continue
        count: Any = moments.get(COUNT)
        if isinstance(count, Tensor):
            # A number on a device isn't read: that parameter goes by itself.
            count = float(count) if count.device.type == "cpu" else f"parameter {i}"
        key = (settings["index"], w.dtype, w.device, count, *_differentiable(moments))
        alike.setdefault(key, []).append(i)
    return list(alike.values())


class StepMap:
    """The joint step of all of a level's parameters at one point: its value and derivatives.

    Optimizers work element by element. Parameters that one treats alike are therefore taken as one
    flat tensor: a network has dozens of small ones, and a step dozens of operations.

    Args:
        optimizer: what is known of the level's.
        step: where: weights, moments, settings, and which parameters had a gradient.
        gradients: per parameter, before clipping; what is None or didn't step stays where it is.
        clip: largest norm that the gradient is scaled down to; 0 for no clipping.
        rates: learning rates per parameter group in place of the settings'.
        hold: take second moments for constants.
    """

    def __init__(
        self,
        optimizer: type[Optimizer],
        step: Step,
        gradients: Sequence[Tensor | None],
        clip: float = 0.0,
        rates: Sequence[Tensor] | None = None,
        hold: bool = False,
    ) -> None:
        self.optimizer, self.step, self.clip = optimizer, step, clip
        self._hold = constant if hold else free
        self.weights = [w.detach() for w in step.weights]
        self.gradients = [
            torch.zeros_like(w) if g is None else g.detach()
            for g, w in zip(gradients, step.weights, strict=True)
        ]
        self.moments = [{k: v.detach() for k, v in m.items()} for m in step.moments]
        self.rates = None if rates is None else [rate.detach() for rate in rates]
        self._bundles = _bundles(step)
        self._graph: tuple[_Flat, _Flat] | None = None

    def zero_moments(self) -> list[Moments]:
        """Zero cotangents of the moments before the step."""
        return [{k: torch.zeros_like(m[k]) for k in _differentiable(m)} for m in self.moments]

    def value(self) -> tuple[list[Tensor], list[Moments]]:
        """Weights and moments after the step."""
        before = self._flat(self.weights, self.gradients, self.moments, self.rates)
        after = self._apply(before)
        counts = [{k: v for k, v in m.items() if k == COUNT} for m in self.moments]
        return self._spread(after, self.weights, self.moments, counts)

    def pull_back(
        self, weights: Sequence[Tensor], moments: Sequence[Moments]
    ) -> tuple[list[Tensor], list[Tensor], list[Moments], list[Tensor]]:
        """The transposed derivative.

        Args:
            weights: cotangents of the weights after the step.
            moments: those of the moments, by name; what is missing is zero.

        Returns:
            cotangents of the weights before the step, the gradients, the moments before the step,
            and the rates.
        """
        if self._graph is None:
            self._graph = self._record()
        before, after = self._graph
        chosen, bars = [], []
        for n, places in enumerate(self._bundles):
            chosen.append(after.weights[n])
            bars.append(flatten([weights[i] for i in places]))
            for key in _differentiable(after.moments[n]):
                known = [moments[i].get(key) for i in places]
                value = after.moments[n][key]
                if value.requires_grad and any(bar is not None for bar in known):
                    chosen.append(value)
                    bars.append(flatten(filled(known, [self.weights[i] for i in places])))
        leaves = before.leaves()
        before_bars: Sequence[Tensor | None] = [None] * len(leaves)
        if chosen:
            before_bars = torch.autograd.grad(
                chosen, leaves, grad_outputs=bars, allow_unused=True, retain_graph=True
            )
        flat = before.like(filled(before_bars, leaves))
        # Parameters that stay where they are pass their cotangents on.
        same = [
            {k: m.get(k, torch.zeros_like(v)) for k, v in known.items() if k != COUNT}
            for m, known in zip(moments, self.moments, strict=True)
        ]
        weights_bar, moments_bar = self._spread(flat, weights, same)
        gradients_bar = [torch.zeros_like(g) for g in self.gradients]
        self._unflatten(flat.gradients, gradients_bar)
        return weights_bar, gradients_bar, moments_bar, list(flat.rates or ())

    def push_forward(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Moments],
        rates: Sequence[Tensor] | None,
    ) -> tuple[list[Tensor], list[Moments]]:
        """The derivative along tangents of weights, gradients, moments (missing: 0) and rates."""
        tangents = [
            {k: t[k] if k in t else torch.zeros_like(v) if k != COUNT else v for k, v in m.items()}
            for m, t in zip(self.moments, moments, strict=True)
        ]
        along = self._flat(weights, gradients, tangents, rates).leaves()
        before = self._flat(
            self.weights, self.gradients, self.moments, None if rates is None else self.rates
        )
        with dual_level():
            duals = [
                forward_ad.make_dual(value, t)
                for value, t in zip(before.leaves(), along, strict=True)
            ]
            # Without tangents of theirs the rates are constants.
            after = self._apply(before.like(duals), self.rates if rates is None else None)

            def tangent(value: Tensor) -> Tensor:
                carried = forward_ad.unpack_dual(value).tangent
                return torch.zeros_like(value) if carried is None else carried

            flat = _Flat(
                [tangent(w) for w in after.weights],
                [],
                [{k: tangent(m[k]) for k in _differentiable(m)} for m in after.moments],
            )
        same = [{k: v for k, v in m.items() if k != COUNT} for m in tangents]
        return self._spread(flat, weights, same)

    def _record(self) -> tuple[_Flat, _Flat]:
        before = self._flat(self.weights, self.gradients, self.moments, self.rates)
        if before.rates is not None:
            before.rates = [rate.clone() for rate in before.rates]
        for leaf in before.leaves():
            leaf.requires_grad_()
        with torch.enable_grad():
            return before, self._apply(before)

    def _apply(self, before: _Flat, rates: Sequence[Tensor] | None = None) -> _Flat:
        rates = before.rates if rates is None else rates
        used = before.gradients
        if self.clip > 0.0:
            # As torch.nn.utils.clip_grad_norm_ does it.
            square = sum((g * g).sum() for g in used)
            factor = (self.clip / (safe_sqrt(torch.as_tensor(square)) + 1e-6)).clamp(max=1.0)
            used = [g * factor for g in used]
        weights, moments = [], []
        for places, w, g, m in zip(
            self._bundles, before.weights, used, before.moments, strict=True
        ):
            settings = self.step.groups[places[0]]
            assert settings is not None
            if rates is not None:
                settings = {**settings, "lr": rates[settings["index"]]}
            after, moments_after = self.optimizer.step(w, g, m, settings, self._hold)
            weights.append(after)
            moments.append(moments_after)
        return _Flat(weights, [], moments)

    def _flat(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Moments],
        rates: Sequence[Tensor] | None,
    ) -> _Flat:
        """Of each bundle, copies in a row."""
        flat = _Flat([], [], [], None if rates is None else list(rates))
        for places in self._bundles:
            flat.weights.append(flatten([weights[i] for i in places]))
            flat.gradients.append(flatten([gradients[i] for i in places]))
            first = moments[places[0]]
            joined = {k: flatten([moments[i][k] for i in places]) for k in _differentiable(first)}
            if COUNT in first:
                joined[COUNT] = first[COUNT]
            flat.moments.append(joined)
        return flat

    def _spread(
        self,
        flat: _Flat,
        weights: Sequence[Tensor],
        moments: Sequence[Moments],
        counts: Sequence[Moments] | None = None,
    ) -> tuple[list[Tensor], list[Moments]]:
        """Per parameter again; ``weights`` and ``moments`` for those that are in no bundle."""
        result, spread = list(weights), [dict(m) for m in moments]
        self._unflatten(flat.weights, result)
        for places, joined in zip(self._bundles, flat.moments, strict=True):
            like = [self.weights[i] for i in places]
            for i in places:
                spread[i] = {COUNT: joined[COUNT]} if counts and COUNT in joined else {}
            for key in _differentiable(joined):
                for i, part in zip(places, unflatten(joined[key], like), strict=True):
                    spread[i][key] = part
        return result, spread

    def _unflatten(self, flat: Sequence[Tensor], into: list[Tensor]) -> None:
        for places, joined in zip(self._bundles, flat, strict=True):
            like = [self.weights[i] for i in places]
            for i, part in zip(places, unflatten(joined, like), strict=True):
                into[i] = part


def _differentiable(moments: Moments) -> list[str]:
    return sorted(key for key in moments if key != COUNT)
