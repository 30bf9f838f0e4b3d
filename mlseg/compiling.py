"""A level's network by torch.compile: in place, for static shapes, and refused in one line.

What calls the network finds the compiled one: a training step, an evaluation, a hop. Its parameters
and the names of its state stay as they are; a copy of it isn't compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

from mlseg.errors import RunError, UserError, one_line

Backend = str | Callable[..., Any]

SHAPES = 64
"""Ways in which one network may be compiled: shapes of a batch, training and evaluation."""

_SETTINGS = {
    "recompile_limit": SHAPES,
    # In place of the uncompiled network, which a resumed run would come to at another time.
    "fail_on_recompile_limit_hit": True,
    # A hook that is registered later on is seen.
    "skip_nnmodule_hook_guards": False,
}

_off = False


class Compiled:
    """What is called in a module's place.

    Args:
        name: of the level.
        call: the module's own call.
        backend: torch's name of it, or a function that is one.

    Attributes:
        called: whether it has ever been.
    """

    def __init__(self, name: str, call: Callable[..., Any], backend: Backend) -> None:
        self.name = name
        self.called = False
        self._call = call
        self._compiled = torch.compile(call, backend=backend, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output.

        Raises:
            RunError: it can't be compiled.
        """
        self.called = True
        if _off:
            return self._call(*args, **kwargs)
        import torch._dynamo.config as dynamo
        import torch._functorch.config as functorch
        from torch._dynamo import exc

        # A step's graph may be gone through twice (`retain_graph`), which buffers that the first
        # pass gives away wouldn't outlive. torch asks again when that is done, in a thread of
        # autograd's, where nothing but the default of a setting is seen.
        donated = getattr(functorch, "_config", {}).get("donated_buffer")
        if donated is not None:  # another torch may not give any away
            donated.default = False
        with dynamo.patch(_SETTINGS), _without_our_modes():
            try:
                return self._compiled(*args, **kwargs)
            except exc.FailOnRecompileLimitHit as error:
                raise RunError(
                    f"problem {self.name!r}: compile: its network is called in more than {SHAPES} "
                    "ways (sizes of images and batches, numbers that it keeps and changes), and "
                    f"each is compiled by itself; {_drop(self.name)}"
                ) from error
            except exc.TorchDynamoException as error:
                raise RunError(f"problem {self.name!r}: compile: {_why(self.name, error)}") from (
                    error
                )


def compile_module(name: str, module: nn.Module, backend: Backend) -> None:
    """Have a level's network compiled when it is first called.

    Args:
        name: of the level.
        backend: torch's name of it, or a function that is one.
    """
    if not is_compiled(module):
        module._compiled_call_impl = Compiled(name, module._call_impl, backend)


def is_compiled(module: nn.Module) -> bool:
    """Whether :func:`compile_module` has been here."""
    return isinstance(module._compiled_call_impl, Compiled)


def check_called(name: str, module: nn.Module) -> None:
    """Refuse a compiled network that nothing calls.

    Args:
        name: of the level, after its step.

    Raises:
        UserError: nothing would be compiled.
    """
    compiled = module._compiled_call_impl
    if isinstance(compiled, Compiled) and not compiled.called:
        raise UserError(
            f"problem {name!r}: compile: its network is never called as a whole (module(...)), so "
            f"that nothing is compiled; call it so, or {_drop(name)}"
        )


def check_backend(compile: bool | str) -> bool | str:
    """What ``compile`` is set to, if it can be.

    Raises:
        ValueError: torch knows no such backend.
    """
    if isinstance(compile, str):
        from torch._dynamo import list_backends

        known = [b for b in list_backends(None) if not b.endswith("TESTING_ONLY")]
        if compile not in known:
            raise ValueError(
                f"compile {compile!r}: choose true, false or a backend of torch.compile: "
                + ", ".join(known)
            )
    return compile


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within this block networks are called as they are."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@contextmanager
def _without_our_modes() -> Iterator[None]:
    """Without what looks at a loss's operations from outside; a compiler would look into it."""
    with ExitStack() as stack:
        for mode in reversed(_get_current_function_mode_stack()):
            if not type(mode).__module__.startswith("mlseg."):
                break
            stack.enter_context(_pop_mode_temporarily())
        yield


def _drop(name: str) -> str:
    return f"set compile to false (problems.{name}.compile)"


def _why(name: str, error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)
    cause: BaseException | None = error
    while cause is not None:
        if "No working C++ compiler" in str(cause) or type(cause).__name__ == "InvalidCxxCompiler":
            return f"there is no working C++ compiler; install one (g++), or {_drop(name)}"
        cause = cause.__cause__ or cause.__context__
    return f"torch can't compile its network ({one_line(error)}); {_drop(name)}"
