"""What no method differentiates, or the chosen one doesn't: refused, early where it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from mlseg import parallel
from mlseg.compiling import is_compiled
from mlseg.errors import RunError, UserError
from mlseg.hypergradients.base import Method
from mlseg.hypergradients.level import Level
from mlseg.hypergradients.second_order.refusals import check_differentiable


def check_level(
    level: Level,
    method: Method,
    loss: Tensor | None = None,
    parameters: Sequence[Tensor] | None = None,
) -> None:
    """Refuse a level that ``method`` would differentiate wrongly, or not at all.

    Args:
        level: that a hypergradient passes by ``method``.
        loss: of a step with its graph, when there is one.
        parameters: that it is differentiated by.

    Raises:
        UserError: with the mend.
    """
    name = level.name
    if parallel.several() and not method.in_several:
        raise UserError(
            f"problem {name!r}: the hypergradient method {method.name} isn't known to work in "
            f"{parallel.size()} processes; take another one, or where it averages over them set "
            "in_several = True in its class"
        )
    own = level.trainable_parameters() if parameters is None else parameters
    sources = [(s.name, p) for s in level.sources() for p in s.trainable_parameters()]
    for owner, p in [*((name, p) for p in own), *sources]:
        if p.is_complex():
            raise UserError(
                f"problem {owner!r}: hypergradients take real parameters, and it has complex ones; "
                "keep their real and imaginary parts as one real parameter (torch.view_as_real) "
                "and compute with torch.view_as_complex of it"
            )
        if p.layout != torch.strided:
            raise UserError(
                f"problem {owner!r}: hypergradients take dense parameters, and it has some of "
                f"layout {p.layout}; keep them dense"
            )
    for module in _modules(level):
        if getattr(module, "sparse", False) is True:
            raise UserError(
                f"problem {name!r}: {type(module).__name__} with sparse=True has sparse gradients, "
                "which hypergradients don't work with; set sparse=False"
            )
    if not method.first_derivatives_alone and any(map(is_compiled, _modules(level))):
        raise UserError(
            f"problem {name!r}: compile: its network is compiled, and the hypergradient method "
            f"{method.name} takes second derivatives of it, which compiled code doesn't have; set "
            f"compile to false (problems.{name}.compile), or take finite_difference or another "
            "method of first derivatives"
        )
    _check_hooks(level, own)
    if loss is not None and not method.first_derivatives_alone:
        check_differentiable(name, loss, own, _forwards(method))


def _check_hooks(level: Level, parameters: Sequence[Tensor]) -> None:
    name = level.name
    if any(p._post_accumulate_grad_hooks for p in parameters):
        raise UserError(
            f"problem {name!r}: its parameters have post-accumulate-grad hooks, which no "
            "hypergradient can pass; take Tensor.register_hook, which is differentiated, or the "
            "level's grad_callback, which counts as constant"
        )
    anywhere = torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    for module in _modules(level):
        if anywhere or module._backward_hooks or module._backward_pre_hooks:
            raise UserError(
                f"problem {name!r}: {type(module).__name__} has a backward hook "
                "(register_full_backward_hook), which hypergradients would run once more on second "
                "derivatives; take Tensor.register_hook of its parameters, or a forward hook"
            )


class HooksMade(TorchFunctionMode):
    """Within this block an evaluation's calls of ``Tensor.register_hook`` are noted.

    A hook on what is computed is run by double backward on second derivatives too, which it isn't
    meant for; one on a parameter is there to stay, one more from every evaluation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_parameters = self.on_others = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note it, and go on."""
        if func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
            tensor = args[0]
            self.on_parameters |= tensor.is_leaf
            self.on_others |= not tensor.is_leaf
        return func(*args, **(kwargs or {}))

    def check(
        self, name: str, method: Method | None, fault: type[UserError] | type[RunError]
    ) -> None:
        """Raise ``fault`` for hooks with which problem ``name`` would be differentiated wrongly."""
        if self.on_parameters:
            raise fault(
                f"problem {name!r}: its training_step registers hooks on parameters, one more at "
                "every evaluation; register them once, where the module is made"
            )
        twice = method is not None and not (method.first_derivatives_alone or _forwards(method))
        if self.on_others and twice:
            raise fault(
                f"problem {name!r}: its training_step registers hooks on what it computes "
                "(Tensor.register_hook), which double backward would run on second derivatives "
                "too; take finite_difference, or a torch.autograd.Function in place of the hook"
            )


def _forwards(method: Method) -> bool:
    return getattr(method, "mode", None) == "forward_over_reverse"


def _modules(level: Level) -> Iterator[torch.nn.Module]:
    return level.again.modules()[0].modules()
