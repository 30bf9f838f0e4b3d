"""What a level remembers of its steps, and how it evaluates them again without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import betty.problems
from torch import Tensor, nn

from mlseg import randomness
from mlseg.hypergradients import Interface, Keeps, Method, Trajectory, Vector
from mlseg.hypergradients.vectors import filled

if TYPE_CHECKING:
    from mlseg.problems.loaders import FreshBatches


class Revisitable(betty.problems.ImplicitProblem):
    """The part of a :class:`~mlseg.problems.base.Problem` that hypergradient methods work on.

    Attributes:
        interface: the tensors through which other problems entered the last step's loss, where the
            level declares any.
        replaying: True while a hypergradient evaluates a step again: keep no by-products then.
        method: by which upper levels' gradients pass through this one; None for Betty's own.
        trajectory: the last steps, as far as the method wants them.
        hop_memory: what the method keeps from one hop to the next, by the upper level's name.
        step_batch: the (last) batch of the last finished step.
    """

    interface: Interface | None
    replaying: bool
    method: Method | None
    trajectory: Trajectory
    hop_memory: dict[str, dict[str, Tensor]]
    step_batch: Any
    _is_differentiated: bool
    _random_state: randomness.RandomState | None
    _step_random_state: randomness.RandomState | None
    _kept_buffers: list[tuple[dict[str, Any], str, Tensor, Tensor]]
    _fresh: FreshBatches

    def _start_remembering(self, method: Method | None) -> None:
        self.interface, self.replaying, self.method = None, False, method
        self.trajectory, self.hop_memory = Trajectory(Keeps()), {}
        self._is_differentiated, self.step_batch = False, None
        self._random_state = self._step_random_state = None
        self._kept_buffers = []

    @property
    def is_differentiated(self) -> bool:
        """Whether an upper level's gradient passes through this level."""
        return self._is_differentiated

    def sources(self) -> list[betty.problems.Problem]:
        """The problems to which a hypergradient goes on from here, on any path of any problem."""
        found: dict[str, betty.problems.Problem] = {}
        for problem in self._everyone():
            for path in problem.paths:
                found |= {after.name: after for at, after in pairwise(path[1:]) if at is self}
        return list(found.values())

    @property
    def unroll_steps(self) -> int:
        """Own steps per step of the level above."""
        return int(self._unroll_steps)

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
        self._random_state = randomness.capture(self.device)
        if not self.trajectory.keeps.steps:
            return
        if not self.trajectory.is_open:
            self.trajectory.begin(self.trainable_parameters(), self.optimizer)
        self.trajectory.see(batch, self._random_state)

    def _gradient_is_complete(self, batch: Any) -> None:
        self.step_batch, self._step_random_state = batch, self._random_state
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

    def restore_step_randomness(self, state: randomness.RandomState | None = None) -> None:
        """Set the generators to ``state``, by default to that at the start of the last step."""
        state = state if state is not None else self._step_random_state or self._random_state
        if state is not None:
            randomness.restore(state, self.device)

    @contextmanager
    def revisiting(self) -> Iterator[None]:
        """Within this block evaluations leave no trace: not in buffers, not in random streams."""
        holders = {id(m): m for module in self.all_modules() for m in module.modules()}.values()
        self._kept_buffers = [
            (holder._buffers, name, buffer, buffer.clone())
            for holder in holders
            for name, buffer in holder._buffers.items()
            if buffer is not None
        ]
        self.replaying = True
        try:
            with randomness.replayed(None, self.device):
                yield
        finally:
            self.replaying = False
            self.restore_buffers()
            self._kept_buffers = []

    def restore_buffers(self) -> None:
        """Within :meth:`revisiting`: put every buffer back, the tensor itself and its values."""
        for table, name, buffer, value in self._kept_buffers:
            table[name] = buffer
            # Through ``data``: a graph that is still to be walked may have saved the buffer.
            buffer.data.copy_(value)

    def all_modules(self) -> list[nn.Module]:
        """The modules of all problems of the engine, this one's first."""
        return [problem.module for problem in self._everyone()]

    @contextmanager
    def at_weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Within this block the level's trainable parameters have these values.

        They are pointed at other storage and back, so that they are afterwards bit for bit what
        they were.
        """
        parameters = self.trainable_parameters()
        kept = [p.data for p in parameters]
        for p, data in zip(parameters, weights, strict=True):
            p.data = data
        try:
            yield
        finally:
            for p, data in zip(parameters, kept, strict=True):
                p.data = data

    def linearised(self, point: Literal["after_step", "before_step"]) -> Any:
        """A block with the weights before the last step; or, after it, the present ones."""
        if point == "after_step":
            return nullcontext()
        return self.at_weights(self.trajectory.steps[-1].weights)

    def spread(self, vector: Vector) -> Vector:
        """A vector over ``meta_trainable_parameters`` as one over ``trainable_parameters``."""
        by_parameter = {
            id(p): v for p, v in zip(self.meta_trainable_parameters(), vector, strict=True)
        }
        parameters = self.trainable_parameters()
        return filled([by_parameter.get(id(p)) for p in parameters], parameters)

    def gather(self, vector: Vector) -> Vector:
        """The inverse of :meth:`spread`."""
        by_parameter = {id(p): v for p, v in zip(self.trainable_parameters(), vector, strict=True)}
        return [by_parameter[id(p)] for p in self.meta_trainable_parameters()]

    def fresh_batch(self) -> Any:
        """A batch from the same data in a stream of its own, of which training takes no note."""
        return self._fresh.draw(self)

    def trainable_parameters(self) -> Vector:
        """The module's parameters that require a gradient."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def _everyone(self) -> list[betty.problems.Problem]:
        """This problem and all others of its engine, which Betty sets as attributes by name."""
        others = [v for v in vars(self).values() if isinstance(v, betty.problems.Problem)]
        return [self, *others]

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
                "batch": self.step_batch,
                "random_state": self._step_random_state,
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
        if "last_step" in state:
            self._random_state = self._step_random_state = state["last_step"]["random_state"]
        if "trajectory" in state:
            self.trajectory.load_state_dict(state["trajectory"], self.device)
