"""A problem's data loaders, read so that a resumed run goes on with the next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mlseg import randomness
from mlseg.checkpoint import require_form
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
        self._waits = False

    @property
    def started(self) -> bool:
        """Whether :meth:`start` has been called, here or in the run that is resumed."""
        return self.by_itself or self._start is not None

    def start(self) -> Iterator[Any]:
        """Begin an epoch."""
        if not self.by_itself:
            self._start = {"global": randomness.capture(self.device), "own": self.own_states()}
            self._drawn = 0
        return iter(self.loader)

    def start_and_wait(self) -> Iterator[Any]:
        """Begin an epoch whose first batch is drawn later, when others may have drawn numbers.

        Betty's problems begin their first one so, while the engine is set up.
        """
        self._waits = not self.by_itself
        return self.start()

    def before_draw(self) -> None:
        """A batch is about to be drawn."""
        if self._waits and self._start is not None:
            self._start["first"] = randomness.capture(self.device)
            self._waits = False

    def draw(self) -> None:
        """A batch of the epoch has been drawn."""
        self._drawn += 1

    def state_dict(self) -> dict[str, Any]:
        """The place, as tensors and plain values."""
        if self.by_itself:
            return {"loader": self.loader.state_dict()}
        place = {"start": self._start, "drawn": self._drawn, "own": self.own_states()}
        return {**place, "waits": True} if self._waits else place

    def load_state_dict(self, state: dict[str, Any]) -> Iterator[Any] | None:
        """Go there; returns the iterator over the rest of the epoch, None if none was started."""
        if "loader" in state:
            self.loader.load_state_dict(state["loader"])
            return iter(self.loader)
        self._start, self._drawn = state["start"], state["drawn"]
        if isinstance(self._drawn, bool) or not isinstance(self._drawn, int) or self._drawn < 0:
            raise ValueError(f"loaders.drawn is {str(self._drawn)[:40]!r}, no number of batches")
        self._waits = state.get("waits", False)
        rest = None
        if self._start is not None:
            with randomness.replayed(self._start["global"], self.device):
                self.set_own(self._start["own"])
                rest = iter(self.loader)
                if "first" in self._start:
                    randomness.restore(self._start["first"], self.device)
                for number in range(self._drawn):
                    if next(rest, self) is self:
                        raise ValueError(f"loaders.drawn is {self._drawn}, of {number} batches")
        self.set_own(state["own"])
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
        held = [getattr(holder, "generator", None) for holder in holders]
        unique = {id(g): g for g in held if isinstance(g, torch.Generator)}
        return list(unique.values())

    def own_states(self) -> list[Tensor]:
        """States of the generators that the loader was given."""
        return [generator.get_state() for generator in self._own()]

    def set_own(self, states: Sequence[Tensor]) -> None:
        """Put :meth:`own_states` back."""
        for generator, state in zip(self._own(), states, strict=True):
            generator.set_state(state)


class Stream:
    """Batches from a problem's loaders, one after the other.

    Args:
        places: one per loader.
        iterators: over each loader's present epoch; a list of the caller's, kept up to date.
        epochs: of each loader so far; likewise.
    """

    def __init__(self, places: list[Place], iterators: list[Any], epochs: list[int]) -> None:
        self.places, self.iterators, self.epochs = places, iterators, epochs

    def next(self, index: int, at_end: Callable[[], None] | None = None) -> Any:
        """The next batch of a loader.

        Args:
            at_end: called when its epoch is over, before the next one starts.
        """
        place = self.places[index]
        if not place.started:
            # Betty starts the first pass while it sets up; start it here, from a known state.
            self.iterators[index] = place.start()
        place.before_draw()
        try:
            batch = next(self.iterators[index])
        except StopIteration:
            if at_end is not None:
                at_end()
            self.epochs[index] += 1
            self.iterators[index] = place.start()
            batch = next(self.iterators[index])
        place.draw()
        return batch

    def replace(self, index: int, loader: Any) -> None:
        """Another loader in the place of one; the next batch comes from it."""
        self.iterators[index] = iter(loader)
        self.places[index] = Place(loader, self.places[index].device)

    def apart(self) -> Stream:
        """A second stream of the same data, in another order; this one takes no note of it."""
        places = [place.apart() for place in self.places]
        return Stream(places, [iter(()) for _ in places], [0] * len(places))

    def state_dict(self) -> list[dict[str, Any]]:
        """Where each loader is."""
        return [
            {"epoch": epoch, **place.state_dict()}
            for epoch, place in zip(self.epochs, self.places, strict=True)
        ]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go there."""
        for index, (place, state) in enumerate(zip(self.places, states, strict=True)):
            require_form(0, state.get("epoch", 0), "loaders.epoch")
            self.epochs[index] = state.get("epoch", 0)
            rest = place.load_state_dict(dict(state))
            if rest is not None:
                self.iterators[index] = rest


class FreshBatches:
    """Batches of a problem's data beside those that it trains on.

    They come from a second stream of its loaders, with its own order and random draws (those of the
    problem's ``torch.Generator`` attributes included): neither training's order nor any random
    stream of it notices. The second stream is seeded by the problem's name.

    Args:
        name: the problem's.
        training: the stream that it trains on.
        device: where it runs.
    """

    def __init__(self, name: str, training: Stream, device: torch.device | str) -> None:
        self.name, self.training, self.device = name, training, device
        self._stream: Stream | None = None
        self._random_state: randomness.RandomState | None = None
        self._generators: dict[str, Tensor] = {}
        self._saved: list[dict[str, Any]] = []

    @contextmanager
    def drawing(self, generators: Mapping[str, torch.Generator]) -> Iterator[Stream]:
        """A block that draws from the second stream, which it gives, and leaves no other trace.

        Args:
            generators: the problem's own, by name.
        """
        stream = self._stream = self._stream or self._begin(generators)
        kept = {key: generator.get_state() for key, generator in generators.items()}
        own = [place.own_states() for place in self.training.places]
        try:
            with randomness.replayed(self._random_state, self.device):
                for key, generator in generators.items():
                    generator.set_state(self._generators[key])
                yield stream
                self._random_state = randomness.capture(self.device)
                self._generators = {k: g.get_state() for k, g in generators.items()}
        finally:
            for place, states in zip(self.training.places, own, strict=True):
                place.set_own(states)
            for key, generator in generators.items():
                generator.set_state(kept[key])

    def _begin(self, generators: Mapping[str, torch.Generator]) -> Stream:
        for place in self.training.places:
            if isinstance(place.loader, Iterator):  # iter() would start a pass of training's
                raise UserError(
                    f"problem {self.name!r}: its loader can be walked through only once, by "
                    "training; give it one that starts anew with each iter(), such as a DataLoader "
                    "or a list, or take a hypergradient method that needs no fresh batches (cg)"
                )
        if self._random_state is None:
            with randomness.seeded(0, f"fresh batches of {self.name}"):
                self._random_state = randomness.capture(self.device)
            self._generators = {
                key: generator.clone_state()
                .manual_seed(randomness.derived(0, f"{self.name}/{key}"))
                .get_state()
                for key, generator in generators.items()
            }
        stream = self.training.apart()
        if self._saved:
            stream.load_state_dict(self._saved)
        return stream

    def restart(self) -> None:
        """The problem's loaders have changed: begin anew with them, at the next draw."""
        self._stream, self._saved = None, []

    def state_dict(self) -> dict[str, Any]:
        """Where the second stream is; next to nothing before it has begun."""
        places = self._saved
        if self._stream is not None:
            places = [place.state_dict() for place in self._stream.places]
        return {
            "random_state": self._random_state,
            "generators": self._generators,
            "places": places,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._random_state = state["random_state"]
        self._generators = dict(state["generators"])
        self._stream = None
        self._saved = list(state["places"])
