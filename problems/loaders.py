"""Where a data loader is in its epoch, so that a resumed run goes on with the next batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlseg import randomness


class Place:
    """The place of one loader.

    A loader with a ``state_dict`` of its own (``BatchLoader``, torchdata's) keeps its place by
    itself. For any other one (``DataLoader``, a list) the random state in which the epoch began is
    kept, with the number of batches drawn since; it is put back by starting the epoch from that
    state again and passing over these batches.

    Args:
        loader: an iterable of batches.
        device: whose generator belongs to the random state.
    """

    def __init__(self, loader: Any, device: torch.device | str) -> None:
        self.loader = loader
        self.device = device
        self.by_itself = callable(getattr(loader, "state_dict", None))
        self._start: dict[str, Any] | None = None
        self._drawn = 0

    @property
    def started(self) -> bool:
        """Whether :meth:`start` has been called, here or in the run that is resumed."""
        return self.by_itself or self._start is not None

    def start(self) -> Iterator[Any]:
        """Begin an epoch."""
        if not self.by_itself:
            self._start = {"global": randomness.capture(self.device), "own": self._own_states()}
            self._drawn = 0
        return iter(self.loader)

    def draw(self) -> None:
        """A batch of the epoch has been drawn."""
        self._drawn += 1

    def state_dict(self) -> dict[str, Any]:
        """The place, as tensors and plain values."""
        if self.by_itself:
            return {"loader": self.loader.state_dict()}
        return {"start": self._start, "drawn": self._drawn, "own": self._own_states()}

    def load_state_dict(self, state: dict[str, Any]) -> Iterator[Any] | None:
        """Go there; returns the iterator over the rest of the epoch, None if none was started."""
        if "loader" in state:
            self.loader.load_state_dict(state["loader"])
            return iter(self.loader)
        self._start, self._drawn = state["start"], state["drawn"]
        rest = None
        if self._start is not None:
            with randomness.replayed(self._start["global"], self.device):
                self._set_own(self._start["own"])
                rest = iter(self.loader)
                for _ in range(self._drawn):
                    next(rest)
        self._set_own(state["own"])
        return rest

    def _own(self) -> list[torch.Generator]:
        """Generators that a ``DataLoader`` and its samplers were given."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        holders = [
            self.loader,
            getattr(self.loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        ]
        found = [getattr(holder, "generator", None) for holder in holders]
        unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
        return list(unique.values())

    def _own_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._own()]

    def _set_own(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._own(), states, strict=True):
            generator.set_state(state)
