"""What a hypergradient method is; :mod:`mlseg.hypergradients.hop` says what it works on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from mlseg.config import Settings
from mlseg.config.components import Choices
from mlseg.errors import UserError
from mlseg.hypergradients.diagnostics import Seconds
from mlseg.hypergradients.gradient_hooks import silenced
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.second_order.fused import SecondOrder
from mlseg.hypergradients.second_order.refusals import explained
from mlseg.hypergradients.trajectory import Keeps

Diagnostics = dict[str, Any]
"""Figures of one hop: numbers, or scalars on the device, which nothing reads before the log."""

BestResponse = Literal[
    "one step of the optimizer",
    "the last steps, as they were taken",
    "the minimiser",
    "the fixed point of the optimizer's map",
]


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
