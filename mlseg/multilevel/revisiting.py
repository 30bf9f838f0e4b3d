"""What a level remembers of its steps, and how it evaluates them again without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import betty.problems
import torch
from torch import Tensor, nn

from mlseg import randomness
from mlseg.hypergradients import Interface, Keeps, Method, Stepping, Trajectory, Vector
from mlseg.multilevel import graph
from mlseg.multilevel.loaders import FreshBatches, Stream

if TYPE_CHECKING:
    from mlseg.multilevel.problem import Problem

_HOOKS = ("grad_callback", "param_callback", "custom_optimizer_step")
"""Where a problem may change its steps."""


class Again:
    """A problem's loss, evaluated again; see :class:`mlseg.hypergradients.base.Again`.

    Args:
        problem: whose loss.

    Attributes:
        last_batch: the (last) batch of the last finished step.
        last_random_state: the generators' state at its start.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.last_batch: Any = None
        self.last_random_state: randomness.RandomState | None = None
        self._begun: randomness.RandomState | None = None
        self._buffers: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []

    def begin(self) -> randomness.RandomState:
        """A batch is about to be evaluated: note the generators' state, and return it."""
        self._begun = randomness.capture(self._problem.device)
        return self._begun

    def end(self, batch: Any) -> None:
        """The step is finished; ``batch`` was its last one."""
        self.last_batch, self.last_random_state = batch, self._begun

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Within this block evaluations leave no trace: not in buffers, not in random streams."""
        holders = {id(m): m for module in self.modules() for m in module.modules()}.values()
        self._buffers = [
            (holder._buffers, name, buffer, buffer.clone())
            for holder in holders
            for name, buffer in holder._buffers.items()
            if buffer is not None
        ]
        self._problem.replaying = True
        try:
            with randomness.replayed(None, self._problem.device):
                yield
        finally:
            self._problem.replaying = False
            self._restore_buffers()
            self._buffers = []

    def rewind(self, random_state: randomness.RandomState | None = None) -> None:
        """Within :meth:`untraced`: every buffer back, and :meth:`restore_randomness`."""
        self._restore_buffers()
        self.restore_randomness(random_state)

    def restore_randomness(self, state: randomness.RandomState | None = None) -> None:
        """Set the generators to ``state``, by default to that at the start of the last step."""
        state = state if state is not None else self.last_random_state or self._begun
        if state is not None:
            randomness.restore(state, self._problem.device)

    def last_loss(self) -> Tensor:
        """Rewind, then the loss of the last finished step's (last) batch."""
        return self.loss(self.last_batch, None)

    def loss(self, batch: Any, random_state: randomness.RandomState | None) -> Tensor:
        """Rewind to ``random_state``, then the loss of ``batch``."""
        self.rewind(random_state)
        return self._problem._loss(batch)

    def fresh_loss(self) -> Tensor:
        """The loss of a batch from the same data, in a stream of which training takes no note."""
        return self._problem._loss(self._problem.fresh_batch())

    def modules(self) -> list[nn.Module]:
        """Those of all problems of the engine, this one's first."""
        return [problem.module for problem in self._problem._everyone()]

    def _restore_buffers(self) -> None:
        """The tensors themselves and their values."""
        for table, name, buffer, value in self._buffers:
            table[name] = buffer
            # Through ``data``: a graph that is still to be walked may have saved the buffer.
            buffer.data.copy_(value)

    def load(self, batch: Any, random_state: randomness.RandomState | None) -> None:
        """Restore the last finished step."""
        self.last_batch, self.last_random_state = batch, random_state
        self._begun = random_state


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
    _stream: Stream
    _fresh: FreshBatches

    def _start_remembering(self, method: Method | None) -> None:
        self.interface, self.replaying, self.method = None, False, method
        self.trajectory, self.hop_memory = Trajectory(Keeps()), {}
        self.again = Again(self)
        self._is_differentiated = False

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
        random_state = self.again.begin()
        if not self.trajectory.keeps.steps:
            return
        if not self.trajectory.is_open:
            self.trajectory.begin(self.trainable_parameters(), self.optimizer)
        self.trajectory.see(batch, random_state)

    def _gradient_is_complete(self, batch: Any) -> None:
        self.again.end(batch)
        if self.trajectory.is_open:
            self.trajectory.end(self.trainable_parameters(), self.gradient_clipping > 0.0)

    def _forget_steps(self) -> None:
        keeps = Keeps()
        if self._is_differentiated and self.method is not None:
            self.method.check(self)
            keeps = self.method.keeps(self)
        self.trajectory = Trajectory(keeps)

    # --------------------------------------------------- evaluating a step again

    def random_state(self) -> randomness.RandomState:
        """The generators' present state, for an :class:`Interface`."""
        return randomness.capture(self.device)

    def fresh_batch(self) -> Any:
        """A batch from the same data in a stream of its own, of which training takes no note."""
        generators = {k: v for k, v in vars(self).items() if isinstance(v, torch.Generator)}
        training = self._stream
        with self._fresh.drawing(generators) as stream:
            self._stream = stream
            try:
                return self.get_batch()
            finally:
                self._stream = training

    def trainable_parameters(self) -> Vector:
        """The module's parameters that require a gradient."""
        return [p for p in self.module.parameters() if p.requires_grad]

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
