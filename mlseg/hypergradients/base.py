"""What a hypergradient method is, and the hop that it works on.

The outer gradient of a multilevel program is carried down the levels one *hop* at a time. With
``v`` the outer loss's gradient with respect to a level's parameters ``w``, and ``s`` the variables
of another problem that the level's training loss ``l(w, s)`` depends on, a hop maps

    v  ->  (dw*/ds)^T v  =  -(d2l / ds dw) P v

where the matrix ``P`` is what methods differ in: the inverse Hessian of implicit differentiation,
or for one step of descent, ``w* = w - eta grad l(w, s)``, the learning rate.

A method sees a hop through :class:`Hop`: the level's parameters, the inputs of its loss, and the
loss itself, evaluated again with the randomness of the step. It never sees which problem graph the
hop belongs to, so that every method works at every place of every graph.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from mlseg.config import Settings
from mlseg.hypergradients.update_rules import one_step_scale
from mlseg.randomness import RandomState

if TYPE_CHECKING:
    from mlseg.problems.base import Problem

Vector = list[Tensor]
"""A vector in parameter space, one tensor per parameter."""


@dataclass(frozen=True)
class Interface:
    """The tensors through which alone other problems enter a level's loss.

    A level whose loss depends on others only through some tensors ``z(s)`` (a synthetic image, say)
    can say so. The hop then factorises, ``(d2l / ds dw) P v = (dz/ds)^T q`` with
    ``q = d/dz <dl/dw, P v>``: the networks behind ``z`` are passed through once, backwards, however
    many evaluations a method takes to find ``q``.

    Attributes:
        tensors: ``z``, as the step computed them, still attached to the graph behind them.
        loss: the part of the step's loss that depends on ``z``, as a function of ``z``.
        random_state: the state of the generators when the step evaluated that part.
    """

    tensors: Sequence[Tensor]
    loss: Callable[[Sequence[Tensor]], Tensor]
    random_state: RandomState


class Hop:
    """One reverse hop, from a level to the problems that its last step's loss depended on.

    Attributes:
        level: the problem whose best response is differentiated.
        sources: the problems whose parameters enter its loss, each a ``Problem`` of any kind.
        parameters: the level's parameters that the upper loss was differentiated by.
        inputs: what :meth:`loss` is differentiated by in the end: fresh leaves in place of the
            interface's tensors, or else all the sources' parameters in a row.
    """

    def __init__(self, level: Problem, sources: Sequence[Problem]) -> None:
        self.level = level
        self.sources = sources
        self.parameters: Vector = list(level.meta_trainable_parameters())
        self._interface = level.interface
        self._source_parameters = [list(s.trainable_parameters()) for s in sources]
        if self._interface is None:
            self.inputs: Vector = [p for group in self._source_parameters for p in group]
        else:
            self.inputs = [z.detach().requires_grad_() for z in self._interface.tensors]

    @contextmanager
    def evaluation(self) -> Iterator[Callable[[], Tensor]]:
        """Give a function that evaluates the step's loss again, leaving no trace.

        Each call starts from the random state of the step. The generators and every buffer of every
        problem are put back at the end. Mixed precision is off: the differences that a method takes
        drown in bfloat16's rounding.
        """
        interface, level = self._interface, self.level

        def loss() -> Tensor:
            if interface is None:
                level.restore_step_randomness()
                return level.loss(level.cur_batch)
            level.restore_step_randomness(interface.random_state)
            return interface.loss(self.inputs)

        with level.revisiting():
            yield loss

    def pull_back(self, cotangents: Sequence[Tensor | None]) -> list[Vector]:
        """Carry cotangents of ``inputs`` on to each source's trainable parameters.

        Through an interface this is the one backward pass over the networks behind it. Its graph is
        freed.
        """
        flat = self._flatten_sources()
        if self._interface is None:
            grads: Sequence[Tensor | None] = cotangents
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
        filled = iter(
            torch.zeros_like(p) if g is None else g for p, g in zip(flat, grads, strict=True)
        )
        return [[next(filled) for _ in group] for group in self._source_parameters]

    def _flatten_sources(self) -> Vector:
        return [p for group in self._source_parameters for p in group]


class Method(Settings):
    """A hypergradient method with its settings: an immutable value that can be called on a hop.

    Subclass it, give ``method`` its name as a default, write :meth:`mixed_product`, and decorate
    the class with :func:`mlseg.hypergradients.register`.

    Attributes:
        scale: the factor in front of each hop.
            ``learning_rate`` (default) is the one-step derivation: the hop carries the level's
            learning rate, parameter group by parameter group, so that paths of different length
            have their true proportion. ``optimizer`` takes the optimizer's whole step per unit of
            gradient, its second moments held fixed. ``none`` drops the factor, as Betty's methods
            do; a path through two levels then weighs 1/eta too much against one through one level.
        linearise: the weights at which the loss is evaluated again: ``after_step``, those the level
            has now (implicit differentiation; no memory), or ``before_step``, those that its last
            step started from (exact for one step; one copy of the weights).

    With gradient accumulation a hop evaluates the last batch of the step. On CUDA, TF32 stays as
    torch has it set, within the evaluations as elsewhere.
    """

    method: str
    scale: Literal["learning_rate", "optimizer", "none"] = "learning_rate"
    linearise: Literal["after_step", "before_step"] = "after_step"

    passes: ClassVar[str] = ""
    """Evaluations per hop, for documents and comparisons."""

    def __call__(self, vector: Vector, hop: Hop) -> tuple[list[Vector], dict[str, Tensor]]:
        """Carry ``vector`` over ``hop``.

        Args:
            vector: the outer gradient with respect to ``hop.parameters``, in their order.
            hop: where to.

        Returns:
            for each source the gradient with respect to its trainable parameters, and the method's
            diagnostics, scalars on the device.
        """
        scaled = self._scaled(vector, hop)
        with hop.level.at_weights_before_step(self.linearise == "before_step"):
            cotangents, diagnostics = self.mixed_product(scaled, hop)
        negated = [None if q is None else q.neg() for q in cotangents]
        return hop.pull_back(negated), diagnostics

    @abstractmethod
    def mixed_product(
        self, vector: Vector, hop: Hop
    ) -> tuple[Sequence[Tensor | None], dict[str, Tensor]]:
        """``d/d(inputs) <dl/dw, P vector>``, one tensor (or None for zero) per ``hop.inputs``."""

    def _scaled(self, vector: Vector, hop: Hop) -> Vector:
        if self.scale == "none":
            return vector
        return one_step_scale(
            vector, hop.parameters, hop.level.optimizer, preconditioned=self.scale == "optimizer"
        )
