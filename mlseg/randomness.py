"""Random state as a value: captured, replayed, stored in a checkpoint.

A step of a problem may draw random numbers (dropout, augmentation). A hypergradient that evaluates
the step again must see the same draw: with redrawn augmentation and dropout a finite difference has
next to no correlation with the true hypergradient.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]

Generator = torch.Generator | np.random.RandomState | np.random.Generator | random.Random
"""A generator of a program's own."""

LARGEST_SEED = 2**64 - 1
"""That torch takes."""


def capture(device: torch.device | str = "cpu") -> RandomState:
    """The state of every global generator that a step may draw from.

    Args:
        device: where the step runs; a CUDA device's generator is captured too. Its state lives on
            the host, so that this doesn't synchronise with the device.

    Returns:
        a dict of tensors, numbers and lists, which ``torch.load(weights_only=True)`` accepts.
    """
    generator = np.random.get_state(legacy=False)
    state: RandomState = {
        "torch": torch.get_rng_state(),
        "python": _of_python(random.getstate()),
        "numpy": {
            "bit_generator": generator["bit_generator"],
            "key": torch.from_numpy(generator["state"]["key"].astype(np.int64)),
            "pos": generator["state"]["pos"],
            "has_gauss": generator["has_gauss"],
            "gauss": generator["gauss"],
        },
    }
    device = torch.device(device)
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: RandomState, device: torch.device | str = "cpu") -> None:
    """Set every global generator to ``state``; the inverse of :func:`capture`."""
    torch.set_rng_state(state["torch"])
    random.setstate(_for_python(state["python"]))
    generator = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": generator["bit_generator"],
            "state": {
                "key": generator["key"].numpy().astype(np.uint32),
                "pos": generator["pos"],
            },
            "has_gauss": generator["has_gauss"],
            "gauss": generator["gauss"],
        }
    )
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
