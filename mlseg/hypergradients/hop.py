"""A hop: what a hypergradient method carries an outer gradient over.

The outer gradient of a multilevel program is carried down the levels one *hop* at a time. With
``v`` the outer loss's gradient with respect to a level's parameters ``w``, and ``s`` the variables
of other problems that the level's training loss ``l(w, s)`` depends on, a hop maps

    v  ->  (dw*/ds)^T v

with ``w*`` the level's best response. Methods differ in what they take for it: one or more steps of
the level's optimizer (:mod:`~mlseg.hypergradients.one_step`, ``unrolled``, ``forward``,
``evolution``), or the minimiser, by the implicit function theorem
(:mod:`~mlseg.hypergradients.implicit`, ``fixed_point``, ``penalty``).

A method sees a hop through :class:`Hop`: the level's parameters, the inputs of its loss, and the
loss itself, evaluated again with the randomness of the step. It never sees which problem graph the
hop belongs to, so that every method works at every place of every graph. Whatever a hop evaluates,
it takes all *other* levels as they are now: where a level between has stepped since this one did,
the hop is that of the present point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from mlseg import parallel
from mlseg.errors import UserError
from mlseg.hypergradients.gradient_hooks import change_something, hooked, transposed
from mlseg.hypergradients.level import Level, Source, Vector
from mlseg.hypergradients.second_order.fused import SecondOrder, formulas
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.vectors import filled
from mlseg.randomness import derived

Cotangents = Sequence[Tensor | None]
"""One tensor per element of ``Hop.inputs``; None for zero."""

Point = Literal["after_step", "before_step"]
"""Weights at which a level's loss is evaluated again: those it has now, or those that its last
step started from."""


class Hop:
    """One reverse hop, from a level to the problems that its last step's loss depended on.

    Args:
        level: whose best response is differentiated.
        sources: the problems whose parameters enter its loss.
        upper: name of the problem whose gradient is carried; hops of different uppers over the same
            level keep separate memories.

    Attributes:
        parameters: the level's parameters that the upper loss was differentiated by.
        inputs: what the loss is differentiated by in the end: fresh leaves in place of the
            interface's tensors, or else all the sources' parameters in a row.
        evaluations: evaluations of the level's loss so far, each with one backward pass.
        products: second derivatives along a direction so far: Hessian-vector products, mixed
            products, or both in one.
        second_order: by whose formulas the gradients of its evaluations are differentiated.
    """

    def __init__(self, level: Level, sources: Sequence[Source], upper: str = "") -> None:
        self.level = level
        self.sources = sources
        self.parameters: Vector = list(level.meta_trainable_parameters())
        self.evaluations = 0
        self.products = 0
        self.second_order: SecondOrder = "torch"
        self._upper = upper or "+".join(source.name for source in sources)
        self._interface = level.interface
        self._source_parameters = [list(s.trainable_parameters()) for s in sources]
        if self._interface is None:
            self.inputs: Vector = self._flatten_sources()
        else:
            # Full precision: gradients by a bfloat16 leaf would be rounded to it.
            self.inputs = [_full(z.detach()).requires_grad_() for z in self._interface.tensors]

    def without_interface(self) -> Hop:
        """The same hop with the sources' parameters as inputs; frees the interface's graph."""
        self.level.interface = None
        return Hop(self.level, self.sources, self._upper)

    # ------------------------------------------------------------------ evaluations

    @contextmanager
    def evaluation(self, whole: bool = False) -> Iterator[Callable[[], Tensor]]:
        """Give a function that evaluates the step's loss again, leaving no trace.

        Each call starts from the random state and the buffers that the step began with (from the
        present statistics of BatchNorm, unless the step's loss reads them). The generators and
        every buffer of every problem are put back at the end.

        Args:
            whole: the whole loss, for second derivatives by the level's own parameters; else the
                part of it that depends on ``inputs`` is enough.
        """
        interface, again = self._interface, self.level.again

        def loss() -> Tensor:
            self.evaluations += 1
            with formulas(self.second_order):
                if interface is None:
                    return again.last_loss()
                again.rewind(interface.random_state)
                part = interface.loss(self.inputs)
                return part + interface.rest() if whole and interface.rest is not None else part

        with again.untraced():
            yield loss

    def fresh_loss(self) -> Tensor:
        """Within :meth:`evaluation`: the level's loss on a batch in a stream of its own."""
        self.evaluations += 1
        with formulas(self.second_order):
            return self.level.again.fresh_loss()

    def linearised(self, point: Point) -> AbstractContextManager[None]:
        """A block in which the level has the weights of ``point``."""
        if point == "after_step":
            return nullcontext()
        level = self.level
        return pointed_at(level.trainable_parameters(), level.trajectory.steps[-1].weights)

    def generator(self, seed: int, device: torch.device | str) -> torch.Generator:
        """A generator on ``device`` for this hop's draws, which differ from step to step."""
        name = f"{self.level.name}/{self.level.count}"
        return torch.Generator(device).manual_seed(derived(seed, name))

    def through_hooks(self, vector: Vector) -> Vector:
        """``(dh/dg)^T vector`` where hooks on the level's parameters make ``h(g)`` of its gradient.

        The level's loss is evaluated once more for that, at its present weights; without hooks the
        vector is returned as it is.
        """
        if not hooked(self.parameters):
            return vector
        return transposed(vector, self._gradient(), self.parameters)

    def _gradient(self) -> Sequence[Tensor | None]:
        """Of the whole loss by the level's parameters, at their present values."""
        with self.evaluation(whole=True) as loss:
            gradient = torch.autograd.grad(loss(), self.parameters, allow_unused=True)
        return parallel.average_some(gradient, self.parameters)

    def refuse_hooks(self, method: str) -> None:
        """Refuse hooks that change the level's gradient, in the name of a method.

        Raises:
            UserError: with the mend.
        """
        if not hooked(self.parameters):
            return
        if change_something(self._gradient(), self.parameters):
            raise UserError(
                f"problem {self.level.name!r}: hooks (register_hook) change the gradient by its "
                f"parameters, and the hypergradient method {method} would leave that out; take "
                "finite_difference, identity or unrolled, or change the gradient by the loss itself"
            )

    # ----------------------------------------------------------------------- memory

    @property
    def memory(self) -> dict[str, Tensor]:
        """What this hop's method keeps from one call to the next; saved with the run."""
        return self.level.hop_memory.setdefault(self._upper, {})

    def remember(self, key: str, solution: Tensor) -> None:
        """Keep a solution for :meth:`remembered`, but none with a NaN in it."""
        self.memory[key] = torch.where(solution.isfinite().all(), solution, 0.0)

    def remembered(self, key: str, like: Tensor) -> Tensor | None:
        """The solution of the hop before; None if there is none of the shape of ``like``."""
        known = self.memory.get(key)
        return known if known is not None and known.shape == like.shape else None

    # ---------------------------------------------------------------------- vectors

    def spread(self, vector: Vector) -> Vector:
        """A vector over ``parameters`` as one over all of the level's trainable ones."""
        by_parameter = {id(p): v for p, v in zip(self.parameters, vector, strict=True)}
        parameters = self.level.trainable_parameters()
        return filled([by_parameter.get(id(p)) for p in parameters], parameters)

    def gather(self, vector: Vector) -> Vector:
        """The inverse of :meth:`spread`."""
        parameters = self.level.trainable_parameters()
        by_parameter = {id(p): v for p, v in zip(parameters, vector, strict=True)}
        return [by_parameter[id(p)] for p in self.parameters]

    def unperturbed(self) -> Cotangents | None:
        """The gradient by ``inputs`` that the last step took along, at the weights it started from.

        None where there is none: in a resumed run, whose last step was before, and where another
        hop has used up the interface. Evaluating it gives the same.

        Raises:
            UserError: it doesn't hold any more.
        """
        taken = self.level.trajectory.taken_along
        theirs = self.inputs if self._interface is None else self._interface.tensors
        if taken is None:
            return None
        by_input = {id(z): g for z, g in zip(taken.inputs, taken.gradient, strict=True)}
        if any(id(z) not in by_input for z in theirs):
            return None
        taken.check(self.level.name)
        return [None if (g := by_input[id(z)]) is None else _full(g) for z in theirs]

    def pull_back(self, cotangents: Cotangents) -> list[Vector]:
        """Carry cotangents of ``inputs`` on to each source's trainable parameters.

        Through an interface this is the one backward pass over the networks behind it. Its graph is
        freed. Until here cotangents are of each process's share of the batch: in several processes
        the result is averaged, in one collective.
        """
        flat = self._flatten_sources()
        if self._interface is None:
            grads: Cotangents = cotangents
        else:
            tensors = [z for z in self._interface.tensors if z.requires_grad]
            outer = [
                torch.zeros_like(z) if q is None else q.to(z.dtype)
                for z, q in zip(self._interface.tensors, cotangents, strict=True)
                if z.requires_grad
            ]
            if tensors:
                grads = torch.autograd.grad(tensors, flat, grad_outputs=outer, allow_unused=True)
            else:
                grads = [None] * len(flat)
            self.level.interface = None
        parts = iter(parallel.average(filled(grads, flat)))
        return [[next(parts) for _ in group] for group in self._source_parameters]

    def _flatten_sources(self) -> Vector:
        return [p for group in self._source_parameters for p in group]


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
