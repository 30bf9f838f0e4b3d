"""Unrolled differentiation: back through the level's last steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from mlseg import parallel
from mlseg.config import Settings
from mlseg.errors import UserError
from mlseg.hypergradients.base import Diagnostics, Differentiating
from mlseg.hypergradients.checkpoints import backwards, check_replays
from mlseg.hypergradients.gradient_hooks import applied, transposed
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.optimizers import Moments, optimizer_of
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.replay import Replay
from mlseg.hypergradients.second_order.differences import (
    central,
    refuse_above,
    relative_error,
)
from mlseg.hypergradients.second_order.fused import SecondOrder
from mlseg.hypergradients.second_order.products import Mode, directional, pull_through
from mlseg.hypergradients.trajectory import Keeps, Step
from mlseg.hypergradients.vectors import accumulate


class FewStates(Settings):
    """To store few of the states that steps started from.

    Attributes:
        states: how many at a time, the working one apart.
    """

    states: PositiveInt


class LastGraphs(Settings):
    """To keep the graphs of some steps.

    Attributes:
        graphs: how many, the last ones before the level above steps.
    """

    graphs: PositiveInt


@register("unrolled")
class Unrolled(Differentiating):
    """The exact derivative through the last ``T`` steps of the level's optimizer.

    A step maps weights and moments to the next ones, ``z' = U(z, g(w, s))``. From the last to the
    first,

    .. math::
        \\bar z \\leftarrow \\left(\\frac{\\partial U}{\\partial z}
            + \\frac{\\partial U}{\\partial g} \\frac{\\partial g}{\\partial z}\\right)^T \\bar z,
        \\qquad
        \\bar s \\leftarrow \\bar s + \\left(\\frac{\\partial U}{\\partial g}
            \\frac{\\partial g}{\\partial s}\\right)^T \\bar z

    starting from the incoming vector. Earlier steps are left out (truncation), as if the weights
    then didn't depend on ``s``. The maps ``U`` are those of SGD (momentum, dampening, Nesterov),
    Adam, AdamW, AMSGrad, RMSprop and Adagrad, with gradient clipping; where the learning rate
    depends on ``s`` (:meth:`mlseg.Problem.learning_rates`), so does ``U``.

    A level records its steps as it takes them: weights, moments, batches, random states, learning
    rates. With ``store: weights`` each is evaluated again at its own weights, one at a time, from
    the last to the first: the graphs of no two steps exist together. ``store: graphs`` keeps each
    step's graph from training itself, so that nothing is evaluated twice; ``store: {graphs: k}``
    keeps those of the last ``k`` steps, and the others are evaluated again. ``store: {states: c}``
    is for long windows: weights and moments of ``c`` steps at a time, from which the level's own
    optimizer takes the others again, bit for bit; batches are drawn again from their places in the
    loader where it knows them (``BatchLoader``), and kept where not. The answer is the same.

    ``mode: difference`` takes a step's product by a central difference of gradients. One product
    per hop, of a step that changes from hop to hop, is taken exactly as well, and more than
    ``tolerance`` between the two ends the run: a difference sees the kinks of a ReLU that it steps
    over, which no exact derivative has.

    Cost per hop: per step 1 forward, 1 backward pass and 1 Hessian-vector product, which gives the
    share of ``s`` as well; with ``store: graphs`` the product alone, and a slower training step.
    Memory: ``T`` copies of weights and moments and the graph of one gradient; of ``T`` gradients
    with ``store: graphs``. ``mode: forward_over_reverse`` needs neither second graph. With ``store:
    {states: c}`` ``c + 1`` copies of weights and moments, and with the smallest ``r``
    for which ``C(c + r, c) >= T`` further ``(r - 1) T - C(c + r, c + 1) + 1`` steps (1000 steps, 20
    states: 1748).
    ``mode: difference``: per step 2 evaluations, and the exact product.

    A level with levels of its own below counts what their hypergradient added to its gradient as
    constant. Its weights and gradients are those that training visited, so that whatever else
    changed them (``param_callback``, ``grad_callback``) is taken as it was, though it isn't
    differentiated.

    Collectives per hop, in several processes: ``2 T``; ``T`` where training keeps the gradients.

    Source: Maclaurin, Duvenaud, Adams: Gradient-based hyperparameter optimization through
    reversible learning, ICML 2015; Franceschi et al.: Forward and reverse gradient-based
    hyperparameter optimization, ICML 2017, section 3.1; truncation: Shaban et al.: Truncated
    back-propagation for bilevel optimization, AISTATS 2019.

    Checkpoints: Griewank and Walther: Algorithm 799: revolve, ACM Transactions on Mathematical
    Software 26, 2000.

    Diagnostics: ``steps`` differentiated; ``difference_error`` of the product that was checked.

    Attributes:
        steps: ``T``; None: the level's ``unroll_steps``.
        store: what training keeps of each step, see above.
        optimizer_state: ``carried``: moments are those that the first of the steps started from.
            ``fresh``: the derivative is that of an optimizer that starts anew at the first step,
            along the same weights and gradients.
        mode: order of differentiation, see :data:`mlseg.hypergradients.second_order.products.Mode`,
            or ``difference``.
        epsilon: step of ``mode: difference``, relative to the norm of the level's parameters.
        tolerance: largest error of a difference, relative to the exact product.
        backend: ``mlseg``, or ``higher``, which takes the steps again from the first on and keeps
            all their graphs: a cross-check, and for optimizers that only it can differentiate
            (Adadelta, Adamax, ASGD, Rprop).
    """

    steps: PositiveInt | None = None
    store: Literal["weights", "graphs"] | LastGraphs | FewStates = "weights"
    optimizer_state: Literal["carried", "fresh"] = "carried"
    mode: Mode | Literal["difference"] = "double_backward"
    epsilon: PositiveFloat = 1e-3
    tolerance: PositiveFloat = 0.05
    backend: Literal["mlseg", "higher"] = "mlseg"

    through_interface: ClassVar[bool] = False  # each step has a graph of its own behind its loss

    best_response = "the last steps, as they were taken"
    in_several = True
    situation = (
        "a few inner steps from a fresh or changing start (meta-learning, dataset distillation)"
    )
    because = "exact for what the level did, whether it has converged or not"
    cost = "T E + T H"
    cost_note = (
        "``store: graphs``: T H, and training steps that build graphs; ``{graphs: k}``: k of them; "
        "``{states: c}``: steps taken again; ``mode: difference``: (2 T + 1) E + 1 H"
    )
    memory = (
        "T weights and moments, graph of one gradient; ``graphs``: of T; ``{states: c}``: c + 1 of "
        "the former"
    )

    def keeps(self, level: Level) -> Keeps:
        """``T`` steps; gradients where they can't be had as the last graph's value."""
        gradient = (
            level.stepping.changes_its_gradient
            or self.optimizer_state == "fresh"
            or self.mode != "double_backward"
        )
        few = isinstance(self.store, FewStates)
        return Keeps(
            steps=self.steps or level.unroll_steps,
            moments=self.optimizer_state == "carried",
            gradient=gradient and self.backend == "mlseg" and not few,
            states=min(self.store.states, self.steps or level.unroll_steps)
            if isinstance(self.store, FewStates)
            else 0,
            graphs=self._graphs(level),
            second_order=self.formulas(),
        )

    def _graphs(self, level: Level) -> int:
        """Of how many steps training keeps the graphs."""
        if isinstance(self.store, LastGraphs):
            return self.store.graphs
        return (self.steps or level.unroll_steps) if self.store == "graphs" else 0

    def formulas(self) -> SecondOrder:
        """``second_order`` where a graph is differentiated here."""
        ours = self.backend == "mlseg" and self.mode == "double_backward"
        return self.second_order if ours else "torch"

    def carries_hooks(self) -> bool:
        """It does."""
        return True

    def check(self, level: Level) -> None:
        """Refuse optimizers and combinations of settings that can't be differentiated."""
        if self.backend == "higher":
            from mlseg.hypergradients import higher_backend

            higher_backend.check_differentiable(level, self.store != "weights")
            if self.mode == "difference":
                raise UserError(
                    f"problem {level.name!r}: the backend higher takes no differences: set backend "
                    "to mlseg, or mode to double_backward"
                )
            return
        optimizer_of(level)
        if isinstance(self.store, FewStates):
            self._check_states(level)
            return
        if self.store != "weights" and level.precision == "bf16":
            raise UserError(
                f"problem {level.name!r}: store: graphs would keep graphs in bfloat16, too coarse "
                "for second derivatives; set store to weights, or precision to fp32"
            )
        if self.store != "weights" and self.mode != "double_backward":
            raise UserError(
                f"problem {level.name!r}: mode {self.mode} keeps no graphs; set store to weights, "
                "or mode to double_backward"
            )

    def _check_states(self, level: Level) -> None:
        """Refuse windows that aren't one after the other, and steps that can't be taken again."""
        stepping = level.stepping
        check_replays(level.name, stepping.hooks, stepping.below, level.precision)
        if parallel.several():
            raise UserError(
                f"problem {level.name!r}: store: states takes steps again, which "
                f"{parallel.size()} processes don't share; set the hypergradient's store to weights"
            )
        if (self.steps or 1) > level.unroll_steps:
            raise UserError(
                f"problem {level.name!r}: store: states is for windows one after the other: the "
                f"hypergradient's steps {self.steps} are more than the level's unroll_steps "
                f"{level.unroll_steps}; set them to at most that, or store to weights"
            )
        if self.optimizer_state == "fresh":
            raise UserError(
                f"problem {level.name!r}: optimizer_state: fresh needs the gradients of all steps; "
                "set the hypergradient's store to weights"
            )

    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """See the class."""
        higher = self.backend == "higher"
        replay = Replay(hop, self.steps or hop.level.unroll_steps, together=higher)
        if higher:
            from mlseg.hypergradients import higher_backend

            fresh = self.optimizer_state == "fresh"
            through = higher_backend.backward_through(replay, vector, fresh)
            return through, {"steps": len(replay.steps)}
        fresh_moments = self._fresh_moments(replay) if self.optimizer_state == "fresh" else []
        checked = hop.level.count // hop.level.unroll_steps % len(replay.steps)
        error: Tensor | None = None
        weights_bar = hop.spread(vector)
        moments_bar: list[Moments] = [{} for _ in weights_bar]
        total: list[Tensor | None] = [None] * len(hop.inputs)
        with hop.level.again.untraced():
            for index, step in backwards(replay):
                moments = fresh_moments[index] if fresh_moments else step.moments
                back = _Back(replay, step, moments, self)
                back.is_checked = self.mode == "difference" and index == checked
                weights_bar, moments_bar = back(weights_bar, moments_bar, total, index == 0)
                error = back.error if back.is_checked else error
        if error is None:
            return total, {"steps": len(replay.steps)}
        refuse_above(self.tolerance, error, hop.level, "mode to double_backward")
        return total, {"steps": len(replay.steps), "difference_error": error}

    def _fresh_moments(self, replay: Replay) -> list[list[Moments]]:
        """Per step the moments of an optimizer that starts anew at the first."""
        moments: list[Moments] = [{} for _ in replay.parameters]
        before = []
        for step in replay.steps:
            before.append(moments)
            _, moments = replay.map(step, step.gradient, moments=moments).value()
        return before


class _Back:
    """One step backwards."""

    def __init__(
        self, replay: Replay, step: Step, moments: list[Moments], method: Unrolled
    ) -> None:
        self.replay, self.step, self.moments, self.method = replay, step, moments, method
        self.is_checked = False  # whether a difference is held against an exact product
        self.error: Tensor | None = None

    def __call__(
        self,
        weights_bar: list[Tensor],
        moments_bar: list[Moments],
        total: list[Tensor | None],
        first: bool,
    ) -> tuple[list[Tensor], list[Moments]]:
        """Cotangents before the step; those of the inputs are added to ``total``."""
        replay, step, inputs = self.replay, self.step, self.replay.hop.inputs
        with replay.at(step.weights):
            kept = len(step.graphs) == len(step.seen)  # not where a resumed run lacks some
            graphs: list[Sequence[Tensor | None]] = list(step.graphs) if kept else []
            leaves = step.leaves if kept else replay.parameters
            losses = replay.losses(step)
            mode = self.method.mode
            if not step.gradient and (mode != "double_backward" or len(losses) > 1):
                step.gradient = self._as_training_had_it()
            if not graphs and not step.gradient:
                (loss,) = losses
                graphs = [torch.autograd.grad(loss(), leaves, create_graph=True, allow_unused=True)]
            values = step.gradient or _detached(applied(self._shared(graphs[0]), replay.parameters))
            taken = replay.map(step, values, moments=self.moments)
            before, along, moments_before, rates_bar = taken.pull_back(weights_bar, moments_bar)
            # The weights that the first step started from depend on nothing any more.
            targets = [*([] if first else leaves), *inputs]
            # Of each process's share; averaged at the end of the step.
            back: list[Any] = [None] * len(leaves) if parallel.several() else before
            for index, loss in enumerate(losses):
                graph = graphs[index] if graphs else None
                replay.hop.products += mode != "difference" or self.is_checked
                towards = self._before_hooks(along, loss, graph) if replay.hooked else along
                if graph is not None:
                    share = _through_kept(replay, graph, towards, targets, kept)
                elif mode == "difference":
                    share = self._by_difference(loss, towards, targets)
                else:
                    share = directional(
                        loss, replay.level, replay.parameters, towards, targets, mode
                    )
                if not first:
                    accumulate(back, share[: len(leaves)])
                accumulate(total, share[len(targets) - len(inputs) :])
            if back is not before and not first:
                accumulate(before, parallel.average_some(back, replay.parameters))
        if rates_bar and replay.rates is not None:
            accumulate(total, _by_rates(replay.rates, rates_bar, inputs))
        return before, moments_before

    def _as_training_had_it(self) -> list[Tensor | None]:
        """The step's gradient, by torch's own formulas."""
        hop = self.replay.hop
        kept, hop.second_order = hop.second_order, "torch"
        try:
            return self.replay.gradient(self.step)
        finally:
            hop.second_order = kept

    def _by_difference(
        self, loss: Callable[[], Tensor], along: list[Tensor], targets: list[Tensor]
    ) -> Sequence[Tensor | None]:
        replay = self.replay
        share = central(loss, replay.parameters, along, targets, self.method.epsilon)
        if self.is_checked:
            replay.hop.second_order = self.method.second_order
            exact = directional(
                loss, replay.level, replay.parameters, along, targets, "double_backward"
            )
            replay.hop.second_order = self.method.formulas()
            error = relative_error(share, exact, targets)
            self.error = error if self.error is None else torch.maximum(self.error, error)
        return share

    def _before_hooks(
        self, along: list[Tensor], loss: Callable[[], Tensor], graph: Sequence[Tensor | None] | None
    ) -> list[Tensor]:
        """What the cotangent of the gradient is before the level's hooks change it."""
        parameters = self.replay.parameters
        if graph is None:
            graph = torch.autograd.grad(loss(), parameters, allow_unused=True)
        return transposed(along, self._shared(graph), parameters)

    def _shared(self, graph: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient itself, of all processes' shares."""
        return parallel.average_some(_detached(graph), self.replay.parameters)


def _detached(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]


def _through_kept(
    replay: Replay,
    gradient: Sequence[Tensor | None],
    along: Sequence[Tensor],
    targets: Sequence[Tensor],
    kept: bool,
) -> Sequence[Tensor | None]:
    try:
        # A kept graph may be wanted by another upper level.
        return pull_through(gradient, along, targets, retain_graph=kept)
    except RuntimeError as error:
        if kept and "modified by an inplace operation" in str(error):
            raise UserError(
                f"problem {replay.level.name!r}: another problem that its loss depends on has "
                "stepped since, so that its graphs of earlier steps are void; set the "
                "hypergradient's store to weights, or its steps to 1"
            ) from error
        raise


def _by_rates(
    rates: Sequence[Tensor], bars: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    pairs = [(r, bar) for r, bar in zip(rates, bars, strict=True) if r.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, along = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, grad_outputs=along, allow_unused=True, retain_graph=True
    )
