"""Watches losses and hypergradients on the device and names the first that is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from betty.problems import Problem as BettyProblem
from torch import Tensor

from mlseg import checkpoint
from mlseg.checkpoint import first_not_finite
from mlseg.engines.several import first_steps
from mlseg.errors import RunError
from mlseg.multilevel.problem import Problem

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine

_NEVER = torch.iinfo(torch.int64).max


class NanGuard:
    """For each problem, the first step at which its loss or its hypergradient was NaN or infinite.

    The steps are kept on the device, so that watching costs a few tiny kernels and no
    synchronisation; :meth:`first` reads them.
    """

    def __init__(self, problems: Sequence[BettyProblem], device: torch.device | str) -> None:
        self._problems = list(problems)
        self._losses = {p.name: self._never(device) for p in problems}
        self._hypergradients = {p.name: self._never(device) for p in problems}
        self._seen: dict[str, Any] = {}
        self._endless = {
            (problem.name, name)
            for problem in problems
            for name, buffer in problem.module.named_buffers()
            if buffer.isinf().any()
        }

    @staticmethod
    def _never(device: torch.device | str) -> Tensor:
        return torch.full((), _NEVER, dtype=torch.int64, device=device)

    def watch(self, problems: Sequence[BettyProblem], step: int) -> None:
        """Note the figures of the problems that have just stepped."""
        for problem in problems:
            figures = problem._metrics if isinstance(problem, Problem) else {}
            if figures is self._seen.get(problem.name):
                continue
            self._seen[problem.name] = figures
            for key, value in figures.items():
                if not isinstance(value, Tensor):
                    continue
                if key == "loss":
                    self._note(self._losses[problem.name], value, step)
                elif key.startswith("hypergradient/via_"):
                    self._note(self._hypergradients[problem.name], value, step)

    @staticmethod
    def _note(first: Tensor, value: Tensor, step: int) -> None:
        seen = torch.where(torch.isfinite(value.detach()), _NEVER, step)
        torch.minimum(first, seen, out=first)

    def _read(self) -> tuple[dict[str, int], dict[str, int]]:
        """Steps of losses and of hypergradients, in one transfer; of all processes."""
        names = [problem.name for problem in self._problems]
        tables = self._losses, self._hypergradients
        seen = torch.stack([table[name] for table in tables for name in names]).tolist()
        steps = first_steps(seen)
        count = len(names)
        return dict(zip(names, steps[:count], strict=True)), dict(
            zip(names, steps[count:], strict=True)
        )

    def first(self) -> tuple[str, int] | None:
        """The problem and step of the first loss that was not finite, or None; synchronises."""
        losses, _ = self._read()
        name = min(losses, key=losses.__getitem__)
        return None if losses[name] == _NEVER else (name, losses[name])

    def hypergradient(self) -> tuple[str, int] | None:
        """The problem and step of the first hypergradient that was not finite by itself, or None.

        One into which a loss that wasn't finite has entered, the problem's own or that of a level
        below it, is not to blame.
        """
        losses, steps = self._read()
        below = {
            problem.name: {problem.name, *(p.name for path in problem.paths for p in path)}
            for problem in self._problems
        }
        blamed = [
            name
            for name, step in steps.items()
            if step < _NEVER and all(losses.get(other, _NEVER) > step for other in below[name])
        ]
        name = min(blamed, key=lambda name: (steps[name], len(below[name])), default=None)
        return None if name is None else (name, steps[name])

    def first_state(self, problems: Mapping[str, Any]) -> tuple[str, str, str] | None:
        """What of some problems' states is not finite, or None; synchronises.

        Args:
            problems: the states by name, as a checkpoint holds them: parameters and buffers under
                ``module``, ``optimizer``, and what a hypergradient method goes on from.

        Returns:
            the problem, the kind of thing, and its name.
        """
        known = {problem.name: problem for problem in self._problems}
        tensors = {
            (name, *what): tensor
            for name, state in problems.items()
            for what, tensor in _named(state, known[name])
            if (name, what[1]) not in self._endless
        }
        return first_not_finite(tensors)


def check_losses(engine: Engine) -> None:
    """Raise RunError if any loss so far was not finite; synchronises."""
    found = engine._guard.first()
    if found is not None:
        name, step = found
        raise _not_finite(engine, "the loss", name, step)


def check_states(engine: Engine, problems: Mapping[str, Any]) -> None:
    """Raise RunError if parameters, buffers or optimizer state aren't finite; synchronises.

    Args:
        problems: states of problems by name, as a checkpoint is to hold them.
    """
    found = engine._guard.first_state(problems)
    if found is not None:
        problem, kind, name = found
        raise _not_finite(engine, kind, problem, engine.global_step, f" ({name})")


def _not_finite(engine: Engine, what: str, problem: str, step: int, which: str = "") -> RunError:
    """The error to raise; a hypergradient that brought it about is named in its place."""
    mend = "try a lower learning rate or gradient clipping"
    cause = engine._guard.hypergradient()
    if cause is not None and cause[1] <= step:
        which = f" (and then {what} of {problem!r}{which})"
        what, (problem, step) = "the hypergradient", cause
        mend = "try a lower learning rate, more damping or another hypergradient method"
    engine._recorder.event("nan", engine.global_step, problem=problem, at_step=step)
    return RunError(
        f"{what} of problem {problem!r} is not finite at step {step}{which}; "
        f"{what_is_kept(engine)}; {mend}"
    )


def what_is_kept(engine: Engine) -> str:
    """Which checkpoint a run that ends now has, in words."""
    if engine._directory is not None:
        for name in (checkpoint.LAST, checkpoint.PREVIOUS):
            path = engine._directory / "checkpoints" / name
            if checkpoint.whole(path):
                return f"the last good checkpoint is {path}"
        if engine.checkpoint_path("last").exists():
            return f"{engine.checkpoint_path('last')} is damaged"
    return "no checkpoint has been written yet"


def _named(
    state: Mapping[str, Any], problem: BettyProblem
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Every tensor of a level's state that has to be finite, by its kind and its name."""
    own = {id(p): name for name, p in problem.module.named_parameters()}
    parameters = set(own.values())
    for name, tensor in state["module"].items():
        if isinstance(tensor, Tensor):  # a module may keep more than that
            yield ("a parameter" if name in parameters else "a buffer", name), tensor
    held = [p for group in getattr(problem.optimizer, "param_groups", ()) for p in group["params"]]
    for index, slots in state.get("optimizer", {}).get("state", {}).items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                yield ("optimizer state", f"{key} of {own.get(id(held[index]), index)}"), value
    for index, gradient in enumerate(state.get("gradients", ())):
        if gradient is not None:
            yield ("an accumulated gradient", str(index)), gradient
    for upper, memory in state.get("hop_memory", {}).items():
        for key, value in memory.items():
            yield ("hypergradient memory", f"{key}, for {upper}"), value
