"""A level's loss, evaluated again without a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlseg import randomness
from mlseg.errors import RunError, UserError
from mlseg.hypergradients import Interface
from mlseg.hypergradients.fitness import HooksMade
from mlseg.hypergradients.modules import submodules
from mlseg.multilevel import underflow
from mlseg.multilevel.belongings import Belongings, belongings, of_problems
from mlseg.multilevel.buffers import Contents, Copies, ProgramBuffers, put_back
from mlseg.multilevel.redrawing import Place

if TYPE_CHECKING:
    from mlseg.multilevel.problem import Problem

_GENERATORS = "own"
"""Key of a random state: generators of the program's own, by where they were found."""

_BUFFERS = "buffers"
"""Key of a step's random state: the buffers that it began with. Of BatchNorm's statistics only
where its loss reads them."""

_FIRST_CHECKS, _CHECK_EVERY = (1, 10, 100), 1000
"""Steps at which a step is checked to repeat itself: these, and every so many."""


class Again:
    """A problem's loss, evaluated again; see :class:`mlseg.hypergradients.level.Again`.

    Args:
        problem: whose loss.

    Attributes:
        last_batch: the (last) batch of the last finished step.
        last_random_state: the generators' state at its start.
        checks: whether steps are checked to repeat themselves at all.
    """

    checks = True

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.last_batch: Any = None
        self.last_random_state: randomness.RandomState | None = None
        self._begun: randomness.RandomState | None = None
        self._buffers = ProgramBuffers(problem._everyone)
        self._present: Contents = []  # within `untraced`: the buffers before it
        self._found: Belongings | None = None
        self._begins = 0
        self._all_begun: Copies = {}  # at a checked step: all buffers that it began with
        self._reads_statistics = False

    # ------------------------------------------------------------------- a step's course

    def begin(self) -> randomness.RandomState:
        """A batch is about to be evaluated: note the generators' state and the buffers, and return
        them."""
        self._begins += 1
        if self.is_checked:
            self._found = None  # what was made since is found now
            self._buffers.forget()
            self._all_begun = self._buffers.copies(statistics=True)
        self._begun = self.random_state()
        copies = self._buffers.copies(self._reads_statistics)
        if copies:
            self._begun[_BUFFERS] = copies
        return self._begun

    def end(self, batch: Any) -> None:
        """The step is finished; ``batch`` was its last one."""
        self.last_batch, self.last_random_state = batch, self._begun

    def connect(self) -> None:
        """The program has changed: search and check anew."""
        self._found, self._begins, self._reads_statistics = None, 0, False
        self._buffers.forget()

    # -------------------------------------------------------------------- evaluations

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Within this block evaluations leave no trace: not in buffers, not in random streams, not
        in which parameters are frozen."""
        self._present = self._buffers.contents()
        holders = submodules(self.modules())
        parameters = [p for m in holders for p in m._parameters.values() if p is not None]
        frozen = [not p.requires_grad for p in parameters]
        own = self._own_states()
        self._problem.replaying = True
        try:
            with randomness.replayed(None, self._problem.device):
                yield
        finally:
            self._problem.replaying = False
            self._set_own_states(own)
            for p, was in zip(parameters, frozen, strict=True):
                if p.requires_grad is was:
                    p.requires_grad_(not was)
            put_back(self._present)
            self._present = []

    def rewind(
        self, random_state: randomness.RandomState | None = None, apart: bool = False
    ) -> None:
        """Within :meth:`untraced`: buffers back to where the step began, and
        :meth:`restore_randomness`.

        Args:
            random_state: of the step; by default, and of one without buffers, the last one's are
                meant.
            apart: see :meth:`ProgramBuffers.set`.
        """
        self._rewind_buffers(random_state, apart)
        self.restore_randomness(random_state)

    def _rewind_buffers(self, state: randomness.RandomState | None, apart: bool = False) -> None:
        put_back(self._present)
        last = self.last_random_state or self._begun or {}
        copies = (state or last).get(_BUFFERS) or last.get(_BUFFERS, {})
        self._buffers.set(copies, apart)

    def random_state(self) -> randomness.RandomState:
        """The present state of all generators, the program's own included."""
        state = randomness.capture(self._problem.device)
        own = self._own_states()
        if own:
            state[_GENERATORS] = own
        return state

    def restore_randomness(self, state: randomness.RandomState | None = None) -> None:
        """Set the generators to ``state``, by default to that at the start of the last step."""
        state = state if state is not None else self.last_random_state or self._begun
        if state is not None:
            randomness.restore(state, self._problem.device)
            self._set_own_states(state.get(_GENERATORS, {}))

    def last_loss(self) -> Tensor:
        """Rewind, then the loss of the last finished step's (last) batch."""
        return self.loss(self.last_batch, None)

    def loss(
        self, batch: Any, random_state: randomness.RandomState | None, apart: bool = False
    ) -> Tensor:
        """Rewind to ``random_state``, then the loss of ``batch``."""
        self.rewind(random_state, apart)
        return self._problem._full_loss(batch)

    def fresh_loss(self) -> Tensor:
        """The loss of a batch from the same data, in a stream of which training takes no note."""
        self._rewind_buffers(None)
        return self._problem._full_loss(self._problem.fresh_batch())

    def redrawn(self, place: Place) -> Any:
        """The batch that was drawn at ``place``, drawn again, without a trace."""
        redrawing = self._problem._redrawing
        assert redrawing is not None
        return redrawing.draw(place)

    def step_of_optimizer(
        self,
        parameters: list[Tensor],
        gradients: Sequence[Tensor | None],
        moments: Sequence[dict[str, Tensor]],
        groups: Sequence[dict[str, Any] | None],
    ) -> list[dict[str, Tensor]]:
        """Step the parameters in place, as training does; returns the moments after the step."""
        problem = self._problem
        with borrowed(problem.optimizer, parameters, moments, groups) as optimizer:
            problem.set_grads(parameters, gradients)
            if problem.gradient_clipping > 0.0:
                problem.clip_grad()
            optimizer.step()
            underflow.clear(optimizer)
            return [dict(optimizer.state.get(p, {})) for p in parameters]

    def modules(self) -> list[nn.Module]:
        """Those of all problems of the engine, this one's first."""
        return [problem.module for problem in self._problem._everyone()]

    def load(self, batch: Any, random_state: randomness.RandomState | None) -> None:
        """Restore the last finished step."""
        self.last_batch, self.last_random_state = batch, random_state
        self._begun = random_state

    # ---------------------------------------------------------------- does it repeat itself?

    @property
    def is_checked(self) -> bool:
        """Whether the present step is one of those that are checked to repeat themselves."""
        return self.checks and (self._begins in _FIRST_CHECKS or self._begins % _CHECK_EVERY == 0)

    def check(self, batch: Any, loss: Tensor) -> None:
        """Check that the step, evaluated again at its own weights, is what it was, bit for bit.

        Where other problems enter by an interface alone, it is that part that is evaluated.

        That costs an evaluation, and waits for the device. Before the optimizer has stepped it asks
        the same of every method, whatever weights that will evaluate the loss at.

        Args:
            batch: that the step has just been evaluated on.
            loss: what it gave.

        Raises:
            UserError: it isn't; in mid-run RunError.
        """
        problem, interface = self._problem, self._problem.interface
        all_begun, self._all_begun = self._all_begun, {}
        with self.untraced():
            if (
                interface is not None
                or problem.precision == "bf16"
                or problem.trajectory.keeps.graphs
            ):
                # What hypergradients evaluate is less than the step's loss, or more precise, or a
                # step whose graph is kept went by other kernels (`second_order`): two evaluations
                # are compared with each other.
                loss = self._evaluated(batch, interface, all_begun)
            before = {k: (t, t._version) for k, t in self._witnesses(batch).items()}
            with HooksMade() as hooks:
                again = self._evaluated(batch, interface)
            changed = [k for k, (t, version) in before.items() if t._version != version]
            if not changed and not _same(again, loss.detach()):
                again = self._evaluated(batch, interface, all_begun)
                if _same(again, loss.detach()) and self._begun is not None:
                    self._reads_statistics = True
                    self._begun[_BUFFERS] = all_begun
        problem.interface = interface
        fault = RunError if self._begins > 1 else UserError
        if self._reads_statistics and problem.trajectory.keeps.graphs:
            raise fault(
                f"problem {problem.name!r}: its loss reads BatchNorm's statistics, in evaluation "
                "mode, and steps move them, which graphs that are kept don't outlive; set the "
                "hypergradient's store to weights, or leave the statistics alone"
            )
        if changed:
            raise fault(
                f"problem {problem.name!r}: its training_step changes {changed[0]} in place, and "
                "hypergradients evaluate it again, which changes that again; do it only `if not "
                "self.replaying`, keep it in a buffer of a problem's module, or change a copy"
            )
        hooks.check(problem.name, problem.method, fault)
        if not _same(again, loss.detach()):
            raise fault(
                f"problem {problem.name!r}: its step gives another loss when it is evaluated again "
                f"({float(again):.9g} for {float(loss):.9g}), and so would be its hypergradient: "
                "it draws from a generator that was not found, or keeps a state from one "
                "evaluation to the next; make the generator an attribute of the problem or draw "
                "from torch's own, and change states only `if not self.replaying`, or keep them "
                "in buffers that each evaluation changes alike"
            )

    def _evaluated(
        self, batch: Any, interface: Interface | None, begun: Copies | None = None
    ) -> Tensor:
        """The loss as a hop evaluates it, or the part that depends on the interface.

        Args:
            begun: buffers to start from, where not those that the hop does.
        """
        put_back(self._present)
        copies = (self._begun or {}).get(_BUFFERS, {}) if begun is None else begun
        self._buffers.set(copies)
        if interface is None:
            self.restore_randomness(self._begun)
            return self._problem._full_loss(batch).detach()
        self.restore_randomness(interface.random_state)
        return interface.loss([z.detach() for z in interface.tensors]).detach()

    def _witnesses(self, batch: Any) -> dict[str, Tensor]:
        """What an evaluation may not write to: all but the buffers, which are put back."""
        buffers = {id(buffer) for _, _, buffer, _ in self._present}
        tensors = self._belongings().tensors | belongings({"its batch": batch}).tensors
        return {path: t for path, t in tensors.items() if id(t) not in buffers}

    # ----------------------------------------------------------------------- parts

    def _belongings(self) -> Belongings:
        if self._found is None:
            self._found = of_problems(self._problem._everyone())
        return self._found

    def generators(self) -> dict[str, randomness.Generator]:
        """The program's own, by where they were found: a level's name, and on from there."""
        return self._belongings().generators

    def _own_states(self) -> dict[str, Any]:
        return {path: randomness.own_state(g) for path, g in self.generators().items()}

    def _set_own_states(self, states: dict[str, Any]) -> None:
        generators = self.generators()
        for path, state in states.items():
            if path in generators:
                randomness.set_own_state(generators[path], state)


@contextmanager
def borrowed(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    moments: Sequence[dict[str, Tensor]],
    groups: Sequence[dict[str, Any] | None],
) -> Iterator[torch.optim.Optimizer]:
    """Within this block the optimizer has these moments and settings, and no gradients."""
    state, settings = optimizer.state, [dict(group) for group in optimizer.param_groups]
    held = {id(p): p for p in parameters}
    held |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    gradients = [p.grad for p in held.values()]
    optimizer.state = defaultdict(
        dict, {p: dict(m) for p, m in zip(parameters, moments, strict=True) if m}
    )
    for values in groups:
        if values is not None:
            optimizer.param_groups[values["index"]].update(
                {k: v for k, v in values.items() if k != "index"}
            )
    for p in held.values():
        p.grad = None
    try:
        yield optimizer
    finally:
        optimizer.state = state
        for group, was in zip(optimizer.param_groups, settings, strict=True):
            group.clear()
            group.update(was)
        for p, gradient in zip(held.values(), gradients, strict=True):
            p.grad = gradient


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two losses are one; on CUDA up to rounding, where sums come in any order."""
    if one.device.type == "cpu":
        return torch.equal(one, other) or bool((one.isnan() & other.isnan()).all())
    bound = 64.0 * torch.finfo(one.dtype).eps
    return bool(torch.isclose(one, other, rtol=bound, atol=0.0, equal_nan=True).all())
