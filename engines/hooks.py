"""Hooks: what a run adds to the engine's loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from betty.problems import Problem as BettyProblem
from rich.console import RenderableType

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine
    from mlseg.engines.settings import Stage


class Once(Protocol):
    """Does a piece of work once."""

    def __call__(self) -> object: ...


@dataclass(frozen=True)
class Work:
    """A part of a stage, for an estimate of its time.

    Attributes:
        name: shown.
        times: how often it is done, at most.
        once: does it once, without records.
        whole: whether it is an iteration in which levels step in turn.
    """

    name: str
    times: int
    once: Once
    whole: bool = False


class Hooks:
    """Called by an engine at the points of its loop. Each method does nothing until overridden.

    Override what is needed, and hand an instance to the engine: ``Engine(..., hooks=[mine])``. The
    hooks of an engine are called in the order given.

    Attributes:
        name: under which :meth:`state_dict` is saved; needed by hooks that have a state.
        metric: the validation figure that chooses the best weights, where settings name none.
        counted: how its validation figures are counted, shown behind them: ``at 256x256``.
        notice: said when a run starts and when it ends.
        shown_events: kinds of events that the progress display shows.
        checkpoints: names of those that the end of a run needs, once a best one has been chosen.
    """

    name: str = ""
    metric: str | None = None
    counted: str | None = None
    notice: str | None = None
    shown_events: ClassVar[Sequence[str]] = ()
    checkpoints: Sequence[str] = ()

    def description(self, engine: Engine) -> Mapping[str, Any]:
        """Plain values that every checkpoint holds beside the problems' states."""
        return {}

    # ------------------------------------------------------------------- a run's course

    def resume(self, engine: Engine, directory: Path) -> None:
        """A run is about to go on from ``directory``.

        Raises:
            UserError: it can't, with the mend.
        """

    def start(self, engine: Engine) -> None:
        """The loop is about to start, anew or where a run goes on."""

    def active(self, engine: Engine) -> Iterable[BettyProblem] | None:
        """The leaves that step in this iteration; None: all of the stage's."""
        return None

    def stepped(self, engine: Engine) -> None:
        """The levels of this iteration have stepped."""

    def logged(self, engine: Engine, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Figures have been written down: by problem and name, as plain numbers."""

    def stage_end(self, engine: Engine, stage: Stage) -> None:
        """A stage is over, and the next one not begun."""

    def stop(self, engine: Engine) -> None:
        """The loop has ended: all is done, or an exception is on its way out."""

    # ---------------------------------------------------------------------- validation

    def validate(self, engine: Engine) -> Mapping[str, Any]:
        """Figures of the present weights; levels are in evaluation mode, gradients are off."""
        return {}

    def validated(self, engine: Engine, figures: Mapping[str, float]) -> None:
        """A validation is over: ``engine.best`` knows of it."""

    # --------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration depends on: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    def best_state(self, engine: Engine, state: dict[str, Any]) -> dict[str, Any]:
        """What ``best.pt`` shall hold, given what it would without this hook."""
        return state

    def saved(self, engine: Engine) -> None:
        """A checkpoint has been written."""

    # ------------------------------------------------------------------------- the end

    def results(self, engine: Engine, report: Mapping[str, Any]) -> Mapping[str, Any]:
        """What to add to ``results.json``; also the moment to write files of one's own.

        Args:
            report: what engine and earlier hooks have to say.
        """
        return {}

    def summary(self, engine: Engine) -> RenderableType | None:
        """Something to print after the final scores."""
        return None

    def work(self, engine: Engine) -> Sequence[Work] | None:
        """What the present stage consists of, where it isn't iterations of its levels."""
        return None

    @classmethod
    def overrides(cls, method: str) -> bool:
        """Whether the class does something of its own at ``method``."""
        return getattr(cls, method) is not getattr(Hooks, method)
