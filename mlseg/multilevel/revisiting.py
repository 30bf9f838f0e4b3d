"""What a level remembers of its steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import betty.problems
from torch import Tensor

from mlseg import parallel, randomness
from mlseg.errors import UserError
from mlseg.hypergradients import Interface, Keeps, Method, Stepping, Trajectory, Vector
from mlseg.hypergradients.checkpoints import trajectory_of
from mlseg.hypergradients.fitness import check_level
from mlseg.hypergradients.gradient_hooks import silenced
from mlseg.hypergradients.taken_along import with_inputs
from mlseg.modules import parameters_of
from mlseg.multilevel import graph
from mlseg.multilevel.again import Again
from mlseg.multilevel.loaders import FreshBatches, Stream
from mlseg.multilevel.redrawing import Place, Redrawing

_HOOKS = ("grad_callback", "param_callback", "custom_optimizer_step")
"""Where a problem may change its steps."""


class Revisitable(graph.KnowsLevels, betty.problems.ImplicitProblem):
    """The part of a :class:`~mlseg.multilevel.problem.Problem` that hypergradient methods work on.

    It is a :class:`mlseg.hypergradients.Level`.

    Attributes:
        interface: the tensors through which other problems entered the last step's loss, where the
            level declares any.
        replaying: True while a hypergradient evaluates a step again: keep no by-products then.
        method: by which upper levels' gradients pass through this one; None for Betty's own.
        again: evaluates the loss again, without a trace.
        trajectory: the last steps, as far as the method wants them.
        hop_memory: what the method keeps from one hop to the next, by the upper level's name.
    """

    FREE = frozenset({"learning_rates", "loss", "revisits"})
    TYPES = {
        "method": (Method, type(None)),
        "again": (Again,),
        "trajectory": (Trajectory,),
        "hop_memory": (dict,),
        "interface": (Interface, type(None)),
        "replaying": (bool,),
    }

    interface: Interface | None
    replaying: bool
    method: Method | None
    again: Again
    trajectory: Trajectory
    hop_memory: dict[str, dict[str, Tensor]]
    _is_differentiated: bool
    _redrawing: Redrawing | None
    _place: Place | None
    _steps_taken: int
    _random_state: randomness.RandomState | None
    _stream: Stream
    _fresh: FreshBatches

    def _start_remembering(self, method: Method | None) -> None:
        self.interface, self.replaying, self.method = None, False, method
        self.trajectory, self.hop_memory = Trajectory(Keeps()), {}
        self.again = Again(self)
        self._is_differentiated, self._random_state = False, None
        self._redrawing, self._place, self._steps_taken = None, None, 0

    @property
    def is_differentiated(self) -> bool:
        """Whether an upper level's gradient passes through this level."""
        return self._is_differentiated

    @property
    def levels(self) -> graph.Levels:
        """All levels of the engine by name; Betty's own engine sets them as attributes."""
        if self._levels:
            return self._levels
        others = (v for v in vars(self).values() if isinstance(v, betty.problems.Problem))
        return {self.name: self, **{problem.name: problem for problem in others}}

    def sources(self) -> list[betty.problems.Problem]:
        """The problems to which a hypergradient goes on from here, on any path of any problem."""
        return graph.sources_of(self, self._everyone())

    @property
    def unroll_steps(self) -> int:
        """Own steps per step of the level above."""
        return int(self._unroll_steps)

    @property
    def stepping(self) -> Stepping:
        """How this level takes a step."""
        return Stepping(
            optimizer=self.optimizer,
            clip=self.gradient_clipping,
            batches=self.gas,
            hooks=frozenset(hook for hook in _HOOKS if self.is_implemented(hook)),
            below=bool(self._paths),
            learning_rates=self.learning_rates,
        )

    def learning_rates(self) -> Sequence[Tensor] | None:
        """Learning rates that depend on other problems: a scalar per parameter group, or None.

        Override it to make the rates of this level's optimizer a function of an upper problem's
        parameters. They are set before each step, in place of a scheduler's. The methods
        ``unrolled``, ``forward`` and ``evolution`` differentiate through them; for implicit
        methods, at a minimum, they have no effect, and one-step methods differentiate the loss
        alone. On CUDA give the optimizer ``fused=True`` or ``capturable=True``: others read such a
        rate from the device at every step.
        """
        return None

    # -------------------------------------------------------------- taking a step

    def _step_begins(self, batch: Any) -> None:
        """Remember what a later evaluation of this step needs."""
        self._random_state = self.again.begin()
        if self.trajectory.keeps.graphs and not self.trajectory.is_open:
            self._open_step(self.trainable_parameters())

    def _loss_is_evaluated(
        self, batch: Any, loss: Tensor, parameters: Vector, leaves: Vector
    ) -> None:
        """Remember the weights that it was evaluated at; what it trains is known only now.

        Args:
            leaves: what stood in for ``parameters``, or they themselves.
        """
        if self.again.is_checked and self.method is not None:
            check_level(self, self.method, loss, leaves)
        if self.trajectory.keeps.steps:
            if not self.trajectory.is_open:
                self._open_step(parameters)
            if not self.trajectory.is_of(parameters):
                raise UserError(
                    f"problem {self.name!r}: its training_step freezes or thaws parameters "
                    "(requires_grad) within a step of several batches, or one whose graph is kept; "
                    "set accumulate to 1 and the hypergradient's store to weights, or do it before"
                )
            self.trajectory.see(batch, self._random_state, loss.detach(), self._place)

    def _open_step(self, parameters: Vector) -> None:
        self.trajectory.begin(parameters, self.optimizer, self._steps_to_hop())

    def _steps_to_hop(self) -> int:
        """How many steps follow this one before the levels above may step."""
        taken = (self._count - 1) // self.gas
        return self.unroll_steps - 1 - taken % self.unroll_steps

    def _hop_inputs(self) -> Vector:
        """What the hop after this step differentiates by, where the step is to take that along."""
        if not self.trajectory.keeps.by_inputs or self._steps_to_hop():
            return []
        if self.interface is not None:
            return list(self.interface.tensors)
        return [p for source in self.sources() for p in source.trainable_parameters()]

    def _gradient_with(self, loss: Tensor, parameters: Vector, inputs: Vector) -> None:
        """Take the gradient, and that by ``inputs`` along with it."""
        others = [(q, p) for q in self._everyone()[1:] for p in q.module.parameters()]
        with silenced(self.again.modules()):
            gradient, self.trajectory.taken_along = with_inputs(
                loss, parameters, inputs, others, bool(self._retain_graph)
            )
        self._accumulate(parameters, parallel.average_some(gradient, parameters))

    @abstractmethod
    def _accumulate(self, parameters: Vector, gradients: Sequence[Tensor | None]) -> None:
        """Add whole gradients to ``.grad``."""

    def _gradient_is_complete(self, batch: Any, parameters: Vector) -> None:
        self.again.end(batch)
        if self.trajectory.is_open:
            self.trajectory.end(parameters, self.gradient_clipping > 0.0)

    def _forget_steps(self) -> None:
        keeps = Keeps()
        if self._is_differentiated and self.method is not None:
            self.method.check(self)
            check_level(self, self.method)
            keeps = self.method.keeps(self)
        self.trajectory = trajectory_of(keeps)
        self._redrawing = Redrawing(self) if keeps.states else None
        self.again.connect()

    # --------------------------------------------------- evaluating a step again

    def random_state(self) -> randomness.RandomState:
        """The generators' present state, for an :class:`Interface`."""
        return self.again.random_state()

    def fresh_batch(self) -> Any:
        """A batch from the same data in a stream of its own, of which training takes no note."""
        generators = self._own_generators()
        training = self._stream
        with self._fresh.drawing(generators) as stream:
            self._stream = stream
            try:
                return self.get_batch()
            finally:
                self._stream = training

    def _own_generators(self) -> dict[str, randomness.Generator]:
        """Those that a batch may be drawn with, beside the loaders' own."""
        mine, all_levels = f"{self.name}.", self.again.generators()
        return {k.removeprefix(mine): g for k, g in all_levels.items() if k.startswith(mine)}

    def trainable_parameters(self) -> Vector:
        """The module's parameters that require a gradient."""
        return [p for p in parameters_of(self.module) if p.requires_grad]

    def _everyone(self) -> list[betty.problems.Problem]:
        """This problem and all others of its engine."""
        return [self, *(p for p in self.levels.values() if p is not self)]

    # --------------------------------------------------------------------- state

    def _remembered(self) -> dict[str, Any]:
        """What of all this the next step depends on."""
        state: dict[str, Any] = {"hop_memory": self.hop_memory, "fresh": self._fresh.state_dict()}
        if not self._is_differentiated:
            return state
        keeps, period = self.trajectory.keeps, self.unroll_steps * self.gas
        if any(any(p.ready) for p in self._everyone()):
            # An upper level waits for another lower one, and will then evaluate this step again:
            # as a whole, even where it declared an interface, whose graph can't be saved.
            state["last_step"] = {
                "batch": self.again.last_batch,
                "random_state": self.again.last_random_state,
            }
            state["trajectory"] = self.trajectory.state_dict()
        elif keeps.steps and (keeps.steps > self.unroll_steps or self._count % period):
            # The next hop will want steps of before.
            state["trajectory"] = self.trajectory.state_dict()
        return state

    def _recall(self, state: dict[str, Any]) -> None:
        self.hop_memory = {
            upper: {key: value.to(self.device) for key, value in memory.items()}
            for upper, memory in state["hop_memory"].items()
        }
        self._fresh.load_state_dict(state["fresh"])
        if "trajectory" in state:
            self.trajectory.load_state_dict(state["trajectory"], self.device)
