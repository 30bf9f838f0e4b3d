"""Engine: the loop around the problems."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import betty.configs
import betty.engine
import torch
from betty.logging import logger as betty_logger
from betty.logging.logger_base import get_logger
from betty.problems import Problem as BettyProblem
from rich.console import RenderableType

from mlseg import checkpoint
from mlseg.engines import notices, state
from mlseg.engines.hooks import Hooks, Work
from mlseg.engines.interruption import Interruption
from mlseg.engines.nan_guard import NanGuard, all_finite
from mlseg.engines.recording import Recorder, read_scalars
from mlseg.engines.settings import Dependencies, EngineSettings, Stage, as_settings
from mlseg.errors import RunError
from mlseg.machine import choose_device
from mlseg.multilevel.graph import KnowsLevels, introduce
from mlseg.multilevel.problem import Problem

H = TypeVar("H", bound=Hooks)


class Engine(KnowsLevels, betty.engine.Engine):
    """Runs problems, ours or plain Betty's, stage by stage.

    Beyond Betty's engine: validation that chooses the best checkpoint, early stopping, a progress
    display, records (:class:`~mlseg.engines.recording.Recorder`), atomic checkpoints from which a
    run goes on exactly, a guard against NaN, and a clean end on SIGINT, SIGTERM and SIGHUP. None
    of it synchronises with the device between two written figures. What else a run needs comes in
    as :class:`~mlseg.engines.hooks.Hooks`.

    Args:
        problems: all levels. Leaves step in this order.
        config: ``EngineSettings``, or Betty's ``EngineConfig``.
        dependencies: Betty's dict of ``u2l`` and ``l2u``; or give these two by keyword.
        stages: instead of one graph of levels, several in turn.
        validation: returns a dict of figures; or define the method ``validation`` as in Betty, or
            override ``validate`` of a hook.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        out: the run directory; without it nothing is written.
        hooks: called at the points of the loop, in this order.
        quiet: no progress display.
    """

    def __init__(
        self,
        problems: Sequence[BettyProblem],
        config: EngineSettings | betty.configs.EngineConfig | None = None,
        dependencies: Mapping[str, Dependencies] | None = None,
        env: Any = None,
        *,
        u2l: Dependencies | None = None,
        l2u: Dependencies | None = None,
        stages: Sequence[Stage] | None = None,
        validation: Callable[[], Mapping[str, Any]] | None = None,
        device: str | torch.device = "auto",
        out: Path | str | None = None,
        hooks: Sequence[Hooks] = (),
        quiet: bool = False,
    ) -> None:
        if dependencies is not None and (u2l is not None or l2u is not None):
            raise ValueError("give the graph either as dependencies or as u2l and l2u")
        graph = dependencies or {"u2l": u2l or {}, "l2u": l2u or {}}
        self.settings = as_settings(config)
        self.hooks = list(hooks)
        self.stages = list(stages) if stages else []
        if not self.stages:
            self.stages = [
                Stage("training", self.settings.iterations, None, graph["u2l"], graph["l2u"])
            ]
        self.stage_index = 0
        self.stage_step = 0
        self.best: dict[str, Any] | None = None
        self.last_validation: dict[str, float] = {}
        self.validations_without_best = 0
        self.stopped_early = False
        self.finished = False
        self.seconds = 0.0
        self.logged: dict[str, int] = {}  # steps of each problem at the last log
        self._wanted_device = device
        self.leaves: list[BettyProblem] = []
        self._clock = time.monotonic()
        if validation is not None:
            self.validation = validation
        self.recorder = Recorder(Path(out) if out else None, self.settings, quiet=quiet)
        first = self.stages[0]
        super().__init__(
            list(problems),
            config=betty.configs.EngineConfig(
                train_iters=self.settings.iterations,
                valid_step=self.settings.validate_every or self.settings.iterations,
                roll_back=getattr(config, "roll_back", False),
            ),
            dependencies={"u2l": first.u2l, "l2u": first.l2u},
            env=env,
        )
        for index in reversed(range(len(self.stages))):
            self.enter_stage(index)  # what a later stage's levels can't do is said now
        self._guard = NanGuard(self.problems, self.device)

    # ------------------------------------------------------------------- set-up

    def initialize(self) -> None:
        """Betty's set-up, without its announcements on standard output."""
        introduce(self.problems, self)
        self.logger = betty_logger()
        console = get_logger()
        level = console.level
        console.setLevel("WARNING")
        try:
            super().initialize()
        finally:
            console.setLevel(level)

    def set_problem_attr(self, problem: BettyProblem) -> str:
        """Betty's makes an attribute of the problem; here :func:`introduce` has made it known."""
        return str(problem.name)

    def configure_systems(self) -> dict[str, Any]:
        """Choose the device; this engine runs in one process."""
        self.device = choose_device(self._wanted_device)
        return {
            "strategy": "default",
            "backend": None,
            "world_size": 1,
            "rank": 0,
            "local_rank": 0,
        }

    def parse_dependency(self) -> None:
        """Betty's parsing; a problem that is idle in this stage is no leaf."""
        super().parse_dependency()
        active = self.stage.problems
        if active is not None:
            self.leaves = [p for p in self.leaves if any(p is a for a in active)]

    @property
    def stage(self) -> Stage:
        """The present stage."""
        return self.stages[self.stage_index]

    @property
    def total_iterations(self) -> int | None:
        """Over all stages; None where a hook ends one of them."""
        if any(stage.open_ended for stage in self.stages):
            return None
        return sum(stage.iterations for stage in self.stages)

    @property
    def metric(self) -> str | None:
        """The validation figure that chooses the best weights; None: the first one."""
        named = (hook.metric for hook in self.hooks if hook.metric is not None)
        return self.settings.metric or next(named, None)

    def hook(self, kind: type[H]) -> H:
        """The engine's hook of a class; KeyError if it has none."""
        for hook in self.hooks:
            if isinstance(hook, kind):
                return hook
        raise KeyError(f"this engine has no {kind.__name__}")

    def enter_stage(self, index: int) -> None:
        """Make stage `index` the present one: its graph, its leaves."""
        self.stage_index = index
        self.set_dependency({"u2l": self.stage.u2l, "l2u": self.stage.l2u})
        for problem in self.problems:
            if isinstance(problem, Problem):
                problem.connect()
            else:
                problem.ready = [False] * len(problem.children)

    def next_stage(self) -> None:
        """End the present stage, and make the one after it the present one."""
        for hook in self.hooks:
            hook.stage_end(self, self.stage)
        self.recorder.event("stage_end", self.global_step, stage=self.stage.name)
        self.stage_step = 0
        self.enter_stage(self.stage_index + 1)

    # --------------------------------------------------------------------- loop

    def run(self, iterations: int | None = None) -> None:
        """Train to the end of the last stage.

        Args:
            iterations: of the last stage, in place of the settings'.

        Raises:
            RunError: a loss is NaN or infinite, or something can't be written.
            Interrupted: SIGINT, SIGTERM or SIGHUP came; the run has been saved.
        """
        if iterations is not None:
            self.stages[-1].iterations = iterations
        self._clock = time.monotonic()
        for hook in self.hooks:
            hook.start(self)
        try:
            self._loop()
        except BaseException:
            with suppress(RunError):  # of the two, the first is the one to tell
                self._stop_hooks()
            raise
        self._stop_hooks()

    def _loop(self) -> None:
        self.train()
        with Interruption() as interruption, self.recorder.opened(self):
            while self._advance_stage():
                self.finished = False
                self.global_step += 1
                self.stage_step += 1
                self.train_step()
                self._guard.watch(self.problems, self.global_step)
                if self._is_due(self.settings.log_every):
                    self._log()
                self._validate_if_due()
                if self._is_due(self.settings.checkpoint_every or 0) and not self._is_over():
                    self.save()
                if interruption.requested:
                    self.save()
                    self.recorder.event("interrupted", self.global_step)
                    raise interruption.exception(self.global_step)
                if self.stopped_early:
                    break
            if not self.finished:
                self.finished = True
                self.recorder.event("finished", self.global_step)
                self.save()

    def _stop_hooks(self) -> None:
        for hook in self.hooks:
            hook.stop(self)

    def train_step(self) -> None:
        """One iteration: the leaves step, and whoever is above them as their turn comes."""
        leaves = self.leaves
        for hook in self.hooks:
            chosen = hook.active(self)
            leaves = leaves if chosen is None else list(chosen)
        for leaf in leaves:
            leaf.step(global_step=self.global_step)
        notices.after_step(self)
        for hook in self.hooks:
            hook.stepped(self)

    def iterate(self) -> None:
        """One iteration by itself, without records; for measurements and dry runs."""
        self.global_step += 1
        self.train_step()

    def work(self) -> Sequence[Work]:
        """What the present stage consists of, for :mod:`mlseg.dry_run`."""
        for hook in self.hooks:
            work = hook.work(self)
            if work is not None:
                return work
        return [Work(self.stage.name, self.stage.iterations, self.iterate, whole=True)]

    def _advance_stage(self) -> bool:
        """Enter the stage that the next iteration belongs to; False when all is done."""
        while self.stage_step >= self.stage.iterations:
            if self.stage_index == len(self.stages) - 1:
                return False
            if any(hook.overrides("stage_end") for hook in self.hooks):
                self._check_finite()
            self.next_stage()
        if self.stage_step == 0:
            self.recorder.event("stage_start", self.global_step, stage=self.stage.name)
        return not self.stopped_early

    def _is_due(self, every: int) -> bool:
        last = self.stage_step == self.stage.iterations
        return every > 0 and (self.stage_step % every == 0 or last)

    def _is_over(self) -> bool:
        """Whether the run ends here, with a checkpoint of its own."""
        last_stage = self.stage_index == len(self.stages) - 1
        return self.stopped_early or (last_stage and self.stage_step == self.stage.iterations)

    def _check_finite(self) -> None:
        """Raise RunError if any loss so far was not finite; synchronises."""
        found = self._guard.first()
        if found is not None:
            name, step = found
            self.recorder.event("nan", self.global_step, problem=name, at_step=step)
            raise RunError(
                f"the loss of problem {name!r} is not finite at step {step}; "
                f"{self._what_is_kept()}; try a lower learning rate or gradient clipping"
            )

    def _what_is_kept(self) -> str:
        if self.recorder.directory is None or not self.checkpoint_path("last").exists():
            return "no checkpoint has been written yet"
        return f"the last good checkpoint is {self.checkpoint_path('last')}"

    def _log(self) -> None:
        stepped = [
            problem
            for problem in self.problems
            if isinstance(problem, Problem) and problem.count != self.logged.get(problem.name, 0)
        ]
        self.logged = {problem.name: problem.count for problem in self.problems}
        figures = {problem.name: problem.metrics for problem in stepped}
        lines = self.recorder.log(self.global_step, figures, self._rates())
        self._check_finite()
        notices.after_log(self, lines)

    def _rates(self) -> dict[str, float]:
        return {
            problem.name: problem.optimizer.param_groups[0]["lr"]
            for problem in self.problems
            if problem.optimizer is not None
        }

    # --------------------------------------------------------------- validation

    def do_validation(self) -> bool:
        """Whether the present stage is validated, and there is something to do it."""
        last = self.stage_index == len(self.stages) - 1
        able = super().do_validation() or any(hook.overrides("validate") for hook in self.hooks)
        return last and self.stage.validate and able

    def _validate_if_due(self) -> None:
        if not self._is_due(self.settings.validate_every or self.stage.iterations):
            return
        if self.do_validation():
            self.validate()
        if self.settings.checkpoint_every is None and not self._is_over():
            self.save()

    def validate(self) -> dict[str, float]:
        """Validate now: records, best checkpoint, schedulers, early stopping."""
        self._check_finite()
        self.eval()
        try:
            with torch.no_grad():
                values = dict(self.validation() or {}) if super().do_validation() else {}
                for hook in self.hooks:
                    values |= hook.validate(self)
                figures = read_scalars(values)
        finally:
            self.train()
        self.last_validation = figures
        self.recorder.validation(self.global_step, figures)
        name = self.metric or next(iter(figures), None)
        if name is None:
            return figures
        if name not in figures:
            raise RunError(
                f"engine.metric: validation gives no {name!r}, only {', '.join(sorted(figures))}"
            )
        value = figures[name]
        if math.isnan(value):
            raise RunError(
                f"validation {name} is NaN at step {self.global_step}; {self._what_is_kept()}"
            )
        self._step_schedulers(value)
        self._select(name, value)
        for hook in self.hooks:
            hook.validated(self, figures)
        patience = self.settings.patience
        if patience is not None and self.validations_without_best >= patience:
            self.recorder.event("early_stop", self.global_step, patience=patience)
            self.stopped_early = True
        return figures

    def _select(self, metric: str, value: float) -> None:
        """Keep the present weights if they are the best so far."""
        sign = 1.0 if self.settings.mode == "max" else -1.0
        if self.best is not None and sign * value <= sign * self.best["value"]:
            self.validations_without_best += 1
            return
        self.best = {"metric": metric, "value": value, "step": self.global_step}
        self.validations_without_best = 0
        self.recorder.event("new_best", self.global_step, metric=metric, value=value)
        if self.recorder.directory is not None:
            self.save("best")

    def _step_schedulers(self, metric: float) -> None:
        before = self._rates()
        for problem in self.problems:
            if isinstance(problem, Problem):
                problem.step_scheduler("validation", metric)
        for name, rate in self._rates().items():
            if rate != before[name]:
                self.recorder.event("rate_change", self.global_step, problem=name, rate=rate)

    # -------------------------------------------------------------- checkpoints

    def checkpoint_path(self, name: str) -> Path:
        """Where the checkpoint ``name`` of this run is, or will be."""
        assert self.recorder.directory is not None
        return self.recorder.directory / "checkpoints" / f"{name}.pt"

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on, and where the records stand."""
        return state.whole(self)

    def best_state_dict(self) -> dict[str, Any]:
        """What ``best.pt`` holds."""
        return state.best(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            UserError: it is of another program.
        """
        state.restore(self, saved)

    def save(self, name: str = "last") -> None:
        """Write a checkpoint; never one with a NaN in it."""
        if self.recorder.directory is None:
            return
        self._check_finite()
        for problem in self.problems:
            if not all_finite(problem):
                raise RunError(
                    f"a parameter of problem {problem.name!r} is not finite at step "
                    f"{self.global_step}; {self._what_is_kept()}"
                )
        self.recorder.flush()
        before, self._clock = self._clock, time.monotonic()
        self.seconds += self._clock - before
        saved = self.best_state_dict() if name == "best" else self.state_dict()
        checkpoint.save(self.checkpoint_path(name), saved)
        for hook in self.hooks:
            hook.saved(self)

    def resume(self, directory: Path) -> None:
        """Load ``last.pt`` of a run directory.

        Raises:
            UserError: there is none, or it doesn't fit these problems.
        """
        for hook in self.hooks:
            hook.resume(self, directory)
        self.load_state_dict(checkpoint.load(directory / "checkpoints" / "last.pt"))

    # ------------------------------------------------------------------ the end

    def results(self) -> dict[str, Any]:
        """What to report of the run once it is over."""
        report = {
            "steps": self.global_step,
            "best": self.best,
            "last_validation": self.last_validation,
            "stopped_early": self.stopped_early,
            "seconds": round(self.seconds, 1),
        }
        for hook in self.hooks:
            report |= hook.results(self, report)
        return report

    def summaries(self) -> list[RenderableType]:
        """What to print after the final scores."""
        given = (hook.summary(self) for hook in self.hooks)
        return [summary for summary in given if summary is not None]

    @property
    def notices(self) -> list[str]:
        """What to say when a run starts and when it ends."""
        return [hook.notice for hook in self.hooks if hook.notice]
