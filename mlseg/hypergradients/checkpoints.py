"""Long windows from few stored states: the others are taken again from the nearest before them.

A window has ``T`` steps, whose number is known before it begins. Of ``c`` states that are stored at
a time, training stores those that the reversal will want first; while steps are differentiated from
the last to the first, places become free and are filled with states further down. The binomial
schedule does that with the fewest steps: with the smallest ``r`` for which ``C(c + r, c) >= T``
there are ``r T - C(c + r, c + 1)`` in all, training's own ``T - 1`` before the last among them.

Source: Griewank and Walther: Algorithm 799: revolve, ACM Transactions on Mathematical Software 26,
2000, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import comb
from typing import Any

import torch
from torch import Tensor

from mlseg.errors import RunError, UserError
from mlseg.hypergradients.gradient_hooks import applied
from mlseg.hypergradients.replay import Replay
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.trajectory import (
    Keeps,
    Step,
    Trajectory,
    copy_of,
    copy_of_state,
    group_settings,
)
from mlseg.hypergradients.vectors import accumulate
from mlseg.randomness import RandomState
from mlseg.transfer import batch_to_device

# ------------------------------------------------------------------------------- the schedule


def steps_taken(length: int, states: int) -> int:
    """Steps that it takes to reverse ``length`` steps with ``states``, the first of them stored.

    The evaluation that a step is differentiated by doesn't count.
    """
    repeats = 0
    while comb(states + repeats, states) < length:
        repeats += 1
    return repeats * length - comb(states + repeats, states + 1)


@lru_cache(maxsize=65536)
def split(length: int, states: int) -> int:
    """How far to go on from the first of ``length`` steps before another state is stored.

    The sum of both parts' steps is convex in it: the first place where it doesn't fall.
    """

    def cost(at: int) -> int:
        return at + steps_taken(length - at, states - 1) + steps_taken(at, states)

    low, high = 1, length - 1
    while low < high:
        middle = (low + high) // 2
        if cost(middle + 1) >= cost(middle):
            high = middle
        else:
            low = middle + 1
    return low


def stored_first(length: int, states: int) -> list[int]:
    """The steps before which training stores the state; the first of them is 0."""
    places = [0]
    while states > 1 and length - places[-1] > 1:
        places.append(places[-1] + split(length - places[-1], states))
        states -= 1
    return places


# ------------------------------------------------------------------------------- the recording


class Checkpointed(Trajectory):
    """The steps of a window, few of them with the state that they started from.

    Beside the stored states there is a working one: the state before the step that is looked at.

    Attributes:
        taken: steps taken again so far, over all hops; for figures.
    """

    def __init__(self, keeps: Keeps) -> None:
        super().__init__(keeps)
        self.taken = 0
        self._plan = frozenset(stored_first(keeps.steps, keeps.states))
        self._free: list[tuple[list[Tensor], list[dict[str, Tensor]]]] = []
        self._working: Step | None = None
        self._at: int | None = None  # of which step the working state is

    def begin(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, left: int = 0
    ) -> None:
        """A step starts: keep its state where that is planned, its settings in any case."""
        at = self.keeps.steps - 1 - left
        if at < 0:
            return  # before the window
        if at == 0:
            for step in self.steps:
                self._release(step)
            self.steps.clear()
            self._at = None
        if self._parameters is not None and not super().is_of(parameters):
            # Another space; of this window nothing can be had any more.
            self.steps.clear()
            self._free, self._working, self._at = [], None, None
        self._parameters = list(parameters)
        self._open = Step(weights=[], groups=self._groups(parameters, optimizer))
        if at in self._plan:
            self._store(
                self._open, [p.detach() for p in parameters], _moments(parameters, optimizer)
            )
        elif left == 0:
            self._work_on(at, [p.detach() for p in parameters], _moments(parameters, optimizer))

    def see(
        self,
        batch: Any,
        random_state: RandomState | None,
        loss: Tensor | None = None,
        place: Any = None,
    ) -> None:
        """A batch has been evaluated: keep its place, or else the batch."""
        if self._open is not None:
            assert loss is not None
            self._open.seen.append((batch if place is None else None, random_state))
            self._open.places.append(place)
            self._open.losses.append(loss)

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the open step, if there is one, began with these parameters."""
        return self._open is None or super().is_of(parameters)

    def _are_of(self, parameters: Sequence[Tensor]) -> bool:
        known = self._parameters
        if known is not None and [id(p) for p in known] != [id(p) for p in parameters]:
            return False
        first = self.steps[0].weights  # empty where the window isn't whole
        return not first or [w.shape for w in first] == [p.shape for p in parameters]

    def _groups(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Any:
        """The groups' settings: those of the step before, where they are the same."""
        groups = group_settings(parameters, optimizer)
        held = any(isinstance(v, Tensor) for g in groups for v in (g or {}).values())
        if self.steps and not held and groups == self.steps[-1].groups:
            return self.steps[-1].groups
        return groups

    # ----------------------------------------------------------------------------- states

    def states(self) -> int:
        """Stored ones, without the working one."""
        return sum(bool(step.weights) for step in self.steps)

    def _store(
        self, step: Step, weights: list[Tensor], moments: Sequence[dict[str, Tensor]]
    ) -> None:
        old_weights, old_moments = self._free.pop() if self._free else (None, None)
        step.weights = copy_of(weights, old_weights)
        step.moments = [
            copy_of_state(m, old_moments[i] if old_moments else {}) for i, m in enumerate(moments)
        ]

    def _release(self, step: Step) -> None:
        if step.weights:
            self._free.append((step.weights, step.moments))
            step.weights, step.moments = [], []

    def _work_on(
        self, at: int, weights: list[Tensor], moments: Sequence[dict[str, Tensor]]
    ) -> None:
        old = self._working
        self._working = Step(
            weights=copy_of(weights, old.weights if old else None),
            moments=[
                copy_of_state(m, old.moments[i] if old else {}) for i, m in enumerate(moments)
            ],
        )
        self._at = at

    # ------------------------------------------------------------------------- the reversal

    def backwards(self, replay: Replay) -> Iterator[tuple[int, Step]]:
        """The steps from the last to the first, each with its state and its batches.

        A step and its state are to be used before the next one is asked for.

        Raises:
            RunError: the window isn't whole, or a step that is taken again isn't what it was.
        """
        if len(self.steps) != self.keeps.steps:
            raise RunError(
                f"problem {replay.level.name!r}: a level above it steps after {len(self.steps)} of "
                f"the {self.keeps.steps} steps of a window, of which store: states needs all; set "
                "the hypergradient's store to weights"
            )
        yield from self._reverse(replay, 0, len(self.steps), self.keeps.states)

    def _reverse(
        self, replay: Replay, start: int, end: int, states: int
    ) -> Iterator[tuple[int, Step]]:
        """Those from ``start``, which is stored, to before ``end``."""
        if states == 1 or end - start == 1:
            for at in reversed(range(start, end)):
                yield at, self._step_at(replay, at)
            return
        middle = start + split(end - start, states)
        if not self.steps[middle].weights:
            step = self._step_at(replay, middle)
            self._store(self.steps[middle], step.weights, step.moments)
        yield from self._reverse(replay, middle, end, states - 1)
        self._release(self.steps[middle])
        yield from self._reverse(replay, start, middle, states)

    def _step_at(self, replay: Replay, at: int) -> Step:
        """Go to the state before step ``at``."""
        nearest = max(n for n in range(at + 1) if self.steps[n].weights)
        if self._at is None or not nearest <= self._at <= at:
            self._work_on(nearest, self.steps[nearest].weights, self.steps[nearest].moments)
        assert self._at is not None
        while self._at < at:
            self._advance(replay, self._filled(replay, self._at))
            self._at += 1
        return self._filled(replay, at)

    def _filled(self, replay: Replay, at: int) -> Step:
        """The record of a step with the working state and its batches."""
        record, working = self.steps[at], self._working
        assert working is not None
        seen = [
            (batch if place is None else replay.level.again.redrawn(place), random_state)
            for (batch, random_state), place in zip(record.seen, record.places, strict=True)
        ]
        return Step(
            weights=working.weights,
            moments=working.moments,
            groups=record.groups,
            seen=seen,
            stepped=record.stepped,
            losses=record.losses,
        )

    def _advance(self, replay: Replay, step: Step) -> None:
        """Take a step again, in the working state, by the level's own optimizer."""
        level, parameters = replay.level, replay.parameters
        self.taken += 1
        total: list[Tensor | None] = [None] * len(parameters)
        with pointed_at(parameters, step.weights):
            for (batch, random_state), known in zip(step.seen, step.losses, strict=True):
                replay.hop.evaluations += 1
                loss = level.again.loss(batch, random_state)
                loss = loss / len(step.seen) if len(step.seen) > 1 else loss
                _check_the_same(level.name, loss.detach(), known)
                part = torch.autograd.grad(loss, parameters, allow_unused=True)
                accumulate(total, applied(part, parameters))
            assert self._working is not None
            self._working.moments = level.again.step_of_optimizer(
                parameters, total, step.moments, step.groups
            )

    # ----------------------------------------------------------------------------- the run's state

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Restore ``state_dict``; the working state is had from the stored ones."""
        super().load_state_dict(state, device)
        for step in (*self.steps, *([self._open] if self._open else [])):
            step.losses = batch_to_device(step.losses, device)
        self._free, self._working, self._at = [], None, None


def trajectory_of(keeps: Keeps) -> Trajectory:
    """What records steps as ``keeps`` says."""
    return Checkpointed(keeps) if keeps.states else Trajectory(keeps)


def backwards(replay: Replay) -> Iterator[tuple[int, Step]]:
    """The steps of a replay from the last to the first, each with its number."""
    trajectory = replay.level.trajectory
    if isinstance(trajectory, Checkpointed):
        yield from trajectory.backwards(replay)
    else:
        for index in reversed(range(len(replay.steps))):
            yield index, replay.steps[index]


def check_replays(name: str, hooks: frozenset[str], below: bool, precision: str) -> None:
    """Refuse a level whose steps can't be taken again.

    Args:
        name: the level's.
        hooks, below: of its :class:`~mlseg.hypergradients.level.Stepping`.
        precision: of its training steps.

    Raises:
        UserError: with the mend.
    """
    why = ""
    if hooks:
        why = f"without its {sorted(hooks)[0]}"
    elif below:
        why = "without what the levels below it add to its gradient"
    elif precision == "bf16":
        why = "in full precision, and not in bf16"
    if why:
        raise UserError(
            f"problem {name!r}: store: states would take its steps again {why}; set the "
            "hypergradient's store to weights"
        )


def _moments(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> list[dict[str, Tensor]]:
    return [optimizer.state.get(p, {}) for p in parameters]


def _check_the_same(name: str, loss: Tensor, known: Tensor) -> None:
    """On the CPU bit for bit. Elsewhere sums may come in any order, and nothing waits to look."""
    if loss.device.type == "cpu" and not torch.equal(loss, known) and bool(loss.isfinite()):
        raise RunError(
            f"problem {name!r}: a step that is taken again (store: states) gives the loss "
            f"{float(loss):.9g}, and gave {float(known):.9g} in training: its loss depends on "
            "what has changed since, or a kernel doesn't repeat itself; set the "
            "hypergradient's store to weights"
        )
