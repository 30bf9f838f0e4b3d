"""What an engine's iterations ask for, counted without doing the work.

The levels' networks are put in the place of fake tensors, which have a shape, a type and a device
and no numbers; the program then runs as it is. Batches are drawn for real: there are few pixels in
them, and who draws them may look at numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from betty.problems import Problem as BettyProblem
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from mlseg.compiling import uncompiled
from mlseg.engines.engine import Engine
from mlseg.hypergradients.modules import submodules
from mlseg.multilevel.problem import Problem

NEEDS_NUMBERS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""Raised where a program wants to see what a fake tensor doesn't have."""

Replaced = dict[int, Tensor]
"""Fake tensors by the identity of what they stand for."""


@dataclass
class Count:
    """What a piece of work asks for.

    Attributes:
        flops: of matrix products and convolutions, a multiplication and an addition as two.
        peak: bytes of tensors that are alive at once, at most, on top of what was there before.
    """

    flops: int = 0
    peak: int = 0


class Counter(TorchDispatchMode):
    """Counts what passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self._alive = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.count.flops += int(formula(*args, **(kwargs or {}), out_val=made))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._alive += size
        self.count.peak = max(self.count.peak, self._alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._alive -= size


@contextmanager
def faked(engine: Engine) -> Iterator[FakeTensorMode]:
    """Within this block the engine's levels work on fake tensors; it can't be used afterwards."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for problem in engine.problems:
        _fake(problem, mode)
    with mode, uncompiled():
        yield mode


def counted(once: Callable[[], object]) -> Count:
    """What one call asks for."""
    counter = Counter()
    with counter:
        once()
    return counter.count


def _fake(problem: BettyProblem, mode: FakeTensorMode) -> None:
    replaced: Replaced = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            replaced[id(tensor)] = mode.from_tensor(tensor)
        return replaced[id(tensor)]

    for module in _modules(problem):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fake(tensor)  # type: ignore[assignment]
    if problem.optimizer is not None:
        problem.optimizer.state.clear()
        for group in problem.optimizer.param_groups:
            group["params"] = [fake(parameter) for parameter in group["params"]]
    if isinstance(problem, Problem):
        problem.again.checks = False  # which looks at numbers
    draw = problem.get_batch

    def get_batch() -> Any:
        with unset_fake_temporarily():
            batch = draw()
        return tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, batch)

    problem.get_batch = get_batch


def _modules(problem: BettyProblem) -> list[nn.Module]:
    """The level's module and all others that it holds, such as a loss with a buffer."""
    held = [problem.module, *(v for v in vars(problem).values() if isinstance(v, nn.Module))]
    return submodules(held)


def held_bytes(engine: Engine) -> int:
    """Of parameters and buffers."""
    tensors = {
        id(t): t
        for problem in engine.problems
        for module in _modules(problem)
        for t in (*module._parameters.values(), *module._buffers.values())
        if t is not None
    }
    return sum(t.numel() * t.element_size() for t in tensors.values())
