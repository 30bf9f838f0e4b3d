"""Random state as a value: captured, replayed, stored in a checkpoint.

A step of a problem may draw random numbers (dropout, augmentation). A hypergradient that evaluates
the step again must see the same draw: with redrawn augmentation and dropout a finite difference has
next to no correlation with the true hypergradient.
"""

import ctypes
import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch._C import _len_torch_dispatch_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")

RandomState = dict[str, Any]

Generator = torch.Generator | np.random.RandomState | np.random.Generator | random.Random
"""A generator of a program's own."""

LARGEST_SEED = 2**64 - 1
"""That torch takes."""


class _Known:
    """A global generator's state. It takes most of a capture to copy one out, and most steps never
    draw from it: what is known to be unchanged isn't copied again.

    Args:
        look: what shows that somebody has drawn; None where nothing does.
        copy: the state, and whether ``look`` shows all of it.
        put: the inverse of ``copy``.
    """

    def __init__(
        self,
        look: Callable[[], Any],
        copy: Callable[[], tuple[Any, bool]],
        put: Callable[[Any], None],
    ) -> None:
        self._look, self._copy, self._put = look, copy, put
        self._state: Any = None
        self._seen: Any = None

    def capture(self) -> Any:
        seen = self._look()
        if self._seen is None or seen != self._seen:
            self._state, shown = self._copy()
            self._seen = seen if shown else None
        return self._state

    def restore(self, state: Any) -> None:
        if state is self._state and self._seen is not None and self._look() == self._seen:
            return
        self._put(state)
        self._state = self._seen = None


_WORDS = 4 * 624
"""Bytes of a Mersenne twister's words. numpy has its place among them, an int, behind them, and
Python before them."""


def _generator() -> Any:
    """numpy's global one; its annotations don't know the function."""
    return np.random.get_bit_generator()  # type: ignore[attr-defined]


def _look_at_numpy() -> Any:
    generator = _generator()
    if type(generator) is not np.random.MT19937 or not _NUMPY_LIES_SO:
        return None
    return generator, ctypes.string_at(generator.ctypes.state_address, _WORDS + 4)


def _copy_numpy() -> tuple[RandomState, bool]:
    values = np.random.get_state(legacy=False)
    state = {
        "bit_generator": values["bit_generator"],
        "key": torch.from_numpy(values["state"]["key"].astype(np.int64)),
        "pos": values["state"]["pos"],
        "has_gauss": values["has_gauss"],
        "gauss": values["gauss"],
    }
    # A normal number that it keeps for the next draw stands elsewhere. Where there was none, a new
    # one would have come with new words; where there was one, it may be gone.
    return state, not values["has_gauss"]


def _put_numpy(state: RandomState) -> None:
    if not 0 <= state["pos"] <= len(state["key"]):
        raise ValueError(f"numpy's generator has no position {state['pos']}")
    np.random.set_state(
        {
            "bit_generator": state["bit_generator"],
            "state": {"key": state["key"].numpy().astype(np.uint32), "pos": state["pos"]},
            "has_gauss": state["has_gauss"],
            "gauss": state["gauss"],
        }
    )


def _look_at_python() -> Any:
    getstate: Any = random.getstate  # whose annotation doesn't know of what it is a method
    generator: Any = getstate.__self__
    kind: type = type(generator)
    if kind is not random.Random or not _PYTHON_LIES_SO:
        return None
    return generator, ctypes.string_at(id(generator) + _HEAD, 4 + _WORDS), generator.gauss_next


_HEAD = object.__basicsize__
"""Bytes of a Python object before what is its own."""


def _numpy_lies_so() -> bool:
    """Whether this numpy keeps a generator's words where they are looked at."""
    generator = np.random.MT19937(7)
    generator.random_raw(3)
    state = generator.state["state"]
    raw = ctypes.string_at(generator.ctypes.state_address, _WORDS + 4)
    place = int(np.frombuffer(raw[_WORDS:], np.int32)[0])
    return bool((np.frombuffer(raw[:_WORDS], np.uint32) == state["key"]).all()) and (
        place == state["pos"]
    )


def _python_lies_so() -> bool:
    """Whether this Python does."""
    generator = random.Random(7)
    generator.random()
    _, (*words, place), _ = generator.getstate()
    if sys.implementation.name != "cpython" or generator.__sizeof__() < _HEAD + 4 + _WORDS:
        return False
    raw = ctypes.string_at(id(generator) + _HEAD, 4 + _WORDS)
    return np.frombuffer(raw, np.uint32).tolist() == [place, *words]


_NUMPY_LIES_SO, _PYTHON_LIES_SO = _numpy_lies_so(), _python_lies_so()
_NUMPY = _Known(_look_at_numpy, _copy_numpy, _put_numpy)
_PYTHON = _Known(
    _look_at_python,
    lambda: (_of_python(random.getstate()), True),
    lambda state: random.setstate(_for_python(state)),
)


def _by_itself(function: Callable[P, T]) -> Callable[P, T]:
    """States are numbers: what watches or replaces operations (a dry run's fake tensors) isn't for
    them."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _len_torch_dispatch_stack() and not _len_torch_dispatch_stack_pre_dispatch():
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return alone


@_by_itself
def capture(device: torch.device | str = "cpu") -> RandomState:
    """The state of every global generator that a step may draw from.

    Args:
        device: where the step runs; a CUDA device's generator is captured too. Its state lives on
            the host, so that this doesn't synchronise with the device.

    Returns:
        a dict of tensors, numbers and lists, which ``torch.load(weights_only=True)`` accepts.
    """
    state: RandomState = {
        "torch": torch.get_rng_state(),
        "python": _PYTHON.capture(),
        "numpy": _NUMPY.capture(),
    }
    device = torch.device(device)
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


@_by_itself
def restore(state: RandomState, device: torch.device | str = "cpu") -> None:
    """Set every global generator to ``state``; the inverse of :func:`capture`.

    Raises:
        ValueError, TypeError, RuntimeError, KeyError: it is no such state.
    """
    torch.set_rng_state(state["torch"])
    _PYTHON.restore(state["python"])
    _NUMPY.restore(state["numpy"])
    device = torch.device(device)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# ------------------------------------------------------------- generators of a program's own


def is_generator(thing: Any) -> bool:
    """Whether it is a generator whose state can be had and put back."""
    if isinstance(thing, np.random.RandomState):
        return bool(thing.get_state(legacy=False)["bit_generator"] == "MT19937")
    return isinstance(
        thing, (torch.Generator, np.random.Generator, random.Random)
    ) and not isinstance(thing, random.SystemRandom)


def global_generators() -> list[Generator]:
    """Those whose state :func:`capture` has, as far as they are objects."""
    bound: tuple[Any, ...] = (random.random, np.random.random_sample)
    return [torch.default_generator, *(function.__self__ for function in bound)]


def own_state(generator: Generator) -> Any:
    """A generator's state, in what ``torch.load(weights_only=True)`` accepts."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _of_python(generator.getstate())
    return _of_numpy(_numpy_state(generator))


def set_own_state(generator: Generator, state: Any) -> None:
    """The inverse of :func:`own_state`."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_for_python(state))
    else:
        whole = _for_numpy(state, _numpy_state(generator))
        if isinstance(generator, np.random.RandomState):
            generator.set_state(whole)
        else:
            generator.bit_generator.state = whole


def state_from_seed(generator: Generator, seed: int) -> Any:
    """The state of a generator of the same kind that starts from ``seed``."""
    if isinstance(generator, torch.Generator):
        return generator.clone_state().manual_seed(seed).get_state()
    if isinstance(generator, random.Random):
        return own_state(random.Random(seed))
    if isinstance(generator, np.random.RandomState):
        return own_state(np.random.RandomState(seed))
    kind: Any = type(generator.bit_generator)
    return own_state(np.random.Generator(kind(seed)))


def _of_python(state: Any) -> list[Any]:
    version, internal, gauss = state
    return [version, list(internal), gauss]


def _for_python(state: Any) -> Any:
    version, internal, gauss = state
    return version, tuple(internal), gauss


def _numpy_state(generator: np.random.RandomState | np.random.Generator) -> Any:
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _of_numpy(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _of_numpy(value) for key, value in state.items()}
    # Words of 64 bits without sign keep their bits.
    return torch.from_numpy(state.astype(np.int64)) if isinstance(state, np.ndarray) else state


def _for_numpy(state: Any, like: Any) -> Any:
    if isinstance(like, dict):
        return {key: _for_numpy(state[key], value) for key, value in like.items()}
    return state.numpy().astype(like.dtype) if isinstance(like, np.ndarray) else state


# -------------------------------------------------------------------------------------------


@contextmanager
def replayed(state: RandomState | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the body from ``state`` and put the present random state back afterwards.

    With ``None`` the body runs from the present state, which is put back as well: whatever the body
    draws, training goes on as if it had drawn nothing.
    """
    present = capture(device)
    if state is not None:
        restore(state, device)
    try:
        yield
    finally:
        restore(present, device)


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python; the start of every run.

    Args:
        seed: from 0 to :data:`LARGEST_SEED`.
    """
    random.seed(seed)
    # numpy takes 32 bits, or words of them.
    np.random.seed(seed if seed < 2**32 else [seed % 2**32, seed >> 32])
    torch.manual_seed(seed)


def derived(seed: int, name: str) -> int:
    """A seed for the part ``name`` of a run: independent of the order in which parts are made."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Run the body (making a network, say) from :func:`derived`'s seed, and leave no trace."""
    with replayed(None):
        # Not torch.manual_seed: that seeds CUDA's generators too, which aren't put back here.
        torch.default_generator.manual_seed(derived(seed, name))
        yield
