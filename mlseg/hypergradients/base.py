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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from mlseg import parallel
from mlseg.config import Settings
from mlseg.config.components import Choices
from mlseg.errors import UserError
from mlseg.hypergradients.diagnostics import Seconds
from mlseg.hypergradients.gradient_hooks import (
    change_something,
    hooked,
    silenced,
    transposed,
)
from mlseg.hypergradients.second_order.fused import SecondOrder, formulas
from mlseg.hypergradients.second_order.refusals import explained
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.trajectory import Keeps, Trajectory
from mlseg.hypergradients.vectors import filled
from mlseg.randomness import RandomState, derived

Vector = list[Tensor]
"""A vector in parameter space, one tensor per parameter."""

Cotangents = Sequence[Tensor | None]
"""One tensor per element of ``Hop.inputs``; None for zero."""

Diagnostics = dict[str, Any]
"""Figures of one hop: numbers, or scalars on the device, which nothing reads before the log."""

BestResponse = Literal[
    "one step of the optimizer",
    "the last steps, as they were taken",
    "the minimiser",
    "the fixed point of the optimizer's map",
]

Point = Literal["after_step", "before_step"]
"""Weights at which a level's loss is evaluated again: those it has now, or those that its last
step started from."""


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


@dataclass(frozen=True)
class Stepping:
    """How a level takes a step.

    Attributes:
        optimizer: whose step it is.
        clip: largest norm that the gradient is scaled down to; 0 for no clipping.
        batches: accumulated for one step.
        hooks: which of ``grad_callback``, ``param_callback`` and ``custom_optimizer_step`` the
            level has: where it changes its steps by code of its own.
        below: whether levels below add their hypergradients to its gradient.
        learning_rates: gives the rate of each parameter group as a scalar with the graph behind
            it; None where they don't depend on other problems.
    """

    optimizer: torch.optim.Optimizer
    clip: float
    batches: int
    hooks: frozenset[str]
    below: bool
    learning_rates: Callable[[], Sequence[Tensor] | None]

    @property
    def changes_its_gradient(self) -> bool:
        """Whether a step goes along anything but the gradient of one batch's loss."""
        return self.batches > 1 or self.below or "grad_callback" in self.hooks


class Again(Protocol):
    """A level's loss, evaluated again in full precision.

    Mixed precision is off: the differences that a method takes drown in bfloat16's rounding.
    """

    def untraced(self) -> AbstractContextManager[None]:
        """A block whose evaluations leave no trace in buffers, random streams and by-products."""

    def rewind(self, random_state: RandomState | None = None) -> None:
        """Within :meth:`untraced`: buffers and generators as given, or as at the start of the last
        step."""

    def last_loss(self) -> Tensor:
        """Rewind, then the loss of the (last) batch of the last finished step."""

    def loss(self, batch: Any, random_state: RandomState | None, apart: bool = False) -> Tensor:
        """Rewind to ``random_state``, then the loss of ``batch``.

        Args:
            apart: its graph is still to be walked when another step is evaluated.
        """

    def fresh_loss(self) -> Tensor:
        """The loss of a batch in a stream apart from training's, with draws of its own."""

    def redrawn(self, place: Any) -> Any:
        """The batch that was drawn at a place of the trajectory's, drawn again without a trace."""

    def step_of_optimizer(
        self,
        parameters: Vector,
        gradients: Sequence[Tensor | None],
        moments: Sequence[dict[str, Tensor]],
        groups: Sequence[dict[str, Any] | None],
    ) -> list[dict[str, Tensor]]:
        """Step the parameters in place, by clipping and optimizer as training does, from these
        moments and settings (see :class:`~mlseg.hypergradients.trajectory.Step`); returns the
        moments after it. The optimizer is afterwards what it was."""

    def modules(self) -> list[nn.Module]:
        """Those of all problems, which the loss may compute with; the level's own first."""


class Source(Protocol):
    """A problem whose parameters enter a level's loss."""

    @property
    def name(self) -> str:
        """As in its engine."""

    def trainable_parameters(self) -> Vector:
        """What a hop's gradient is with respect to."""


class Level(Protocol):
    """All that a method may ask of a level; :class:`mlseg.Problem` is one.

    Attributes:
        trajectory: the last steps, as far as the method keeps them.
        interface: the tensors through which other problems entered the last step's loss, where
            the level declares any; a hop uses it up.
        hop_memory: what methods keep from one hop to the next, by the upper level's name.
    """

    trajectory: Trajectory
    interface: Interface | None
    hop_memory: dict[str, dict[str, Tensor]]

    @property
    def name(self) -> str:
        """As in its engine; for messages."""

    @property
    def count(self) -> int:
        """Batches taken so far."""

    @property
    def unroll_steps(self) -> int:
        """Own steps per step of the level above."""

    @property
    def precision(self) -> str:
        """Of its training steps: ``fp32`` or ``bf16``."""

    @property
    def stepping(self) -> Stepping:
        """How it steps."""

    @property
    def again(self) -> Again:
        """Its loss, evaluated again without a trace."""

    def trainable_parameters(self) -> Vector:
        """Those that its steps move."""

    def meta_trainable_parameters(self) -> Vector:
        """Those by which upper losses are differentiated: all the trainable ones, or some."""

    def sources(self) -> Sequence[Source]:
        """The problems to which a hypergradient goes on from here, on any path."""


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

    # What the tables of docs/how-to-choose.md say of the method, see mlseg.hypergradients.tables.
    best_response: ClassVar[BestResponse] = "the minimiser"
    """What it takes for the level's best response."""
    situation: ClassVar[str] = ""
    """When to take it."""
    because: ClassVar[str] = ""
    """Why then."""
    cost: ClassVar[str] = ""
    """Per hop, a formula such as ``1 E + (K + 1) H + 1 M``: ``E`` evaluations with a backward pass,
    ``H`` Hessian-vector products, ``M`` mixed ones. ``T`` steps, ``n`` numbers in the sources,
    ``N`` in the level; further letters are those of ``symbols``."""
    symbols: ClassVar[Mapping[str, str]] = {}
    """Settings by their letters in ``cost``."""
    cost_note: ClassVar[str] = ""
    """What the formula leaves out."""
    memory: ClassVar[str] = ""
    """Beside the graph of the loss; ``w`` is a copy of the level's weights."""
    first_derivatives_alone: ClassVar[bool] = False
    """Whether it takes no derivative of a gradient."""
    in_several: ClassVar[bool] = False
    """Whether it knows of several processes: its cotangents are linear in what a share of the batch
    gives, or that is averaged (:mod:`mlseg.parallel`) before anything else is done with it."""
    when_unsolved: ClassVar[str] = "minres, another damping, or more iterations"
    """What to try where its figures say that the hop's system isn't solved."""
    converged: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it is exact to 1e-4 on small, well-conditioned levels; for tests."""

    @classmethod
    def choices(cls) -> Choices:
        """All methods that have a name."""
        from mlseg.hypergradients.registry import METHODS

        return Choices(METHODS.kind, METHODS.example, METHODS.all(), key="method")

    @classmethod
    def fitting(cls, values: Any) -> type[Settings]:
        """The method that ``values`` name, where this class is none itself."""
        from mlseg.hypergradients.registry import chosen

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
        level = hop.level
        if not vector or not level.trajectory.fits(level.trainable_parameters()):
            raise UserError(
                f"problem {level.name!r}: another level's step has frozen or thawed parameters of "
                "it (requires_grad), and a hypergradient passes it; leave those of a level on the "
                "path as they are"
            )
        watch = Seconds(vector[0].device)
        if not self.through_interface:
            hop = hop.without_interface()
        hop.second_order = self.formulas()
        with silenced(level.again.modules()), explained(level.name):
            if not self.carries_hooks():
                hop.refuse_hooks(self.name)
            cotangents, diagnostics = self.cotangents(vector, hop)
            gradients = hop.pull_back(cotangents)
        watch.stop()
        counted = {"evaluations": hop.evaluations, "products": hop.products, "seconds": watch}
        return gradients, {**diagnostics, **counted}

    @abstractmethod
    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """``(dw*/d inputs)^T vector``, one tensor (or None for zero) per ``hop.inputs``."""

    def formulas(self) -> SecondOrder:
        """By whose formulas it differentiates gradients; ``torch`` where it differentiates none."""
        return "torch"

    def keeps(self, level: Level) -> Keeps:
        """What ``level`` has to remember of its last steps for this method."""
        return Keeps()

    def is_unsolved(self, figures: Mapping[str, float]) -> bool:
        """Whether a hop's diagnostics say that its system wasn't solved.

        That is where more than half of the incoming vector is left, or it has diverged.
        """
        return figures.get("residual", 0.0) > 0.5 or figures.get("diverged", 0.0) > 0.0

    def remark(self, level: Level) -> str | None:
        """What a user should know of this method on this level, said once in a run."""
        return None

    def carries_hooks(self) -> bool:
        """Whether it knows of hooks on the level's parameters.

        See :mod:`mlseg.hypergradients.gradient_hooks`. Where not, hooks that change a gradient are
        refused.
        """
        return False

    def check(self, level: Level) -> None:
        """Refuse a level that the method can't differentiate, before any work.

        Raises:
            UserError: with the mend.
        """


class Differentiating(Method):
    """A method that differentiates the graph of a gradient.

    Attributes:
        second_order: by whose formulas. ``fused``: convolutions and normalisations (batch, layer,
            group, instance) are differentiated twice by the few kernels that it takes; ``torch``:
            by torch's own formulas. The two agree to rounding
            (:mod:`mlseg.hypergradients.second_order.fused`).
    """

    second_order: SecondOrder = "fused"

    def formulas(self) -> SecondOrder:
        """``second_order``."""
        return self.second_order
