"""What can't be differentiated as a hop asks for, in one line that names it and the mend.

torch refuses some operations a second derivative (flash attention, cuDNN's recurrent networks,
compiled modules), in words of its own, wherever a method happens to be. :func:`explained` is around
every hop. Functions marked ``once_differentiable`` it doesn't refuse at all where a gradient is
asked for by name: they count as constant then; and operators of libraries (``torch.library``) lose
the tangents of what needs no gradient. :func:`check_differentiable` finds both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from mlseg.errors import RunError, UserError, one_line

_FIRST = "take finite_difference, which needs first derivatives alone"
_ATTENTION = (
    f"{_FIRST}, or compute it with torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around it"
)
_CUDNN = f"{_FIRST}, or put torch.backends.cudnn.flags(enabled=False) around the network's pass"
_TWICE = "has no second derivative"


def _operation(name: str) -> str:
    return name.strip("_").removesuffix("_backward")


def _missing(match: re.Match[str], _: str) -> str:
    name = _operation(match[1])
    return f"{name} in its loss {_TWICE}; {_ATTENTION if 'attention' in name else _FIRST}"


def _no_tangent(match: re.Match[str], _: str) -> str:
    name = _operation(match[1])
    other = f"set the hypergradient's mode to double_backward, or {_FIRST}"
    mend = _ATTENTION if "attention" in name else other
    return f"{name} in its loss has no forward-mode derivative; {mend}"


def _says(what: str) -> Callable[[re.Match[str], str], str]:
    return lambda match, text: what.format(text=text)


_COMPILED = _says(
    f"a compiled module (torch.compile) in its loss {_TWICE}; {_FIRST}, or identity or unrolled "
    "with mode forward_over_reverse, or leave the module uncompiled (compile of its level)"
)
_KNOWN: tuple[tuple[str, Callable[[re.Match[str], str], str]], ...] = (
    (r"derivative for '?(?:aten::)?(\w+)'? is not implemented", _missing),
    (r"forward AD with (?:aten::)?(\w+)", _no_tangent),
    (
        r"implement the jvp function|Jacobian-vector product",
        _says(
            "a torch.autograd.Function in its loss has no forward-mode derivative; give it a jvp, "
            "set the hypergradient's mode to double_backward, or " + _FIRST
        ),
    ),
    (
        r"once_differentiable",
        _says(
            f"a torch.autograd.Function in its loss is marked once_differentiable and {_TWICE}; "
            + _FIRST
        ),
    ),
    (
        r"(?i)double backwards? .*(CuDNN|MIOpen) RNN",
        _says(f"a recurrent network of cuDNN in its loss {_TWICE}; {_CUDNN}"),
    ),
    (r"donated buffers|aot_autograd does not currently support double", _COMPILED),
    (
        r"use_reentrant=True|Checkpointing is not compatible with",
        _says(
            "a checkpointed part (torch.utils.checkpoint) of its loss is reentrant, and can't be "
            "differentiated by chosen tensors; set use_reentrant=False there"
        ),
    ),
    (
        r"(?i)double.?backward|differentiat\w+ twice",
        _says(f"an operation of its loss {_TWICE} ({{text}}); {_FIRST}"),
    ),
    (
        r"(?i)sparse",
        _says(
            "its loss has sparse gradients, which hypergradients don't work with ({text}); make "
            "the embedding with sparse=False"
        ),
    ),
    (
        r"One of the differentiated Tensors does not require grad",
        _says(
            "its training_step freezes (requires_grad) parameters that are to be differentiated "
            "by; leave those of the levels on the hypergradient's path as they are"
        ),
    ),
)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """A block that differentiates the loss of problem ``name``.

    Raises:
        UserError: in place of torch's own words, for what it is known to refuse.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        for pattern, tell in _KNOWN:
            match = re.search(pattern, str(error))
            if match is not None and _by_torch(error):
                raise UserError(f"problem {name!r}: {tell(match, one_line(error))}") from error
        raise


def _by_torch(error: BaseException) -> bool:
    """Whether torch's differentiation raised it, and not a loss or a network on its own account."""
    names, trace = [""], error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    # The formulas of other libraries' operators are called from within torch.autograd. What says
    # that it isn't implemented needn't have a frame of its own: it may be called by the loss.
    return (
        names[-1].split(".")[0] in ("torch", "mlseg", "higher")
        or "torch.autograd.graph" in names
        or isinstance(error, NotImplementedError)
    )


_ONCE = once_differentiable(lambda ctx: None).__code__

_LIBRARYS = re.compile(r"^GeneratedBackwardFor_(\w+)Backward$|CppNode<(.+)>")
"""Nodes of operators made by ``torch.library`` or in C++: they have no forward-mode formulas."""


def check_differentiable(
    name: str, loss: Tensor, parameters: Sequence[Tensor], forwards: bool
) -> None:
    """Check that what stands between a loss and its level's parameters has second derivatives.

    Args:
        name: of the problem whose loss it is.
        loss: with its graph.
        parameters: leaves.
        forwards: they are taken by forward-mode derivatives of the backward pass.

    Raises:
        UserError: a function is ``once_differentiable``, or, ``forwards``, an operator of a
            library's; it names it.
    """
    leaves = {id(p) for p in parameters}
    leads: dict[Any, bool] = {}
    stack: list[tuple[Any, bool]] = [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if node is None or (not done and node in leads):
            continue
        following = [after for after, _ in node.next_functions if after is not None]
        if not done:
            leads[node] = id(getattr(node, "variable", None)) in leaves
            stack.append((node, True))
            stack += [(after, False) for after in following]
            continue
        leads[node] = leads[node] or any(leads[after] for after in following)
        if not leads[node]:
            continue
        if forwards:
            operator = _LIBRARYS.search(node.name())
            if operator is not None:
                found = operator[1] or operator[2]
                raise UserError(
                    f"problem {name!r}: {found} in its loss has no forward-mode derivative; "
                    f"set the hypergradient's mode to double_backward, or {_FIRST}"
                )
            continue
        function: Any = getattr(node, "_forward_cls", None)
        backward = getattr(getattr(function, "backward", None), "__code__", None)
        if backward is _ONCE:
            raise UserError(
                f"problem {name!r}: {function.__name__} in its loss is marked once_differentiable "
                f"and {_TWICE}; {_FIRST} (a method of your own that does so as well says it by "
                "first_derivatives_alone)"
            )
