"""Vectors in parameter space: a list of tensors, or the same in one flat tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors together, on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """(n,) all entries in a row, detached."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`flatten`: views of ``flat``, in the shapes (and dtypes) of ``like``."""
    parts = flat.split([t.numel() for t in like])
    return [part.view_as(t).to(t.dtype) for part, t in zip(parts, like, strict=True)]


def filled(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with zeros for None."""
    return [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)]


def accumulate(total: list[Any], part: Sequence[Tensor | None]) -> None:
    """``total += part`` in place of the list's elements, where None is zero."""
    for index, value in enumerate(part):
        known = total[index]
        if value is not None:
            total[index] = value if known is None else known + value
