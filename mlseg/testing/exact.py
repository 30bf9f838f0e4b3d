"""Derivatives of a program's upper losses, exact, in float64.

Every level below becomes a function of the levels above it: its minimum (:meth:`Truth.implicit`),
or where its steps have led it (:meth:`Truth.descent`, :meth:`Taken.one_step`,
:meth:`Taken.unrolled`). The upper loss is then differentiated through all of them by torch's
automatic differentiation, whatever the graph.

Nothing here may use the library's hypergradients, its second-order code or its maps of optimizers:
it is what they are tested against, and an error that both had would not be seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlseg.testing import updates
from mlseg.testing.programs import Graph, Network, Parameters, Recorded, Step, parameters


class Own(Protocol):
    """A level's loss as a function of its own parameters; at steps it has taken, their mean."""

    def __call__(self, w: Parameters, steps: Sequence[Step] = ()) -> Tensor: ...


Respond = Callable[[str, Own], Parameters]
"""What a level becomes, by its name and loss, differentiable by all that the loss depends on."""


@dataclass
class Truth:
    """A program at a point.

    Attributes:
        values: where the levels are, by level.
        batches: what their losses are evaluated on.
        draws: torch's random states there, for losses that are random.
    """

    graph: Graph
    modules: Mapping[str, nn.Module]
    values: dict[str, Parameters]
    batches: Mapping[str, Any]
    draws: Mapping[str, Tensor] = field(default_factory=dict)

    def loss(self, name: str, others: Mapping[str, Parameters], step: Step | None = None) -> Tensor:
        """A level's loss with other parameters than ``values``, on its batch or that of a step."""
        values = {**self.values, **others}
        nets = {n: Network(module, values[n]) for n, module in self.modules.items()}
        draw = self.draws.get(name) if step is None else step.random
        present = torch.get_rng_state()
        if draw is not None:
            torch.set_rng_state(draw)
        try:
            return self.graph.losses[name](nets, self.batches[name] if step is None else step.batch)
        finally:
            torch.set_rng_state(present)

    def moved(self, values: Mapping[str, Parameters]) -> Truth:
        """With some of the levels elsewhere."""
        everyone = {**self.values, **values}
        return Truth(self.graph, self.modules, everyone, self.batches, self.draws)

    def through(self, upper: str, respond: Respond) -> Parameters:
        """The gradient of ``upper``'s loss, direct and through all levels that respond."""
        top = _leaves(self.values[upper])
        moved: dict[str, Parameters] = {}
        for name, sources in self.graph.hops(upper).items():
            seen = {s: top if s == upper else moved[s] for s in sources}
            moved[name] = respond(name, self._own(name, seen))
        first = {n: m for n, m in moved.items() if upper in self.graph.l2u[n]}
        return gradient(self.loss(upper, {**first, upper: top}), top)

    def implicit(self, upper: str, damping: float = 0.0) -> Parameters:
        """The levels below are taken for solved, with ``damping`` on their Hessians' diagonals.

        At a minimum a step of Newton's method changes nothing, but depends on the levels above as
        the minimum does, by ``-(d_w d_w f)^-1 d_s d_w f``; elsewhere it is made to change nothing.
        """

        def newton(name: str, own: Own) -> Parameters:
            w = self.values[name]
            hessian = self.hessian(name)
            hessian.diagonal().add_(damping)
            step = torch.linalg.solve(hessian, flatten(_slope(own, _leaves(w))))
            return unflatten(flatten(w) - (step - step.detach()), w)

        return self.through(upper, newton)

    def descent(self, upper: str, rate: float, steps: int = 1) -> Parameters:
        """The levels below have yet to take ``steps`` of descent from where they are."""

        def descend(name: str, own: Own) -> Parameters:
            w = _leaves(self.values[name])
            for _ in range(steps):
                slope = _slope(own, w)
                w = {n: w[n] - rate * slope[n] for n in w}
            return w

        return self.through(upper, descend)

    def hessian(self, name: str) -> Tensor:
        """(N, N) of a level's loss by its own parameters, in the order of :func:`flatten`."""
        own = self._own(name, {})
        w = self.values[name]
        return torch.func.hessian(lambda flat: own(unflatten(flat, w)))(flatten(w))

    def slope(self, name: str) -> Tensor:
        """(N,) of a level's loss by its own parameters."""
        w = _leaves(self.values[name])
        return flatten(gradient(self.loss(name, {name: w}), w))

    def minimum(self, name: str) -> Parameters:
        """Where a level's loss is smallest, near where it is, to float64's precision.

        By L-BFGS and then Newton's method, as long as its steps bring the gradient down.
        """
        leaves = _leaves(self.values[name])
        optimizer = torch.optim.LBFGS(
            list(leaves.values()),
            max_iter=500,
            history_size=50,
            tolerance_grad=1e-10,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(name, {name: leaves})
            loss.backward(inputs=list(leaves.values()))
            return loss

        optimizer.step(closure)
        at = self.moved({name: {n: leaf.detach() for n, leaf in leaves.items()}})
        for _ in range(20):
            point, slope = at.values[name], at.slope(name)
            step = torch.linalg.solve(at.hessian(name), slope)
            further = at.moved({name: unflatten(flatten(point) - step, point)})
            if not further.slope(name).norm() < slope.norm():
                break
            at = further
        return at.values[name]

    def _own(self, name: str, seen: Mapping[str, Parameters]) -> Own:
        def own(w: Parameters, steps: Sequence[Step] = ()) -> Tensor:
            if not steps:
                return self.loss(name, {**seen, name: w})
            return torch.stack([self.loss(name, {**seen, name: w}, s) for s in steps]).mean()

        return own


class Taken(Truth):
    """The steps that an engine's levels have taken, as functions of the levels above.

    Args:
        graph: of the engine, or a part of it.
        levels: all of the engine, by name, after an iteration in which ``upper`` stepped.
        upper: whose loss is differentiated.
    """

    def __init__(self, graph: Graph, levels: Mapping[str, Recorded], upper: str) -> None:
        self.levels = levels
        self.upper = upper
        order = list(graph.losses)
        values = {}
        for name, level in levels.items():
            # Losses saw ``upper`` as it was before its own step, and what lies above it as well.
            before = order.index(name) >= order.index(upper)
            values[name] = level.notes[-1].values if before else parameters(level.module)
        super().__init__(
            graph,
            {name: level.module for name, level in levels.items()},
            values,
            {name: level.cur_batch for name, level in levels.items()},
            {name: level.notes[-1].random for name, level in levels.items()},
        )

    def one_step(self, point: str = "before", update: updates.Update = updates.sgd) -> Parameters:
        """Through the last step of each level.

        Args:
            point: where the lower losses' gradients are differentiated, before or after the step.
            update: of all levels' optimizers.
        """

        def step(name: str, own: Own) -> Parameters:
            level = self.levels[name]
            last, present = level.notes[-1], self.values[name]
            slope = _slope(own, _leaves(last.values if point == "before" else present))
            after = {}
            for index, (n, g) in enumerate(slope.items()):
                # What was stepped along, whatever hypergradient it had in it.
                used = g + (level.gradients[-1][index] - g).detach()
                after[n] = update(level.optimizer, last.optimizer, index, last.values[n], used)
                torch.testing.assert_close(after[n], present[n], rtol=1e-12, atol=1e-14)
            return after

        return self.through(self.upper, step)

    def unrolled(self, steps: int, accumulate: int = 1, clip: float = 0.0) -> Parameters:
        """Through the last ``steps`` of each level, by ``torch.optim``'s differentiable optimizers.

        Args:
            accumulate: batches of a step.
            clip: the norm that a step's gradient was clipped to; 0 for none.
        """

        def unroll(name: str, own: Own) -> Parameters:
            level = self.levels[name]
            taken = level.notes[-steps * accumulate :]
            named = {n: p for n, p in level.module.named_parameters() if p.requires_grad}
            moving = {n: taken[0].values[n].clone().requires_grad_().clone() for n in named}
            optimizer = _differentiable(level.optimizer, taken[0].optimizer, list(moving.values()))
            for start in range(0, len(taken), accumulate):
                w = {n: p.clone() for n, p in moving.items()}  # the step writes into its own
                loss = own(w, taken[start : start + accumulate])
                found = torch.autograd.grad(
                    loss, list(w.values()), create_graph=True, allow_unused=True
                )
                size = torch.stack([g.norm() for g in found if g is not None]).norm()
                factor = (clip / (size + 1e-6)).clamp(max=1.0) if clip else 1.0
                for p, g in zip(moving.values(), found, strict=True):
                    p.grad = None if g is None else factor * g
                optimizer.step()
            for n, p in named.items():  # of order 1: a few hundred operations in float64
                torch.testing.assert_close(moving[n], p, rtol=1e-10, atol=1e-11)
            return moving

        return self.through(self.upper, unroll)


def _differentiable(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], params: list[Tensor]
) -> torch.optim.Optimizer:
    """One of the same kind and in that state, whose steps autograd goes through."""
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k in optimizer.defaults}
    for key in ("fused", "decoupled_weight_decay"):
        settings.pop(key, None)
    settings |= {"differentiable": True, "foreach": None}
    made: torch.optim.Optimizer = type(optimizer)(params, **settings)
    groups = made.state_dict()["param_groups"]
    made.load_state_dict({**copy.deepcopy(dict(state)), "param_groups": groups})
    return made


def flatten(tensors: Any) -> Tensor:
    """All tensors of a mapping or a sequence in one vector."""
    given = tensors.values() if isinstance(tensors, Mapping) else tensors
    return torch.cat([value.flatten() for value in given])


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> Parameters:
    """The inverse of :func:`flatten`."""
    parts = flat.split([value.numel() for value in like.values()])
    return {name: p.view_as(like[name]) for name, p in zip(like, parts, strict=True)}


def distance(a: Any, b: Any) -> float:
    """Norm of the difference over the norm of ``b``; of a tensor, a mapping or a sequence each."""
    one, two = (t if isinstance(t, Tensor) else flatten(t) for t in (a, b))
    return float((one.double() - two).norm() / two.norm())


def gradient(loss: Tensor, point: Parameters) -> Parameters:
    """Of ``loss`` by leaves, zero where it doesn't depend on them."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in point.items()}
    found = torch.autograd.grad(loss, list(point.values()), materialize_grads=True)
    return dict(zip(point, found, strict=True))


def _slope(own: Own, w: Parameters) -> Parameters:
    found = torch.autograd.grad(own(w), list(w.values()), create_graph=True)
    return dict(zip(w, found, strict=True))


def _leaves(values: Mapping[str, Tensor]) -> Parameters:
    return {name: value.detach().clone().requires_grad_() for name, value in values.items()}
