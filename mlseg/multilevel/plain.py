"""Problems and graphs that were written for plain Betty: what of them can't run, in one line.

Betty itself fails on each of these in the midst of the work, or trains on in silence.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import betty
import torch
from betty.problems import HigherIterativeProblem, IterativeProblem, Problem
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mlseg.errors import UserError, one_line
from mlseg.multilevel.betty_tables import BETTYS, is_bettys, known_types
from mlseg.multilevel.revisiting import Revisitable

_PRECISIONS = ("fp32", "bf16", "fp16")


def check_problem(problem: Problem, device: torch.device) -> None:
    """Raise UserError where a problem can't be set up as it is."""
    name, config = problem.name, problem.config
    if isinstance(problem, (IterativeProblem, HigherIterativeProblem)):
        raise UserError(
            f"problem {name!r}: Betty's IterativeProblem doesn't run in betty-ml 0.2; derive it "
            "from mlseg.Problem, with Config(hypergradient='unrolled')"
        )
    if problem.ready is not None:
        raise UserError(f"problem {name!r} belongs to another engine already; build it anew")
    for key in ("unroll_steps", "gradient_accumulation"):
        value = getattr(config, key)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"problem {name!r}: {key} {value!r}; a whole number, at least 1")
    if config.precision not in _PRECISIONS:
        raise UserError(f"problem {name!r}: precision {config.precision!r}; choose fp32 or bf16")
    if config.precision == "fp16" and device.type != "cuda":
        raise UserError(f"problem {name!r}: precision fp16 needs CUDA; choose fp32")
    if problem.module is None and not problem.is_implemented("configure_module"):
        raise UserError(f"problem {name!r} has no module; give it one, or define configure_module")
    draws = type(problem).get_batch is not Problem.get_batch or "get_batch" in vars(problem)
    if (
        problem.train_data_loader is None
        and not draws
        and not problem.is_implemented("configure_train_data_loader")
    ):
        raise UserError(
            f"problem {name!r} has no data; give it a train_data_loader, or define get_batch"
        )
    ours = isinstance(problem, Revisitable)
    plateau = isinstance(problem.scheduler, ReduceLROnPlateau)
    if ours and plateau and not hasattr(config, "scheduler_step"):
        raise UserError(
            f"problem {name!r}: ReduceLROnPlateau goes by a validation's metric; give the problem "
            "mlseg.Config(scheduler_step='validation')"
        )
    if not ours and problem.optimizer is None and not problem.is_implemented("configure_optimizer"):
        raise UserError(
            f"problem {name!r} has no optimizer; give it one, or define configure_optimizer"
        )


def check_hops(problem: Problem, problems: Iterable[Problem]) -> None:
    """Raise UserError where upper levels' gradients can't pass through ``problem``."""
    passed = any(problem in path[1:-1] for other in problems for path in other.paths)
    kind, where = problem.config.type, f"problem {problem.name!r}: type {problem.config.type!r}"
    if not passed or (isinstance(problem, Revisitable) and problem.method is not None):
        return
    if kind not in known_types():
        raise UserError(f"{where} is no method; choose one of {', '.join(sorted(BETTYS))}")
    if not is_bettys(problem):
        if not isinstance(problem, Revisitable):
            raise UserError(f"{where} is a method of mlseg's; derive the level from mlseg.Problem")
        return
    if kind == "reinforce":
        raise UserError(f"{where} is empty in betty-ml 0.2; choose darts, sama, neumann or cg")
    if kind in ("cg", "neumann") and problem.paths:
        raise UserError(
            f"{where} of Betty's can't be in the middle of three levels; derive the level from "
            f"mlseg.Problem, with mlseg.Config(hypergradient={kind!r})"
        )
    if kind == "sama" and "rmsprop" in type(problem.optimizer).__name__.lower():
        raise UserError(
            f"{where} of Betty's doesn't know RMSprop; derive the level from mlseg.Problem, with "
            "mlseg.Config(hypergradient='sama')"
        )


def check_graph(
    u2l: Mapping[Problem, Sequence[Problem]],
    l2u: Mapping[Problem, Sequence[Problem]],
    problems: Sequence[Problem],
) -> None:
    """Raise UserError where the dependencies are no graph of these problems."""
    for kind, edges in (("u2l", u2l), ("l2u", l2u)):
        for start, ends in edges.items():
            if not isinstance(ends, (list, tuple)):
                raise UserError(f"{kind}: of each problem a list of problems, not {ends!r}")
            for problem in (start, *ends):
                if not any(problem is known for known in problems):
                    name = getattr(problem, "name", problem)
                    raise UserError(f"{kind}: {name!r} is none of the engine's problems; add it")
            if len({id(end) for end in ends}) < len(ends):
                raise UserError(f"{kind}: {start.name!r} names a problem twice; name it once")
    reached = {start: _above(start, l2u) for start in problems}
    for start in problems:
        if start in reached[start]:
            raise UserError(
                f"l2u: {start.name!r} is above itself; a level can't depend on a level above it"
            )
    for upper, lowers in u2l.items():
        for lower in lowers:
            if upper not in reached[lower]:
                raise UserError(
                    f"u2l: {upper.name!r} depends on {lower.name!r}, but l2u has no path from "
                    f"{lower.name!r} up to {upper.name!r}; add one, or leave the edge out"
                )


def _above(start: Problem, l2u: Mapping[Problem, Sequence[Problem]]) -> set[Problem]:
    found: set[Problem] = set()
    waiting = list(l2u.get(start, ()))
    while waiting:
        problem = waiting.pop()
        if problem not in found:
            found.add(problem)
            waiting += l2u.get(problem, ())
    return found


@contextmanager
def told_of_rebuilding(problem: Problem) -> Iterator[None]:
    """Say in one line where Betty can't make a problem's optimizer or scheduler anew.

    Raises:
        UserError: it can't, with the mend.
    """
    try:
        yield
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        frames = [Path(f.filename) for f in traceback.extract_tb(error.__traceback__)]
        folder = Path(betty.__file__).parent / "patch"
        for what in ("optimizer", "scheduler"):
            if folder / f"{what}.py" in frames and not isinstance(error, UserError):
                made = type(getattr(problem, what)).__name__
                raise UserError(
                    f"problem {problem.name!r}: Betty makes its {what} anew and can't with {made} "
                    f"({one_line(error)}); derive it from mlseg.Problem, which keeps it"
                ) from error
        raise


def regroup(optimizer: torch.optim.Optimizer, groups: Iterable[Any]) -> None:
    """Give an optimizer the groups of a problem's ``param_groups``, as Betty does by a new one.

    Args:
        groups: parameters, or dicts of ``params`` and settings; what they leave out is the
            optimizer's default.
    """
    given = list(groups)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    given = [{**optimizer.defaults, **group, "params": list(group["params"])} for group in given]
    if _told(given) == _told(optimizer.param_groups):
        return
    optimizer.param_groups.clear()
    optimizer.state.clear()
    for group in given:
        optimizer.add_param_group(group)


def _told(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            key: [id(p) for p in value] if key == "params" else value
            for key, value in group.items()
            if key != "initial_lr"
        }
        for group in groups
    ]
