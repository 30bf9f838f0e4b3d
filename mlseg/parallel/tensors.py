"""Tensors of all processes put together: means, sums, copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlseg.parallel.processes import group, several, size, waiting


def collectives() -> int:
    """Collectives of tensors so far, for tests."""
    here = group()
    return 0 if here is None else here.collectives


def average(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The mean over all processes of each tensor; one collective (per type of number)."""
    if not several():
        return tensors
    found: list[Any] = [None] * len(tensors)
    for places in _alike(tensors):
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
        _reduce(flat)
        flat /= size()
        parts = flat.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            found[i] = part.view(tensors[i].shape)
    return found


def average_some(
    tensors: Sequence[Tensor | None], like: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """:func:`average`, where None is zero; None where it is None in all processes.

    On CUDA, where asking would make the host wait: where it is None here.
    """
    if not several() or not tensors:
        return tensors
    there = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)]
    first = there[0]
    if first.device.type != "cpu":
        found = average(there)
        return [None if t is None else g for t, g in zip(tensors, found, strict=True)]
    known = first.new_tensor([float(t is not None) for t in tensors])
    *found, known = average([*there, known])
    return [g if share > 0 else None for g, share in zip(found, known.tolist(), strict=True)]


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, differentiable; see the module for how to."""
    return tensor if not several() else _Sum.apply(tensor)


def averaged(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """:func:`average`, differentiable; None stays None."""
    if not several():
        return tensors
    found = list(tensors)
    places = [i for i, t in enumerate(tensors) if t is not None]
    given = [t for t in tensors if t is not None]
    for some in _alike(given):
        flat = summed(torch.cat([given[i].reshape(-1) for i in some])) / size()
        parts = flat.split([given[i].numel() for i in some])
        for i, part in zip(some, parts, strict=True):
            found[places[i]] = part.view(given[i].shape)
    return found


class _Sum(torch.autograd.Function):
    """Its own adjoint, and its own tangent."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """The sum."""
        result = tensor.clone(memory_format=torch.contiguous_format)
        _reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Everybody's losses depend on everybody's share."""
        return _Sum.apply(gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        """Linear."""
        return _Sum.apply(tangents[0])


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Give the tensors, in place, the values that they have in the first process."""
    if several():
        for tensor in tensors:
            value = tensor.detach().contiguous()
            with waiting():
                dist.broadcast(value, 0)
            tensor.detach().copy_(value)


def _reduce(tensor: Tensor) -> None:
    here = group()
    assert here is not None
    here.collectives += 1
    with waiting():
        dist.all_reduce(tensor)


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the tensors of each type."""
    found: dict[str, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(f"{tensor.dtype} {tensor.device.type}", []).append(i)
    return [found[key] for key in sorted(found)]
