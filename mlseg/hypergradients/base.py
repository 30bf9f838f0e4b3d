"""What a hypergradient method is, and the hop that it works on.

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

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from mlseg.config import Settings
from mlseg.hypergradients.diagnostics import Seconds
from mlseg.hypergradients.registry import chosen
from mlseg.hypergradients.trajectory import Keeps
from mlseg.randomness import RandomState

if TYPE_CHECKING:
    from mlseg.multilevel.problem import Problem

Vector = list[Tensor]
"""A vector in parameter space, one tensor per parameter."""

Cotangents = Sequence[Tensor | None]
"""One tensor per element of ``Hop.inputs``; None for zero."""

Diagnostics = dict[str, Any]
"""Figures of one hop: numbers, or scalars on the device, which nothing reads before the log."""


@dataclass(frozen=True)
class Interface:
    """The tensors through which alone other problems enter a level's loss.

    A level whose loss depends on others only through some tensors ``z(s)`` (a synthetic image, say)
    can say so. The hop then factorises, ``(dw*/ds)^T v = (dz/ds)^T q``: the networks behind ``z``
    are passed through once, backwards, however many evaluations a method takes to find ``q``.

    Attributes:
        tensors: ``z``, as the step computed them, still attached to the graph behind them.
        loss: the part of the step's loss that depends on ``z``, as a function of ``z``.
        random_state: the state of the generators when the step evaluated that part.
        rest: the other part of the step's loss, which the step evaluated right after ``loss``;
            None where there is none. It has no share in the mixed derivative, but in the Hessian.
    """

    tensors: Sequence[Tensor]
    loss: Callable[[Sequence[Tensor]], Tensor]
    random_state: RandomState
    rest: Callable[[], Tensor] | None


class Hop:
    """One reverse hop, from a level to the problems that its last step's loss depended on.

    Args:
        level: the problem whose best response is differentiated.
        sources: the problems whose parameters enter its loss, each a ``Problem`` of any kind.
        upper: name of the problem whose gradient is carried; hops of different uppers over the same
            level keep separate memories.

    Attributes:
        parameters: the level's parameters that the upper loss was differentiated by.
        inputs: what the loss is differentiated by in the end: fresh leaves in place of the
            interface's tensors, or else all the sources' parameters in a row.
        evaluations: evaluations of the level's loss so far, each with one backward pass.
        products: second derivatives along a direction so far: Hessian-vector products, mixed
            products, or both in one.
    """

    def __init__(self, level: Problem, sources: Sequence[Problem], upper: str = "") -> None:
        self.level = level
        self.sources = sources
        self.parameters: Vector = list(level.meta_trainable_parameters())
        self.evaluations = 0
        self.products = 0
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

    @property
    def memory(self) -> dict[str, Tensor]:
        """What this hop's method keeps from one call to the next; saved with the run."""
        return self.level.hop_memory.setdefault(self._upper, {})

    @contextmanager
    def evaluation(self, whole: bool = False) -> Iterator[Callable[[], Tensor]]:
        """Give a function that evaluates the step's loss again, leaving no trace.

        Each call starts from the random state of the step and from the present buffers. The
        generators and every buffer of every problem are put back at the end. Mixed precision is
        off: the differences that a method takes drown in bfloat16's rounding.

        Args:
            whole: the whole loss, for second derivatives by the level's own parameters; else the
                part of it that depends on ``inputs`` is enough.
        """
        interface, level = self._interface, self.level

        def loss() -> Tensor:
            self.evaluations += 1
            level.restore_buffers()
            if interface is None:
                level.restore_step_randomness()
                return level.loss(level.step_batch)
            level.restore_step_randomness(interface.random_state)
            part = interface.loss(self.inputs)
            return part + interface.rest() if whole and interface.rest is not None else part

        with level.revisiting():
            yield loss

    def pull_back(self, cotangents: Cotangents) -> list[Vector]:
        """Carry cotangents of ``inputs`` on to each source's trainable parameters.

        Through an interface this is the one backward pass over the networks behind it. Its graph is
        freed.
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
        filled = iter(
            torch.zeros_like(p) if g is None else g for p, g in zip(flat, grads, strict=True)
        )
        return [[next(filled) for _ in group] for group in self._source_parameters]

    def _flatten_sources(self) -> Vector:
        return [p for group in self._source_parameters for p in group]


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class Method(Settings):
    """A hypergradient method with its settings: an immutable value that can be called on a hop.

    Subclass it, write :meth:`cotangents`, and decorate the class with
    ``@mlseg.hypergradients.register("name")``. Its fields are its settings in a config. Most
    methods are shorter as a subclass of :class:`~mlseg.hypergradients.one_step.OneStep` or
    :class:`~mlseg.hypergradients.implicit.Implicit`.

    With gradient accumulation a hop evaluates the last batch of the last finished step, unless its
    method replays whole steps (``unrolled``, ``forward``, ``evolution``). Buffers are those of now:
    a loss whose value depends on buffers that it updates itself (spectral normalisation) is
    evaluated with later ones than the step saw. On CUDA, TF32 stays as torch has it set,
    within the evaluations as elsewhere.
    """

    name: ClassVar[str] = ""
    """As in a config's ``method:``; ``register`` sets it."""
    through_interface: ClassVar[bool] = True
    """Whether a level's interface serves the method; else it sees the sources' own parameters."""

    @classmethod
    def fitting(cls, values: Any) -> type[Settings]:
        """The method that ``values`` name, where this class is none itself."""
        if cls.name:
            return cls
        try:
            return chosen(values)[0]
        except (TypeError, ValueError):
            return cls

    @model_serializer(mode="wrap")
    def _with_name(self, settings: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"method": self.name, **settings(self)}

    def __call__(self, vector: Vector, hop: Hop) -> tuple[list[Vector], Diagnostics]:
        """Carry ``vector`` over ``hop``.

        Args:
            vector: the outer gradient with respect to ``hop.parameters``, in their order.
            hop: where to.

        Returns:
            for each source the gradient with respect to its trainable parameters, and diagnostics:
            the method's own, and of every method ``evaluations`` (of the level's loss, each with a
            backward pass), ``products`` (second derivatives along a direction) and ``seconds``.
        """
        watch = Seconds(vector[0].device if vector else "cpu")
        if not self.through_interface:
            hop = hop.without_interface()
        cotangents, diagnostics = self.cotangents(vector, hop)
        gradients = hop.pull_back(cotangents)
        watch.stop()
        counted = {"evaluations": hop.evaluations, "products": hop.products, "seconds": watch}
        return gradients, {**diagnostics, **counted}

    @abstractmethod
    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """``(dw*/d inputs)^T vector``, one tensor (or None for zero) per ``hop.inputs``."""

    def keeps(self, level: Problem) -> Keeps:
        """What ``level`` has to remember of its last steps for this method."""
        return Keeps()

    def check(self, level: Problem) -> None:
        """Refuse a level that the method can't differentiate, before any work.

        Raises:
            UserError: with the mend.
        """
