"""Mixed second derivatives along a direction, in either order of differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlseg.hypergradients.level import Level
from mlseg.hypergradients.substitution import check_none_left, substituted

Mode = Literal["double_backward", "forward_over_reverse"]
"""How a second derivative is taken.

``double_backward`` differentiates the graph of a gradient. ``forward_over_reverse`` carries a
tangent through one forward and one backward pass: no graph of a graph, so less memory and, where
few derivatives are asked for, less time. It needs operations with forward-mode formulas (dropout on
a GPU has none), and forward mode takes no note of ``torch.no_grad()``: a level whose loss computes
with its own weights under ``no_grad`` must ``detach()`` the result as well.
"""


def directional(
    loss: Callable[[], Tensor],
    level: Level,
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    targets: Sequence[Tensor],
    mode: Mode,
) -> Sequence[Tensor | None]:
    """``d/d(targets) <dl/d(parameters), direction>``.

    Args:
        loss: evaluates ``l``.
        level: whose module holds the parameters.
        parameters: what the loss is differentiated by along ``direction``.
        direction: one tensor per parameter.
        targets: leaves, the parameters themselves among them if wanted.
        mode: see :data:`Mode`.

    Returns:
        one tensor per target, None for zero.

    Raises:
        UserError: a parameter is read from outside the problems' modules.
    """
    if mode == "double_backward":
        gradient = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
        return pull_through(gradient, direction, targets)
    wanted = {id(t) for t in targets}
    with dual_level():
        duals = [
            forward_ad.make_dual(p.detach().requires_grad_(id(p) in wanted), d)
            for p, d in zip(parameters, direction, strict=True)
        ]
        replaced = {id(p): dual for p, dual in zip(parameters, duals, strict=True)}
        with substituted(level.again.modules(), parameters, duals):
            value = loss()
            if not value.requires_grad:
                return [None] * len(targets)
            # Within the block: what is checkpointed passes its networks again in here.
            found = torch.autograd.grad(
                value, [*(replaced.get(id(t), t) for t in targets), *parameters], allow_unused=True
            )
        gradients, left = found[: len(targets)], found[len(targets) :]
        check_none_left(level.name, left, "mode to double_backward")
        return [None if g is None else forward_ad.unpack_dual(g).tangent for g in gradients]


@contextmanager
def dual_level() -> Iterator[None]:
    """Forward-mode differentiation within this block."""
    with forward_ad.dual_level(), warnings.catch_warnings():
        # torch's own, when it loads its formulas.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        yield


def pull_through(
    gradient: Sequence[Tensor | None],
    direction: Sequence[Tensor],
    targets: Sequence[Tensor],
    retain_graph: bool = False,
) -> Sequence[Tensor | None]:
    """``d/d(targets) <gradient, direction>``, through the gradient's graph."""
    pairs = [
        (g, d)
        for g, d in zip(gradient, direction, strict=True)
        if g is not None and g.requires_grad
    ]
    if not pairs or not targets:
        return [None] * len(targets)
    outputs, along = zip(*pairs, strict=True)
    # A gradient may be linear in w alone, and then depends on no target.
    return torch.autograd.grad(
        outputs, targets, grad_outputs=along, allow_unused=True, retain_graph=retain_graph
    )
