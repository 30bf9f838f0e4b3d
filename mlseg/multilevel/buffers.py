"""Buffers of a program's modules, noted and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import betty.problems
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlseg.hypergradients.modules import submodules
from mlseg.transfer import grouped

Copies = dict[str, Tensor | None]
"""Values by where a buffer is: its level, and its path in that level's module."""

Contents = list[tuple[dict[str, Any], str, Tensor | None, Tensor | None]]
"""Table, name, the tensor itself, and a copy of it."""

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


class ProgramBuffers:
    """Those of all modules of some problems, each once.

    Args:
        problems: gives them; asked when buffers are looked for.
    """

    def __init__(self, problems: Callable[[], Sequence[betty.problems.Problem]]) -> None:
        self._problems = problems
        self._found: dict[str, tuple[dict[str, Any], str, bool]] | None = None
        self._holders: list[tuple[nn.Module, int, tuple[str, ...]]] = []

    def forget(self) -> None:
        """Modules may have changed: look for them anew."""
        self._found = None

    def _places(self) -> dict[str, tuple[dict[str, Any], str, bool]]:
        """Table, name, and whether it is a BatchNorm's statistics."""
        if self._found is None:
            seen: set[int] = set()
            self._found = {}
            for problem in self._problems():
                for path, holder in problem.module.named_modules():
                    if id(holder) in seen:
                        continue
                    seen.add(id(holder))
                    for name in holder._buffers:
                        statistics = isinstance(holder, _BatchNorm) and name in _STATISTICS
                        place = holder._buffers, name, statistics
                        self._found[f"{problem.name}.{path}.{name}"] = place
        return self._found

    def copies(self, statistics: bool) -> Copies:
        """Copies of the present values.

        Args:
            statistics: of BatchNorm's statistics too, which a loss in training mode doesn't read.
        """
        wanted = [
            (path, table.get(name))
            for path, (table, name, is_statistics) in self._places().items()
            if statistics or not is_statistics
        ]
        copies = _copies([buffer for _, buffer in wanted])
        return {path: value for (path, _), value in zip(wanted, copies, strict=True)}

    def contents(self) -> Contents:
        """All of them as they are, for :func:`put_back`."""
        modules = submodules(problem.module for problem in self._problems())
        holders = [(module, id(module._buffers), tuple(module._buffers)) for module in modules]
        if holders != self._holders:  # one was made since
            self._holders = holders
            self.forget()
        places = [
            (module._buffers, name, module._buffers[name])
            for module, _, names in holders
            for name in names
        ]
        copies = _copies([buffer for _, _, buffer in places])
        return [(*place, value) for place, value in zip(places, copies, strict=True)]

    def set(self, copies: Copies, apart: bool = False) -> None:
        """Give buffers these values, within a block that ends with :func:`put_back`.

        Args:
            apart: in tensors of their own, since a graph that outlives the next call saves them.
        """
        places = self._places()
        into, values = [], []
        for path, value in copies.items():
            if path not in places:
                continue
            table, name, _ = places[path]
            present = table.get(name)
            if value is None:
                table[name] = None
            elif apart or present is None or _differ(present, value):
                device = value.device if present is None else present.device
                table[name] = value.to(device, copy=True)
            else:
                into.append(present.data)
                values.append(value)
        _copy_all(into, values)


def put_back(contents: Contents) -> None:
    """The tensors themselves and their values."""
    into, values = [], []
    for table, name, buffer, value in contents:
        table[name] = buffer
        if buffer is not None and value is not None:
            # Through ``data``: a graph that is still to be walked may have saved the buffer.
            into.append(buffer.data)
            values.append(value)
    _copy_all(into, values)


def _copies(buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
    present = [buffer.detach() for buffer in buffers if buffer is not None]
    made = [torch.empty_like(buffer) for buffer in present]
    _copy_all(made, present)
    rest = iter(made)
    return [None if buffer is None else next(rest) for buffer in buffers]


def _copy_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for targets, of in grouped(zip(into, values, strict=True)):
        torch._foreach_copy_(targets, of)


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or one.dtype != other.dtype
