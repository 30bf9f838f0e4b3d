"""What one optimizer step makes of a gradient, and what it descends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlseg.hypergradients.optimizers.base import Diagonal, Moments, Optimizer, factors, sign_of
from mlseg.hypergradients.optimizers.finding import check_known, find


@torch.no_grad()
def one_step_scale(
    vector: Sequence[Tensor],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    preconditioned: bool,
) -> list[Tensor]:
    """Multiply ``vector`` by ``-d(step)/d(gradient)`` of the optimizer's last step.

    Without ``preconditioned`` that is the learning rate of each parameter's group. With it, it is
    the diagonal matrix of :meth:`~mlseg.hypergradients.optimizers.Optimizer.scaled`, in which
    second moments are held at their present values (their own derivative, of higher order in the
    gradient, is left out).

    An optimizer that ascends (``maximize``) has the opposite sign. A parameter that the optimizer
    has no state for (no step yet) or doesn't hold gets the plain learning rate, or zero.

    Args:
        vector: one tensor per parameter.
        parameters: in the order of ``vector``.

    Raises:
        UserError: ``preconditioned``, and nothing is known of this optimizer.
    """
    kind = check_known(optimizer) if preconditioned else None
    scaled = list(vector)
    for group, has_state, places in _alike(vector, parameters, optimizer):
        part = [vector[i] for i in places]
        found: Sequence[Tensor]
        if group is None:
            found = [torch.zeros_like(v) for v in part]  # nothing ever steps it
        elif kind is None or not has_state:
            found = torch._foreach_mul(part, factors(sign_of(group) * group["lr"], len(part)))
        else:
            held = [parameters[i] for i in places]
            found = _preconditioned(kind, part, held, [optimizer.state[p] for p in held], group)
        for i, value in zip(places, found, strict=True):
            scaled[i] = value
    return scaled


def _preconditioned(
    kind: type[Optimizer],
    vector: list[Tensor],
    parameters: Sequence[Tensor],
    moments: Sequence[Moments],
    group: Mapping[str, Any],
) -> Sequence[Tensor]:
    """By the formula of all together, unless a class of its own has one of each."""
    names = {"scaled", "scaled_together"}
    nearest = next(cls for cls in kind.__mro__ if names & vars(cls).keys())
    if issubclass(kind, Diagonal) and "scaled_together" in vars(nearest):
        return kind.scaled_together(vector, moments, group)
    return [
        kind.scaled(v, p, m, group) for v, p, m in zip(vector, parameters, moments, strict=True)
    ]


def _alike(
    vector: Sequence[Tensor], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> list[tuple[dict[str, Any] | None, bool, list[int]]]:
    """The parameters of each group that are of one device and dtype, and have a state or none."""
    found: dict[Any, tuple[dict[str, Any] | None, bool, list[int]]] = {}
    groups = _groups(parameters, optimizer)
    for i, (v, p, group) in enumerate(zip(vector, parameters, groups, strict=True)):
        has_state = bool(optimizer.state.get(p))
        key = id(group), has_state, v.dtype, v.device
        found.setdefault(key, (group, has_state, []))[2].append(i)
    return list(found.values())


@torch.no_grad()
def objective(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[list[int], list[Tensor | float]]:
    """What an optimizer descends, compared with the loss it is given.

    That is the loss (its negative, when it maximises) plus half of its weight decay times the
    squared norm, see :meth:`~mlseg.hypergradients.optimizers.Optimizer.decay`.

    Returns:
        per parameter the loss's sign (0: the optimizer doesn't hold it, nothing steps it), and the
        diagonal that the decay adds to the Hessian.
    """
    kind = find(optimizer) or Optimizer
    signs: list[int] = []
    decays: list[Tensor | float] = []
    for p, group in zip(parameters, _groups(parameters, optimizer), strict=True):
        signs.append(0 if group is None else sign_of(group))
        state = optimizer.state.get(p, {})
        decays.append(0.0 if group is None else kind.decay(p, state, group))
    return signs, decays


def _groups(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any] | None]:
    """Each parameter's group; None for one that the optimizer doesn't hold."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return [groups.get(id(p)) for p in parameters]
