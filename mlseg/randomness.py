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


def capture(device: torch.device | str = "cpu") -> RandomState:
    """The state of every global generator that a step may draw from.

    Args:
        device: where the step runs; a CUDA device's generator is captured too. Its state lives on
            the host, so that this doesn't synchronise with the device.

    Returns:
        a dict of tensors, numbers and lists, which ``torch.load(weights_only=True)`` accepts.
    """
    version, internal, gauss = random.getstate()
    generator = np.random.get_state(legacy=False)
    state: RandomState = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
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
    """Set every global generator to ``state``; the inverse of :func:`capture`.

    Raises:
        ValueError, TypeError, RuntimeError, KeyError: it is no such state.
    """
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    generator = state["numpy"]
    if not 0 <= generator["pos"] <= len(generator["key"]):
        raise ValueError(f"numpy's generator has no position {generator['pos']}")
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
    """Seed torch (all devices), numpy and Python; the start of every run."""
    random.seed(seed)
    np.random.seed(seed)
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
