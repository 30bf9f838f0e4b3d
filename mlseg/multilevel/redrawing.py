"""Batches drawn again from their places in the loaders, in place of being kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlseg.multilevel.loaders import Stream

if TYPE_CHECKING:
    from mlseg.multilevel.problem import Problem

Place = dict[str, Any]
"""Where each loader was and the random state before a batch was drawn; tensors and plain values."""


class Redrawing:
    """Draws batches of a problem again.

    That is possible where they come from loaders that know their place and can be had a second time
    (``state_dict`` and ``sibling``, as of ``BatchLoader``), and from nowhere else: a problem with a
    ``get_batch`` of its own keeps its batches.

    Args:
        problem: whose batches.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._stream: Stream | None = None
        self._of: list[Any] = []

    def place(self) -> Place | None:
        """Where the next batch comes from; None where it can't be drawn again."""
        places = self._problem._stream.places
        if not self._draws_from_loaders() or not places:
            return None
        if not all(p.by_itself and callable(getattr(p.loader, "sibling", None)) for p in places):
            return None
        return {
            "loaders": self._problem._stream.state_dict(),
            "random_state": self._problem.again.random_state(),
        }

    def draw(self, place: Place) -> Any:
        """The batch that was drawn at ``place``; no stream and no generator takes note of it."""
        problem, training = self._problem, self._problem._stream
        loaders = [p.loader for p in training.places]
        if self._stream is None or self._of != loaders:
            self._stream, self._of = training.apart(), loaders
        self._stream.load_state_dict(place["loaders"])
        present = problem.again.random_state()
        problem._stream = self._stream
        try:
            problem.again.restore_randomness(place["random_state"])
            return problem.get_batch()
        finally:
            problem._stream = training
            problem.again.restore_randomness(present)

    def _draws_from_loaders(self) -> bool:
        from mlseg.multilevel.problem import Problem

        kind, own = type(self._problem), vars(self._problem)
        names = ("get_batch", "get_batch_single_loader")
        return all(getattr(kind, n) is getattr(Problem, n) and n not in own for n in names)
