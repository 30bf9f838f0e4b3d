"""Where a data loader is in its epoch, so that a resumed run goes on with the next batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlseg import randomness
from mlseg.errors import UserError


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

    def apart(self) -> Place:
        """A place of its own in the same data, in another order; this one takes no note of it."""
        sibling = getattr(self.loader, "sibling", None)
        return Place(sibling() if callable(sibling) else self.loader, self.device)

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


class FreshBatches:
    """Batches of a problem's data beside those that it trains on.

    They come from a second pass over the loaders, with its own order and random draws (those of the
    problem's ``torch.Generator`` attributes included): neither training's order nor any random
    stream of it notices. The pass is seeded by the problem's name.

    Args:
        name: the problem's.
        device: where it runs.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.name, self.device = name, device
        self.drawing = False
        """True while a batch is being drawn."""
        self._random_state: randomness.RandomState | None = None
        self._generators: dict[str, Tensor] = {}
        self._places: list[Place] = []
        self._saved: list[dict[str, Any]] = []
        self._iterators: list[Any] = []

    def draw(self, problem: Any) -> Any:
        """The next batch, by the problem's own ``get_batch``."""
        if not self._places:
            self._begin(problem)
        generators = _generators(problem)
        kept = {key: generator.get_state() for key, generator in generators.items()}
        training = (problem._places, problem.train_data_iterator, problem.epoch_counter)
        own = [place._own_states() for place in problem._places]
        problem._places, problem.train_data_iterator = self._places, self._iterators
        problem.epoch_counter = [0] * len(self._places)
        self.drawing = True
        try:
            with randomness.replayed(self._random_state, self.device):
                for key, generator in generators.items():
                    generator.set_state(self._generators[key])
                batch = problem.get_batch()
                self._random_state = randomness.capture(self.device)
                self._generators = {k: g.get_state() for k, g in generators.items()}
            return batch
        finally:
            self.drawing = False
            problem._places, problem.train_data_iterator, problem.epoch_counter = training
            for place, states in zip(problem._places, own, strict=True):
                place._set_own(states)
            for key, generator in generators.items():
                generator.set_state(kept[key])

    def _begin(self, problem: Any) -> None:
        for place in problem._places:
            if isinstance(place.loader, Iterator):  # iter() would start a pass of training's
                raise UserError(
                    f"problem {problem.name!r}: its loader can be walked through only once, by "
                    "training; give it one that starts anew with each iter(), such as a DataLoader "
                    "or a list, or take a hypergradient method that needs no fresh batches (cg)"
                )
        self._places = [place.apart() for place in problem._places]
        self._iterators = [iter(()) for _ in self._places]
        if self._random_state is None:
            with randomness.seeded(0, f"fresh batches of {self.name}"):
                self._random_state = randomness.capture(self.device)
            self._generators = {
                key: generator.clone_state()
                .manual_seed(randomness.derived(0, f"{self.name}/{key}"))
                .get_state()
                for key, generator in _generators(problem).items()
            }
        for index, (place, state) in enumerate(zip(self._places, self._saved, strict=False)):
            rest = place.load_state_dict(state)
            if rest is not None:
                self._iterators[index] = rest

    def state_dict(self) -> dict[str, Any]:
        """Where the second pass is; next to nothing before it has begun."""
        return {
            "random_state": self._random_state,
            "generators": self._generators,
            "places": [place.state_dict() for place in self._places] or self._saved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._random_state = state["random_state"]
        self._generators = dict(state["generators"])
        self._places, self._iterators = [], []
        self._saved = list(state["places"])


def _generators(problem: Any) -> dict[str, torch.Generator]:
    return {k: v for k, v in vars(problem).items() if isinstance(v, torch.Generator)}
