"""What a level's step may draw from or change beside what torch knows of: its own belongings.

A step that is evaluated again must draw what it drew, and leave no trace. Global generators and the
levels' buffers are seen to by :mod:`~mlseg.multilevel.again`; here are found the generators of a
program's own (a ``torch.Generator``, numpy's, Python's ``random.Random``: in an augmentation, a
data set, a transform of MONAI's or albumentations') and the tensors that a step could write to (a
teacher's weights, a memory bank).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import betty.engine
import betty.problems
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from mlseg import randomness
from mlseg.compiling import Compiled

_ELEMENTS, _OBJECTS = 256, 20_000
"""Of a container, and in all: where the search ends."""

_CLOSED = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    ModuleType,
    np.ndarray,
    torch.dtype,
    torch.device,
    torch.optim.Optimizer,
    LRScheduler,
    betty.engine.Engine,
    betty.problems.Problem,
    Compiled,
)
"""What isn't looked into; problems are looked into one by one."""

_FOREIGN = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "betty", "mlseg"}
"""Packages whose functions are known to draw from global generators alone."""


@dataclass
class Belongings:
    """What was found, by where.

    Attributes:
        generators: but for the global ones.
        tensors: parameters, buffers and others.
    """

    generators: dict[str, randomness.Generator] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def belongings(roots: Mapping[str, Any]) -> Belongings:
    """All that can be reached from ``roots`` over attributes, containers and functions' names.

    A function reaches what it closes over and the globals that it names.
    """
    found = Belongings()
    seen = {id(generator) for generator in randomness.global_generators()}
    waiting = deque(roots.items())
    while waiting and len(seen) < _OBJECTS:
        path, thing = waiting.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.tensors[path] = thing
        elif randomness.is_generator(thing):
            found.generators[path] = thing
        elif not isinstance(thing, _CLOSED):
            waiting.extend((f"{path}{step}", part) for step, part in _parts(thing))
    return found


def of_problems(problems: Iterable[betty.problems.Problem]) -> Belongings:
    """Those of the levels of a program."""
    roots: dict[str, Any] = {}
    for problem in problems:
        own = {k: v for k, v in vars(problem).items() if k not in _library()}
        roots |= {f"{problem.name}.{key}": value for key, value in own.items()}
        roots[f"{problem.name}.module"] = problem.module
        roots |= {f"{problem.name}{name}": f for name, f in _functions(type(problem))}
    return belongings(roots)


def of_loader(loader: Any) -> Belongings:
    """Those of a loader."""
    return belongings({"loader": loader})


def _library() -> frozenset[str]:
    """Attributes that every problem has."""
    global _OURS
    if not _OURS:
        from mlseg.multilevel.problem import Problem

        # What it gets later on, when it is set up and steps, as well.
        later = {"_stream", "_fresh", "_levels", "cur_batch", "epoch_counter"}
        _OURS = frozenset(vars(Problem("bare", nn.Identity()))) | later
    return _OURS


_OURS: frozenset[str] = frozenset()


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, Mapping):
        yield from ((f"[{k!r}]", v) for k, v in islice(thing.items(), _ELEMENTS))
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        yield from ((f"[{i}]", v) for i, v in enumerate(islice(thing, _ELEMENTS)))
    elif isinstance(thing, MethodType):
        yield "", thing.__func__
        yield "", thing.__self__
    elif isinstance(thing, partial):
        yield from (("", part) for part in (thing.func, thing.args, thing.keywords))
    elif isinstance(thing, FunctionType):
        yield from _named(thing)
    yield from _attributes(thing)
    if isinstance(thing, nn.Module):
        yield from _functions(type(thing))


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    values = getattr(thing, "__dict__", None)
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(thing, nn.Module) and name in ("_parameters", "_buffers", "_modules"):
            yield from ((f".{key}", part) for key, part in value.items())
        else:
            yield f".{name}", value
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(thing, name):
                yield f".{name}", getattr(thing, name)


def _functions(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A class's methods that aren't of the library or of torch."""
    known: set[str] = set()
    for base in cls.__mro__:
        if not _is_foreign(base.__module__):
            for name, value in vars(base).items():
                function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if isinstance(function, FunctionType):
                    yield f".{base.__name__}.{name}" if name in known else f".{name}", function
                    known.add(name)


def _named(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function closes over, its defaults, and the globals that it names."""
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield f":{name}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "", function.__defaults__
    if _is_foreign(function.__module__):
        return
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield f":{name}", function.__globals__[name]


def _global_names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):  # a function or a comprehension within
            yield from _global_names(constant)


def _is_foreign(module: str | None) -> bool:
    return (module or "").split(".")[0] in _FOREIGN
