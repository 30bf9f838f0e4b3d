"""Optimizers' steps as differentiable maps, per parameter.

A step takes a parameter ``w``, its gradient ``g`` and the optimizer's moments to the next ``w`` and
moments. These are the maps of ``torch.optim``, operation for operation, but out of place and safe
where a second moment is zero: the derivative of the square root is infinite there, that of the
second moment by the gradient zero, and their product, which torch would give as NaN, is taken to be
zero.

Sources: the update rules in the documentation of ``torch.optim``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlseg.errors import UserError
from mlseg.hypergradients.second_order import dual_level
from mlseg.hypergradients.trajectory import Step
from mlseg.hypergradients.vectors import filled, flatten, unflatten

if TYPE_CHECKING:
    from mlseg.problems.base import Problem

Moments = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, Moments, Mapping[str, Any], bool], tuple[Tensor, Moments]]
"""``rule(w, g, moments, settings, hold)``: the next ``w`` and moments, all in the shape of ``w``.

``settings`` are those of ``w``'s group. ``hold`` takes the second moments for constants.
"""

COUNT = "step"
"""The moment that counts steps; nothing is differentiated by it."""


def rule_of(level: Problem) -> Rule:
    """The map of a level's optimizer.

    Raises:
        UserError: there is none for it, or the level steps in a way of its own.
    """
    optimizer = level.optimizer
    what = f"the step of {type(optimizer).__name__}"
    if level.is_implemented("custom_optimizer_step"):
        what = "a custom_optimizer_step"
    else:
        for cls, rule in _RULES:
            if isinstance(optimizer, cls):
                return rule
    raise UserError(
        f"problem {level.name!r}: {what} can't be differentiated, only that of SGD, Adam, AdamW, "
        "RMSprop and Adagrad; take one of these, a method that doesn't need it (cg, identity), or "
        "unrolled with backend: higher"
    )


def sgd(w: Tensor, g: Tensor, moments: Moments, settings: Mapping[str, Any], hold: bool) -> Any:
    """``torch.optim.SGD``: momentum, dampening, Nesterov, L2 weight decay."""
    g = _descent(w, g, settings)
    after: Moments = {}
    if settings["momentum"]:
        buffer = g
        if "momentum_buffer" in moments:
            fresh = 1.0 - settings["dampening"]
            buffer = settings["momentum"] * moments["momentum_buffer"] + fresh * g
        after["momentum_buffer"] = buffer
        g = g + settings["momentum"] * buffer if settings["nesterov"] else buffer
    return w - settings["lr"] * g, after


def adam(w: Tensor, g: Tensor, moments: Moments, settings: Mapping[str, Any], hold: bool) -> Any:
    """``torch.optim.Adam`` and ``AdamW``, with AMSGrad."""
    lr, (beta1, beta2) = settings["lr"], settings["betas"]
    if settings.get("decoupled_weight_decay"):
        g = -g if settings.get("maximize") else g
        w = w * (1.0 - lr * settings["weight_decay"])
    else:
        g = _descent(w, g, settings)
    count = _count(moments) + 1.0
    zero = torch.zeros_like(w)
    first = beta1 * moments.get("exp_avg", zero) + (1.0 - beta1) * g
    second = _held(beta2 * moments.get("exp_avg_sq", zero) + (1.0 - beta2) * g * g, hold)
    after = {COUNT: count, "exp_avg": first, "exp_avg_sq": second}
    largest = second
    if settings["amsgrad"]:
        largest = torch.maximum(moments.get("max_exp_avg_sq", zero), second)
        after["max_exp_avg_sq"] = largest
    # In double precision, as in torch: 1 - beta^t cancels in single precision.
    correction1, correction2 = 1.0 - beta1**count, 1.0 - beta2**count
    denominator = safe_sqrt(largest) / correction2.sqrt().to(w.dtype) + settings["eps"]
    return w - lr / correction1.to(w.dtype) * first / denominator, after


def rmsprop(w: Tensor, g: Tensor, moments: Moments, settings: Mapping[str, Any], hold: bool) -> Any:
    """``torch.optim.RMSprop``: centred or not, momentum, L2 weight decay."""
    g = _descent(w, g, settings)
    alpha, zero = settings["alpha"], torch.zeros_like(w)
    second = _held(alpha * moments.get("square_avg", zero) + (1.0 - alpha) * g * g, hold)
    after: Moments = {COUNT: _count(moments) + 1.0, "square_avg": second}
    spread = second
    if settings["centered"]:
        mean = _held(alpha * moments.get("grad_avg", zero) + (1.0 - alpha) * g, hold)
        after["grad_avg"] = mean
        spread = second - mean * mean
    direction = g / (safe_sqrt(spread) + settings["eps"])
    if settings["momentum"]:
        direction = settings["momentum"] * moments.get("momentum_buffer", zero) + direction
        after["momentum_buffer"] = direction
    return w - settings["lr"] * direction, after


def adagrad(w: Tensor, g: Tensor, moments: Moments, settings: Mapping[str, Any], hold: bool) -> Any:
    """``torch.optim.Adagrad``: decay of the rate, initial accumulator, L2 weight decay."""
    g = _descent(w, g, settings)
    count = _count(moments) + 1.0
    start = torch.full_like(w, settings["initial_accumulator_value"])
    total = _held(moments.get("sum", start) + g * g, hold)
    rate = settings["lr"] / (1.0 + (count - 1.0) * settings["lr_decay"]).to(w.dtype)
    return w - rate * g / (safe_sqrt(total) + settings["eps"]), {COUNT: count, "sum": total}


_RULES: Sequence[tuple[type[torch.optim.Optimizer], Rule]] = (
    (torch.optim.SGD, sgd),
    (torch.optim.Adam, adam),  # AdamW derives from it
    (torch.optim.RMSprop, rmsprop),
    (torch.optim.Adagrad, adagrad),
)


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
    """The parameters that step, those together that a rule treats alike."""
    found: dict[Any, list[int]] = {}
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
        found.setdefault(key, []).append(i)
    return list(found.values())


class StepMap:
    """The joint step of all of a level's parameters at one point: its value and derivatives.

    Rules work element by element. Parameters that a rule treats alike are therefore taken as one
    flat tensor: a network has dozens of small ones, and a rule dozens of operations.

    Args:
        rule: of the level's optimizer.
        step: where: weights, moments, settings, and which parameters had a gradient.
        gradients: per parameter, before clipping; what is None or didn't step stays where it is.
        clip: largest norm that the gradient is scaled down to; 0 for no clipping.
        rates: learning rates per parameter group in place of the settings'.
        hold: take second moments for constants.
    """

    def __init__(
        self,
        rule: Rule,
        step: Step,
        gradients: Sequence[Tensor | None],
        clip: float = 0.0,
        rates: Sequence[Tensor] | None = None,
        hold: bool = False,
    ) -> None:
        self.rule, self.step, self.clip, self.hold = rule, step, clip, hold
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
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if chosen:
            found = torch.autograd.grad(
                chosen, leaves, grad_outputs=bars, allow_unused=True, retain_graph=True
            )
        flat = before.like(filled(found, leaves))
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
                found = forward_ad.unpack_dual(value).tangent
                return torch.zeros_like(value) if found is None else found

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
            after, moments_after = self.rule(w, g, m, settings, self.hold)
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


def _held(second: Tensor, hold: bool) -> Tensor:
    return second.detach() if hold else second


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0 (and 0, with derivative 0, below: rounding's doing)."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _descent(w: Tensor, g: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The gradient of what is descended: of the negated loss if maximised, plus L2 decay."""
    g = -g if settings.get("maximize") else g
    return g + settings["weight_decay"] * w if settings["weight_decay"] else g


def _count(moments: Moments) -> Tensor:
    """Steps so far, on the host where the optimizer counts there: copying it would wait."""
    return torch.as_tensor(moments.get(COUNT, 0.0)).to(torch.float64)
