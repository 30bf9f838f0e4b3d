"""The graph of levels: their names, and the hops along its paths."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import betty.engine
from betty.problems import Problem as BettyProblem
from torch import nn

from mlseg.errors import UserError
from mlseg.multilevel.own_names import OwnNames

Levels = Mapping[str, BettyProblem]
"""All levels of an engine by name."""

HOOKS = frozenset(
    {
        "configure_module",
        "configure_optimizer",
        "configure_scheduler",
        "configure_train_data_loader",
        "custom_optimizer_step",
        "epoch_callback",
        "grad_callback",
        "on_inner_loop_start",
        "param_callback",
        "param_groups",
        "validation",
    }
)
"""What a problem or an engine may define, and Betty calls where it is there."""

# ------------------------------------------------------------------------------------ names


class KnowsLevels(OwnNames):
    """Gives levels by name: ``levels[name]``, and as attributes.

    Levels and attributes are kept apart: a level never takes an attribute's place.
    :func:`introduce` refuses names with which the one would hide the other.
    """

    _levels: Levels = MappingProxyType({})

    @property
    def levels(self) -> Levels:
        """All levels of the engine by name."""
        return self._levels

    def __getattr__(self, name: str) -> Any:
        # Only called for what is no attribute.
        if name in self._levels and name not in HOOKS:
            return self._levels[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute or level {name!r}")

    def is_implemented(self, fn_name: str) -> bool:
        """As Betty's, which a step asks for each of its hooks: an attribute that isn't there is an
        exception, and ten times as slow."""
        there = hasattr(type(self), fn_name) or fn_name in vars(self)
        return there and callable(getattr(self, fn_name))


def introduce(problems: Sequence[BettyProblem], engine: betty.engine.Engine) -> None:
    """Make the levels known by name to each other and to the engine.

    Problems of plain Betty get each other as attributes, as on Betty's engine, and may have all
    names that they may have there.

    Raises:
        UserError: a name is doubled, is no name, or is that of an attribute.
    """
    levels: dict[str, BettyProblem] = {}
    for holder in (*problems, engine):
        if isinstance(holder, KnowsLevels):
            holder.check_names()
    for problem in problems:
        if problem.name in levels:
            raise UserError(f"two levels are named {problem.name!r}; rename one of them")
        levels[problem.name] = problem
    for name, level in levels.items():
        why = _why_not(name, level, problems, engine)
        if why is not None:
            raise UserError(f"a level can't be named {name!r}: {why}; rename it")
    shared = MappingProxyType(levels)
    for holder in (*problems, engine):
        if isinstance(holder, KnowsLevels):
            holder._levels = shared
    for problem in problems:
        for name, level in levels.items():
            # Also in the place of a None that waits for the level in a class of a user's own.
            if level is not problem and (not _is_ours(problem) or _has(problem, name)):
                setattr(problem, name, level)
    if engine.env is not None:
        for name, level in levels.items():
            setattr(engine.env, name, level)


def _why_not(
    name: Any, level: BettyProblem, problems: Sequence[BettyProblem], engine: betty.engine.Engine
) -> str | None:
    """What stands against a level's name; None for nothing."""
    if not _is_ours(level):
        if name in _bettys_engine() or (len(problems) > 1 and _has(level, name)):
            return "Betty has an attribute of that name"
    elif not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        return "others couldn't write it as an attribute"
    elif name in HOOKS or _has(engine, name):
        return f"{type(engine).__name__} has an attribute of that name"
    for other in problems:
        if other is level or not _is_ours(other):
            continue
        if name in HOOKS or name in _ours():
            return "every Problem has an attribute of that name"
        if inspect.getattr_static(other, name, None) is not None:
            return f"problem {other.name!r} has an attribute of its own of that name"
    return None


def _is_ours(problem: BettyProblem) -> bool:
    return isinstance(problem, KnowsLevels)


_MISSING = object()


def _has(holder: Any, name: str) -> bool:
    return inspect.getattr_static(holder, name, _MISSING) is not _MISSING


@cache
def _ours() -> frozenset[str]:
    """Names of a Problem's attributes."""
    from mlseg.multilevel.problem import Problem

    return frozenset(dir(Problem("bare", nn.Identity())))


@cache
def _bettys_engine() -> frozenset[str]:
    """Names of the attributes of Betty's engine."""

    class Bare(betty.engine.Engine):
        def initialize(self) -> None:
            pass

    return frozenset(dir(Bare([])))


# ------------------------------------------------------------------------------------- hops


def sources_of(level: BettyProblem, problems: Sequence[BettyProblem]) -> list[BettyProblem]:
    """The problems to which a hypergradient goes on from ``level``, on any path of any problem."""
    sources: dict[str, BettyProblem] = {}
    for problem in problems:
        for path in problem.paths:
            sources |= {after.name: after for at, after in pairwise(path[1:]) if at is level}
    return list(sources.values())


def is_differentiated(level: BettyProblem, problems: Sequence[BettyProblem]) -> bool:
    """Whether an upper level's gradient passes through ``level``."""
    return any(level in path[1:-1] for problem in problems for path in problem.paths)


class Hops:
    """The hops that a problem's gradient takes along its paths.

    Args:
        paths: Betty's: each starts and ends with the problem, and each hop goes from an element to
            the next one, ``[upper, level, ..., upper]``.

    Attributes:
        first: the levels that a path starts with.
        sources: for each level that is passed, where its hop leads.
    """

    def __init__(self, paths: Sequence[Sequence[BettyProblem]]) -> None:
        self.first: list[BettyProblem] = []
        self.sources: dict[BettyProblem, list[BettyProblem]] = {}
        for path in paths:
            _append_new(self.first, path[1])
            for level, source in pairwise(path[1:]):
                _append_new(self.sources.setdefault(level, []), source)

    def in_order(self) -> list[BettyProblem]:
        """The levels, each after all those that carry something to it."""
        waiting = list(self.sources)
        ordered: list[BettyProblem] = []
        while waiting:
            ready = [
                level
                for level in waiting
                if not any(level in self.sources[other] for other in waiting if other is not level)
            ]
            assert ready, "the graph of levels has a cycle"
            ordered += ready
            waiting = [level for level in waiting if level not in ready]
        return ordered


def _append_new(items: list[BettyProblem], item: BettyProblem) -> None:
    if not any(item is known for known in items):
        items.append(item)
