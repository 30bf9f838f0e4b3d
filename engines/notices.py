"""What an engine says once of a program that trains, and yet can't mean what it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mlseg.multilevel.graph import Hops
from mlseg.multilevel.problem import Problem

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine


def after_step(engine: Engine) -> None:
    """Look at each level's first hypergradient of a stage: is it zero, does it move buffers?

    That waits for the device, once for each level.
    """
    for problem in engine.problems:
        if not isinstance(problem, Problem) or not problem.paths:
            continue
        if not any(key.startswith("hypergradient/") for key in problem._metrics):
            continue
        is_new, once = engine._recorder.is_new, f"{engine._stage.name}/{problem.name}"
        look = not _begins_adaptive(problem) and is_new(f"{once} seen")
        for level, text in _zeros(problem) if look else ():
            engine._recorder.event(
                "hypergradient_zero",
                engine.global_step,
                problem=problem.name,
                level=level,
                text=text,
            )
        moved = problem._moves_buffers_of if is_new(f"{once} buffers") else set()
        for level in sorted(moved):
            engine._recorder.event(
                "buffers_moved",
                engine.global_step,
                problem=problem.name,
                level=level,
                text=f"the loss of {problem.name!r} passes {level!r} in training mode and moves "
                f"its buffers (BatchNorm statistics); where it shouldn't, call self.{level}.module"
                ".eval() before and .train() after",
            )


_SECOND_MOMENTS = {"exp_avg_sq", "square_avg", "sum"}
"""In the states of torch's adaptive optimizers."""


def _begins_adaptive(problem: Problem) -> bool:
    """Whether a level below has just taken an adaptive optimizer's first step.

    It goes along the gradient's sign, whatever its size: its derivative is zero up to rounding, and
    no dependence is missing.
    """
    return any(
        isinstance(level, Problem)
        and (level.trajectory.keeps.moments or level.method is None)  # None: Betty's own
        and level._steps_taken <= 1
        and any(_SECOND_MOMENTS & state.keys() for state in level.optimizer.state.values())
        for level in {node for path in problem.paths for node in path[1:-1]}
    )


def _zeros(problem: Problem) -> Iterator[tuple[str, str]]:
    """Each level at which the hypergradient of ``problem`` ends, and why."""
    hops, figures = Hops(problem.paths), problem._metrics

    def zero(name: str) -> bool:
        value = figures.get(f"hypergradient/{name}")
        # By type: a fake tensor of a dry run has no value to look at.
        return type(value) is torch.Tensor and torch.equal(value, torch.zeros_like(value))

    for level in hops.in_order():
        name = level.name
        before = [a.name for a, sources in hops.sources.items() if level in sources]
        if zero(f"into_{name}"):
            if level in hops.first:
                yield (
                    name,
                    f"the hypergradient of {problem.name!r} through {name!r} is exactly zero: its "
                    f"loss doesn't depend on the parameters of {name!r}; compute it with "
                    f"self.{name}(...), not detached and not under no_grad, or leave the path out "
                    "of u2l",
                )
            elif not any(zero(f"into_{other}") for other in before):
                yield name, _independent(problem.name, before, name)
        elif zero(f"via_{name}"):
            yield name, _independent(problem.name, [name], problem.name)


def _independent(upper: str, levels: list[str], source: str) -> str:
    which = " and ".join(repr(level) for level in levels)
    return (
        f"the hypergradient of {upper!r} through {which} is exactly zero: what {which} steps along "
        f"doesn't depend on the parameters of {source!r}; let self.{source}(...) enter the loss "
        f"of {which}, not detached and not under no_grad, or leave the path out of u2l"
    )


def after_log(engine: Engine, lines: Mapping[str, Mapping[str, float]]) -> None:
    """Say of each hop once what its method remarks, and that it has not solved its system."""
    for problem in engine.problems:
        line = lines.get(problem.name, {})
        for level in {node for path in problem.paths for node in path[1:-1]}:
            method: Any = getattr(level, "method", None)
            prefix = f"hypergradient/{level.name}_"
            figures = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
            if method is None or not figures:
                continue
            remark = method.remark(level)
            if remark is not None and engine._recorder.is_new(f"{level.name} remark"):
                engine._recorder.event(
                    "hypergradient_remark", engine.global_step, level=level.name, text=remark
                )
            if not method.is_unsolved(figures):
                continue
            if engine._recorder.is_new(f"{problem.name}/{level.name} unsolved"):
                residual = figures.get("residual")
                left = "" if residual is None else f" (residual {residual:.3g})"
                engine._recorder.event(
                    "hypergradient_unsolved",
                    engine.global_step,
                    problem=problem.name,
                    level=level.name,
                    residual=residual,
                    text=f"the hypergradient of {problem.name!r} through {level.name!r}: "
                    f"{method.name} ended unsolved{left}; try {method.when_unsolved}",
                )
