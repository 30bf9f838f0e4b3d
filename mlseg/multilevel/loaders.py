"""A problem's data loaders, read so that a resumed run goes on with the next batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mlseg import randomness
from mlseg.checkpoint import require_form
from mlseg.errors import RunError, UserError
from mlseg.multilevel.belongings import of_loader


class Place:
    """The place of one loader.

    A loader with a ``state_dict`` of its own (``BatchLoader``, torchdata's) keeps its place by
    itself. For any other one (``DataLoader``, a list) the random state in which the epoch began is
    kept, with the number of batches drawn since; it is put back by starting the epoch from that
    state again and passing over these batches. Generators of the data set's own (of its
    transforms, of its samplers) belong to the random state, where they are in this process.

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
        self._found: dict[str, randomness.Generator] | None = None
        self.passed = False  # whether it has given any batch

    @property
    def started(self) -> bool:
        """Whether :meth:`start` has been called, here or in the run that is resumed."""
        return self.by_itself or self._start is not None

    def start(self) -> Iterator[Any]:
        """Begin an epoch."""
        if not self.by_itself:
            self._start = {
                "global": randomness.capture(self.device),
                "own": self.own_states(),
                "found": self.found_states(),
            }
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
        self.passed = True

    def state_dict(self) -> dict[str, Any]:
        """The place, as tensors and plain values."""
        if self.by_itself:
            return {"loader": self.loader.state_dict()}
        place = {
            "start": self._start,
            "drawn": self._drawn,
            "own": self.own_states(),
            "found": self.found_states(),
        }
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
                self.set_found(self._start.get("found", {}))
                rest = iter(self.loader)
                if "first" in self._start:
                    randomness.restore(self._start["first"], self.device)
                for number in range(self._drawn):
                    if next(rest, self) is self:
                        raise ValueError(f"loaders.drawn is {self._drawn}, of {number} batches")
        self.set_own(state["own"])
        self.set_found(state.get("found", {}))
        return rest

    def apart(self, name: str) -> Place:
        """A place of its own in the same data, in another order; this one takes no note of it.

        Raises:
            UserError: the loader of problem ``name`` has but one pass at a time.
        """
        sibling = getattr(self.loader, "sibling", None)
        if callable(sibling):
            return Place(sibling(), self.device)
        if self.by_itself or isinstance(self.loader, Iterator):
            raise _only_one_pass(name)
        if isinstance(self.loader, DataLoader) and self.loader.persistent_workers:
            # Its passes share their workers, and a second one would begin the first one anew.
            other = copy.copy(self.loader)
            other.__dict__["persistent_workers"] = False
            return Place(other, self.device)
        return Place(self.loader, self.device)

    def attributes(self) -> dict[str, Any]:
        """What a pass may keep its place in, if it isn't in an iterator of its own."""
        if isinstance(self.loader, DataLoader):
            return {}
        values = getattr(self.loader, "__dict__", {})
        return {k: v for k, v in values.items() if isinstance(v, (int, Iterator))}

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

    def generators(self) -> dict[str, randomness.Generator]:
        """Generators found in the loader beside those."""
        if self._found is None:
            known = {id(generator) for generator in self._own()}
            found = of_loader(self.loader).generators
            self._found = {path: g for path, g in found.items() if id(g) not in known}
        return self._found

    def found_states(self) -> dict[str, Any]:
        """States of the generators that were found in the loader."""
        return {path: randomness.own_state(g) for path, g in self.generators().items()}

    def set_found(self, states: Mapping[str, Any]) -> None:
        """Put :meth:`found_states` back."""
        for path, state in states.items():
            if path in self.generators():
                randomness.set_own_state(self.generators()[path], state)

    def set_own(self, states: Sequence[Tensor]) -> None:
        """Put :meth:`own_states` back."""
        for generator, state in zip(self._own(), states, strict=True):
            generator.set_state(state)


class Stream:
    """Batches from a problem's loaders, one after the other.

    Args:
        name: the problem's.
        places: one per loader.
        iterators: over each loader's present epoch; a list of the caller's, kept up to date.
        epochs: of each loader so far; likewise.
    """

    def __init__(
        self, name: str, places: list[Place], iterators: list[Any], epochs: list[int]
    ) -> None:
        self.name = name
        self.places, self.iterators, self.epochs = places, iterators, epochs

    def next(self, index: int, at_end: Callable[[], None] | None = None) -> Any:
        """The next batch of a loader.

        Args:
            at_end: called when its epoch is over, before the next one starts.

        Raises:
            UserError: it gives none at all.
            RunError: it gives no more, and can't be begun anew.
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
            try:
                batch = next(self.iterators[index])
            except StopIteration:
                raise self._has_ended(place, self.epochs[index]) from None
        place.draw()
        return batch

    def _has_ended(self, place: Place, epochs: int) -> Exception:
        if isinstance(place.loader, Iterator) and place.passed:
            return RunError(
                f"problem {self.name!r}: its loader can be walked through only once, and is used "
                "up; give it one that starts anew with each iter(), such as a DataLoader or a list"
            )
        kind = UserError if epochs <= 1 else RunError
        return kind(_no_batch(self.name))

    def replace(self, index: int, loader: Any) -> None:
        """Another loader in the place of one; the next batch comes from it."""
        self.iterators[index] = iter(loader)
        self.places[index] = Place(loader, self.places[index].device)

    def apart(self) -> Stream:
        """A second stream of the same data, in another order; this one takes no note of it."""
        places = [place.apart(self.name) for place in self.places]
        return Stream(self.name, places, [iter(()) for _ in places], [0] * len(places))

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

    They come from a second stream of its loaders, with its own order and random draws (those of
    generators of the problem's and the data set's own included): neither training's order nor any
    random stream of it notices. The second stream is seeded by the problem's name.

    Args:
        name: the problem's.
        training: the stream that it trains on.
        device: where it runs.
    """

    def __init__(self, name: str, training: Stream, device: torch.device | str) -> None:
        self.name, self.training, self.device = name, training, device
        self._stream: Stream | None = None
        self._random_state: randomness.RandomState | None = None
        self._generators: dict[str, Any] = {}
        self._saved: list[dict[str, Any]] = []

    @contextmanager
    def drawing(self, generators: Mapping[str, randomness.Generator]) -> Iterator[Stream]:
        """A block that draws from the second stream, which it gives, and leaves no other trace.

        Args:
            generators: the problem's own, by name.
        """
        stream = self._stream = self._stream or self._begin()
        places = self.training.places
        generators = {**generators, **_in_loaders(places)}
        kept = _states(generators)
        own = [place.own_states() for place in places]
        cursors = [place.attributes() for place in places]
        try:
            with randomness.replayed(self._random_state, self.device):
                for key, generator in generators.items():
                    if key not in self._generators:
                        seed = randomness.derived(0, f"{self.name}/{key}")
                        self._generators[key] = randomness.state_from_seed(generator, seed)
                    randomness.set_own_state(generator, self._generators[key])
                yield stream
                self._random_state = randomness.capture(self.device)
                self._generators = _states(generators)
        finally:
            for place, states in zip(places, own, strict=True):
                place.set_own(states)
            for key, generator in generators.items():
                randomness.set_own_state(generator, kept[key])
        self._check_apart(stream, cursors)

    def _check_apart(self, stream: Stream, cursors: Sequence[dict[str, Any]]) -> None:
        """Refuse loaders whose passes aren't apart from each other."""
        training = self.training
        for i, place in enumerate(training.places):
            same = stream.iterators[i] is training.iterators[i]
            shared = stream.places[i].loader is place.loader and place.attributes() != cursors[i]
            if same or shared:
                raise _only_one_pass(self.name)

    def _begin(self) -> Stream:
        if self._random_state is None:
            with randomness.seeded(0, f"fresh batches of {self.name}"):
                self._random_state = randomness.capture(self.device)
            self._generators = {}
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


def check_iterable(name: str, loader: Any) -> None:
    """Refuse what no batches can come from.

    Raises:
        UserError: problem ``name`` got something else than a loader.
    """
    kind = type(loader)
    if kind is type or not (hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")):
        what = f"the class {loader.__name__}" if kind is type else f"of type {kind.__name__}"
        call = "; call it" if callable(loader) else ""
        raise UserError(
            f"problem {name!r}: its loader is {what}, which can't be iterated over{call}; give it "
            "a DataLoader, a list of batches, or another iterable"
        )


def check_not_empty(name: str, loader: Any) -> None:
    """Refuse a loader that says that it has no batches.

    Raises:
        UserError: problem ``name`` would have nothing to train on.
    """
    try:
        count = len(loader)
    except TypeError:  # some don't know
        return
    if count == 0:
        raise UserError(_no_batch(name))


def _no_batch(name: str) -> str:
    return (
        f"problem {name!r}: its loader gives no batch; give it data, and where it drops the last "
        "batch (drop_last) at least as many examples as a batch has"
    )


def _only_one_pass(name: str) -> UserError:
    return UserError(
        f"problem {name!r}: its loader can be walked through only once, by training, and "
        "fresh batches would be missing there; give it one that starts a pass of its own with each "
        "iter(), such as a DataLoader or a list, or a method sibling() that returns a second "
        "loader, or take a hypergradient method that needs no fresh batches (cg)"
    )


def _in_loaders(places: Sequence[Place]) -> dict[str, randomness.Generator]:
    found = (place.generators().items() for place in places if not place.by_itself)
    return {f"{i}:{path}": g for i, group in enumerate(found) for path, g in group}


def _states(generators: Mapping[str, randomness.Generator]) -> dict[str, Any]:
    return {key: randomness.own_state(generator) for key, generator in generators.items()}
