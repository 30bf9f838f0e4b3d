"""Hooks on parameters (``Tensor.register_hook``), as a part of a level's gradient.

A level with hooks steps along ``h(g)``, with ``g`` the gradient of its loss: masks of frozen
weights, clipping by layer. What a hop needs of them is that

* they stay out of everything but that gradient: torch runs them in *every* differentiation by the
  parameter, those of the upper loss and those of Hessian-vector products among them
  (:func:`silenced`);
* a product with the gradient's derivative along ``v`` is one along ``(dh/dg)^T v``
  (:func:`transposed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlseg.modules import submodules

Hook = Callable[[Tensor], Tensor | None]

_SILENT: dict[int, list[Hook]] = {}
"""Hooks that are silenced at present, by the parameter's id."""


def hooks_of(parameter: Tensor) -> list[Hook]:
    """Those on a parameter, in their order; also while they are silenced."""
    table: Any = parameter._backward_hooks
    return list(table.values()) if table else _SILENT.get(id(parameter), [])


def hooked(parameters: Iterable[Tensor]) -> bool:
    """Whether any of the parameters has hooks."""
    return any(hooks_of(p) for p in parameters)


@contextmanager
def silenced(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this block torch runs no hooks of the modules' parameters."""
    holders = submodules(modules)
    found = {id(p): p for m in holders for p in m._parameters.values() if p is not None}
    taken: list[tuple[int, Any, dict[int, Hook]]] = []
    for key, p in found.items():
        table: Any = p._backward_hooks
        if table:
            taken.append((key, table, dict(table)))
            _SILENT[key] = list(table.values())
            table.clear()  # torch holds on to the table itself
    try:
        yield
    finally:
        for key, table, hooks in taken:
            table.update(hooks)
            del _SILENT[key]


def applied(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """``h(g)``; differentiable where the gradients are."""
    return [
        g if g is None else _through(hooks_of(p), g)
        for g, p in zip(gradients, parameters, strict=True)
    ]


def change_something(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> bool:
    """Whether hooks make anything else of the gradients, and don't just look at them."""
    for g, p in zip(gradients, parameters, strict=True):
        if g is not None and hooks_of(p):
            before = g._version
            if _through(hooks_of(p), g) is not g or g._version != before:
                return True
    return False


def transposed(
    vectors: Sequence[Tensor], gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """``(dh/dg)^T v`` at the gradients."""
    return [
        v if g is None or not hooks_of(p) else _pull(hooks_of(p), g, v)
        for v, g, p in zip(vectors, gradients, parameters, strict=True)
    ]


def pushed(
    vectors: Sequence[Tensor], gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """``(dh/dg) v`` at the gradients."""
    return [
        v if g is None or not hooks_of(p) else _push(hooks_of(p), g, v)
        for v, g, p in zip(vectors, gradients, parameters, strict=True)
    ]


def _through(hooks: Sequence[Hook], gradient: Tensor) -> Tensor:
    for hook in hooks:
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


@torch.enable_grad()
def _at(hooks: Sequence[Hook], gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the gradient's value, and what the hooks make of it."""
    leaf = gradient.detach().clone().requires_grad_()
    # A copy: some hooks change what they are given in place.
    return leaf, _through(hooks, leaf.clone())


@torch.enable_grad()
def _pull(hooks: Sequence[Hook], gradient: Tensor, vector: Tensor) -> Tensor:
    leaf, result = _at(hooks, gradient)
    if not result.requires_grad:
        return torch.zeros_like(vector)
    (along,) = torch.autograd.grad(result, leaf, vector, allow_unused=True)
    return torch.zeros_like(vector) if along is None else along


@torch.enable_grad()
def _push(hooks: Sequence[Hook], gradient: Tensor, vector: Tensor) -> Tensor:
    """By the transposed of the transposed: hooks needn't have forward-mode formulas."""
    leaf, result = _at(hooks, gradient)
    if not result.requires_grad:
        return torch.zeros_like(vector)
    dual = torch.zeros_like(result).requires_grad_()
    (back,) = torch.autograd.grad(result, leaf, dual, create_graph=True, allow_unused=True)
    if back is None or not back.requires_grad:
        return torch.zeros_like(vector)
    (along,) = torch.autograd.grad(back, dual, vector, allow_unused=True)
    return torch.zeros_like(vector) if along is None else along
