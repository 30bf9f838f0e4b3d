"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine

NOTICES = ("hypergradient_zero", "hypergradient_unsolved", "buffers_moved")
"""Events that say in a text of their own what is wrong with a program."""

SECONDS_BETWEEN_LINES = 10.0
_SHOWN_EVENTS = frozenset({"early_stop", "rate_change", "nan", "hypergradient_diverged", *NOTICES})


class Progress:
    """Stage, step, time left and the key figures: each problem's loss, the last validation.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.step = 0
        self._console = Console(stderr=True, highlight=False)
        self._bar: RichProgress | None = None
        self._engine: Engine | None = None
        self._shown_events = _SHOWN_EVENTS
        self._losses: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._started = self._last_line = 0.0
        self._first_step = 0

    def start(self, engine: Engine) -> None:
        """Begin to show ``engine``'s run."""
        self._engine = engine
        self._shown_events = _SHOWN_EVENTS.union(*(hook.shown_events for hook in engine.hooks))
        self.step = self._first_step = engine.global_step
        self._started = self._last_line = time.monotonic()
        if self.quiet or not self._console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._bar.start()
        self._bar.add_task(
            engine.stage.name,
            total=engine.total_iterations,
            completed=engine.global_step,
            figures="",
        )

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """New losses of the problems."""
        self.step = step
        self._losses.update(losses)
        self._show()

    def validated(self, step: int, figures: Mapping[str, float]) -> None:
        """New validation figures."""
        self.step = step
        self._validation = dict(figures)
        self._show(now=True)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Something worth a line of its own."""
        if kind in NOTICES:
            self._notice(f"step {step}: {values['text']}", kind == NOTICES[0])
        elif kind in self._shown_events and not self.quiet:
            text = " ".join(f"{key}={_short(value)}" for key, value in values.items())
            self._console.print(f"step {step}: {kind.replace('_', ' ')} {text}")

    def _notice(self, text: str, always: bool) -> None:
        if not self.quiet:
            self._console.print(text, markup=False, soft_wrap=True)
        elif always:
            warnings.warn(text, stacklevel=2)

    def stop(self) -> None:
        """End the display."""
        if self._bar is not None:
            self._show()
            self._bar.stop()
            self._bar = None

    def _show(self, now: bool = False) -> None:
        if self.quiet or self._engine is None:
            return
        engine = self._engine
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                description=engine.stage.name,
                completed=self.step,
                figures=self._figures(),
            )
            return
        moment = time.monotonic()
        if not now and moment - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = moment
        done = max(self.step - self._first_step, 1)
        spent = moment - self._started
        where = f"{self.step}, {_clock(spent)} spent"
        total = engine.total_iterations
        if total is not None:
            where = f"{self.step}/{total}, {_clock(spent / done * (total - self.step))} left"
        print(f"{engine.stage.name} {where}, {self._figures()}", file=sys.stderr, flush=True)

    def _figures(self) -> str:
        parts = [f"{name} {value:.3g}" for name, value in self._losses.items()]
        metric = self._engine.metric if self._engine else None
        shown = [metric] if metric in self._validation else list(self._validation)[:1]
        parts += [f"val {name} {self._validation[name]:.4f}" for name in shown if name]
        return "  ".join(parts)


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
