"""A run's figures, also in an experiment tracker: trackio, Weights & Biases, or MLflow.

Nothing else changes: the run directory is complete without it, and a tracker that fails is said
once and left out, the run goes on. A run that is resumed goes on with its entry in the tracker,
which may then hold the steps after the last checkpoint twice (MLflow, trackio) or once (wandb).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from mlseg.config import Settings
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.errors import UserError, one_line
from mlseg.files import write_json

FILE = "tracker.json"


class LogSettings(Settings):
    """Where figures go besides the run directory.

    Attributes:
        tracker: an experiment tracker, each by an extra of its name: ``trackio``, ``wandb`` or
            ``mlflow``; null for none. Where it keeps them is its own matter, see its environment
            variables.
        project: under which it files the run.
    """

    tracker: Literal["trackio", "wandb", "mlflow"] | None = None
    project: str = "mlseg"


class Tracker(Protocol):
    """What is asked of a tracker's adapter; any exception of it ends its use."""

    def open(self, project: str, name: str, entry: str | None, config: Mapping[str, Any]) -> str:
        """Begin an entry, or go on with the entry of that id; returns its id."""
        ...

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of a step, by ``problem/figure``."""
        ...

    def close(self) -> None:
        """All is said."""
        ...


class Wandb:
    """Weights & Biases, and trackio, which has its functions."""

    module: ClassVar[str] = "wandb"

    def __init__(self) -> None:
        self.library: Any = importlib.import_module(self.module)

    def open(self, project: str, name: str, entry: str | None, config: Mapping[str, Any]) -> str:
        """By the id that the library gave."""
        more = {} if entry is None else {"id": entry, "resume": "allow"}
        run = self.library.init(project=project, name=name, config=dict(config), **more)
        return str(run.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """As they are."""
        self.library.log(dict(figures), step=step)

    def close(self) -> None:
        """Waits until all has been sent."""
        self.library.finish()


class Trackio(Wandb):
    """Trackio, whose runs are known by their names."""

    module = "trackio"

    def open(self, project: str, name: str, entry: str | None, config: Mapping[str, Any]) -> str:
        """By the run's name."""
        resume = "never" if entry is None else "allow"
        run = self.library.init(
            project=project, name=entry or name, config=dict(config), resume=resume, embed=False
        )
        return str(run.name)


class Mlflow:
    """MLflow; its parameters are the config's leaves."""

    def __init__(self) -> None:
        self.library: Any = importlib.import_module("mlflow")

    def open(self, project: str, name: str, entry: str | None, config: Mapping[str, Any]) -> str:
        """By the id that the library gave."""
        self.library.set_experiment(project)
        run = self.library.start_run(run_id=entry, run_name=None if entry else name)
        if entry is None:
            self.library.log_params(dict(_leaves(config)))
        return str(run.info.run_id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """As they are."""
        self.library.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        """The entry is done."""
        self.library.end_run()


_ADAPTERS: dict[str, type[Wandb] | type[Mlflow]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}
_LONGEST = 500
"""Characters of a parameter's value, of which MLflow takes no more."""


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", json.dumps(value)[:_LONGEST]


class Tracking(Hooks):
    """Hands an engine's figures to a tracker.

    Args:
        settings: which.
        config: the run's, as plain values.
        directory: the run directory; its last part names the entry, and the entry's id is in its
            ``tracker.json``.

    Raises:
        UserError: the tracker isn't installed.
    """

    shown_events = ("tracker_failed",)

    def __init__(self, settings: LogSettings, config: Mapping[str, Any], directory: Path) -> None:
        assert settings.tracker is not None
        self.settings, self.config, self.directory = settings, config, directory
        self._open = False
        try:
            self._tracker: Tracker = _ADAPTERS[settings.tracker]()
        except ImportError as error:
            raise UserError(
                f"log.tracker: {settings.tracker} isn't installed ({one_line(error)}); in the "
                f"checkout: uv pip install '.[{settings.tracker}]', or set log.tracker=null"
            ) from None

    def start(self, engine: Engine) -> None:
        """Begin an entry, or go on with the run's."""
        with _Forgiven(self, engine):
            name = f"{self.directory.parent.name}/{self.directory.name}"
            entry = self._tracker.open(self.settings.project, name, self._entry(), self.config)
            self._open = True
            write_json(self.directory / FILE, {"tracker": self.settings.tracker, "id": entry})

    def logged(self, engine: Engine, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Figures of the problems that have stepped."""
        self._log(engine, {f"{p}/{k}": v for p, line in figures.items() for k, v in line.items()})

    def validated(self, engine: Engine, figures: Mapping[str, float]) -> None:
        """Figures of a validation."""
        self._log(engine, {f"validation/{key}": value for key, value in figures.items()})

    def stop(self, engine: Engine) -> None:
        """The entry is done, however the run ended."""
        if self._open:
            with _Forgiven(self, engine):
                self._tracker.close()
        self._open = False

    def _log(self, engine: Engine, figures: Mapping[str, float]) -> None:
        if self._open and figures:
            with _Forgiven(self, engine):
                self._tracker.log(figures, engine.global_step)

    def _entry(self) -> str | None:
        """The id of this run's entry, where it has one in this tracker."""
        try:
            stored = json.loads((self.directory / FILE).read_text(encoding="utf-8"))
            return str(stored["id"]) if stored["tracker"] == self.settings.tracker else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


class _Forgiven:
    """Within this block a tracker may fail: that is said, and it isn't called again."""

    def __init__(self, tracking: Tracking, engine: Engine) -> None:
        self.tracking, self.engine = tracking, engine

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self.tracking._open = False
        name = self.tracking.settings.tracker
        self.tracking.notice = (  # said at the end; the event comes at once, within the loop
            f"{name} failed ({one_line(error)}): the run directory alone has all figures"
        )
        self.engine._recorder.event(
            "tracker_failed", self.engine.global_step, tracker=name, reason=one_line(error)
        )
        return True
