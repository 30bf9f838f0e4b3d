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
)
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine

NOTICES = (
    "hypergradient_zero",
    "hypergradient_unsolved",
    "hypergradient_remark",
    "buffers_moved",
)
"""Events that say in a text of their own what is wrong with a program."""

SECONDS_BETWEEN_LINES = 10.0
_SHOWN_EVENTS = frozenset({"early_stop", "rate_change", "nan", "hypergradient_diverged", *NOTICES})


class Pace:
    """Seconds per iteration of each stage, as measured in this process.

    Stages may differ in what an iteration costs by any factor: none says anything of another.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._began = 0.0
        self._from = 0

    def begin(self, stage_step: int) -> None:
        """The stage goes on from ``stage_step``."""
        self._began, self._from = time.monotonic(), stage_step

    def measure(self, stage: int, stage_step: int) -> None:
        """The stage has come to ``stage_step``."""
        if stage_step > self._from:
            self._seconds[stage] = (time.monotonic() - self._began) / (stage_step - self._from)

    def left(self, engine: Engine) -> str:
        """The time left, of all that is known: of this stage, and of later ones that have run."""
        index, stages = engine._stage_index, engine._stages
        here = self._seconds.get(index)
        if here is None:
            return ""
        total = here * (stages[index].iterations - engine._stage_step)
        for later, stage in enumerate(stages[index + 1 :], index + 1):
            if later not in self._seconds:
                rest = " and ".join(s.name for s in stages[later:])
                return f"{_clock(total)} left of {engine._stage.name}, then {rest}"
            total += self._seconds[later] * stage.iterations
        return f"{_clock(total)} left"


class Progress:
    """Stage, step, time left and the key figures: each problem's loss, the last validation.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.step = 0
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._bar: RichProgress | None = None
        self._engine: Engine | None = None
        self._shown_events = _SHOWN_EVENTS
        self._losses: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._started = self._last_line = 0.0
        self._pace = Pace()

    def start(self, engine: Engine) -> None:
        """Begin to show ``engine``'s run."""
        self._engine = engine
        self._shown_events = _SHOWN_EVENTS.union(*(hook.shown_events for hook in engine._hooks))
        self.step = engine.global_step
        self._started = self._last_line = time.monotonic()
        self._pace = Pace()
        self._pace.begin(engine._stage_step)
        if self.quiet or not self._console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
        )
        self._bar.start()
        self._bar.add_task(
            engine._stage.name,
            total=engine._total_iterations,
            completed=engine.global_step,
            left="",
            figures="",
        )

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """New losses of the problems; a validation that is due shows them with its figures."""
        self.step = step
        self._losses.update(losses)
        if self._engine is not None and not self._engine._validation_is_due():
            self._show()

    def validated(self, step: int, figures: Mapping[str, float]) -> None:
        """New validation figures."""
        self.step = step
        self._validation = dict(figures)
        self._show(now=True)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Something worth a line of its own."""
        if kind == "stage_start":
            self._pace.begin(0)
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
        self._pace.measure(engine._stage_index, engine._stage_step)
        left = "" if engine._total_iterations is None else self._pace.left(engine)
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                description=engine._stage.name,
                completed=self.step,
                left=left,
                figures=self._figures(),
            )
            return
        moment = time.monotonic()
        if not now and moment - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = moment
        total = engine._total_iterations
        where = str(self.step) if total is None else f"{self.step}/{total}"
        when = left or f"{_clock(moment - self._started)} spent"
        parts = [f"{engine._stage.name} {where}", when, self._figures()]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def _figures(self) -> str:
        parts = [f"{name} {value:.3g}" for name, value in self._losses.items()]
        metric = self._engine._metric if self._engine else None
        shown = [metric] if metric in self._validation else list(self._validation)[:1]
        counted = [hook.counted for hook in self._engine._hooks] if self._engine else []
        where = "".join(f" {words}" for words in counted if words)
        parts += [f"val {name} {self._validation[name]:.4f}{where}" for name in shown if name]
        return "  ".join(parts)


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
