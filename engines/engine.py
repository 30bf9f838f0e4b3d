"""Engine: the loop around the problems."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import betty.configs
import betty.engine
import torch
from betty.problems import Problem as BettyProblem
from rich.console import RenderableType

from mlseg import parallel
from mlseg.engines import notices, several, state, validation
from mlseg.engines.hooks import Hooks, Work
from mlseg.engines.interruption import Interrupted, Interruption
from mlseg.engines.nan_guard import NanGuard, check_losses, what_is_kept
from mlseg.engines.recording import Recorder
from mlseg.engines.settings import (
    Dependencies,
    EngineSettings,
    Stage,
    all_stages,
    as_bettys,
    as_settings,
    wanted_device,
)
from mlseg.engines.stages import Staged
from mlseg.errors import RunError
from mlseg.multilevel.config import Config
from mlseg.multilevel.own_names import Shown
from mlseg.multilevel.problem import Problem

H = TypeVar("H", bound=Hooks)


class Engine(Staged):
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
        out: the run directory; without it nothing is written. Of several processes (under
            torchrun, see :mod:`mlseg.parallel`) the first writes.
        hooks: called at the points of the loop, in this order.
        quiet: no progress display.
    """

    settings = Shown[EngineSettings]()
    hooks = Shown[list[Hooks]]()
    stages = Shown[list[Stage]]()
    stage = Shown[Stage]()
    recorder = Shown[Recorder]()
    directory = Shown["Path | None"]()
    metric = Shown["str | None"]()
    total_iterations = Shown["int | None"]()
    notices = Shown[list[str]]()
    stage_index = Shown[int](unless="_keeps_to_itself")
    stage_step = Shown[int](unless="_keeps_to_itself")
    best = Shown["dict[str, Any] | None"](unless="_keeps_to_itself")
    last_validation = Shown[dict[str, float]](unless="_keeps_to_itself")
    validations_without_best = Shown[int](unless="_keeps_to_itself")
    stopped_early = Shown[bool](unless="_keeps_to_itself")
    finished = Shown[bool](unless="_keeps_to_itself")
    seconds = Shown[float](unless="_keeps_to_itself")
    logged = Shown[dict[str, int]](unless="_keeps_to_itself")

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
        parallel.start()
        if config is None and problems and not any(isinstance(p.config, Config) for p in problems):
            config = betty.configs.EngineConfig()  # a program of Betty's, with its defaults
        self._as_on_betty = isinstance(config, betty.configs.EngineConfig)
        self._keeps_to_itself = self._as_on_betty and type(self) is not Engine
        self._settings = as_settings(config)
        self._hooks = list(hooks)
        self._stages = all_stages(self._settings, stages, dependencies, u2l, l2u)
        self._stage_index = 0
        self._stage_step = 0
        self._best: dict[str, Any] | None = None
        self._last_validation: dict[str, float] = {}
        self._validations_without_best = 0
        self._stopped_early = False
        self._finished = False
        self._goes_on = False  # from a checkpoint
        self._unproven: Path | None = None
        """The checkpoint that a run has gone on from, until it has written one itself."""
        self._seconds = 0.0
        self._logged: dict[str, int] = {}  # steps of each problem at the last log
        self._wanted_device = wanted_device(device, config)
        self.leaves: list[BettyProblem] = []
        self._clock = time.monotonic()
        if validation is not None:
            self.validation = validation
        self._directory = Path(out) if out else None
        first = parallel.is_first()
        self._recorder = Recorder(
            self._directory if first else None, self._settings, quiet=quiet or not first
        )
        graph = self._stages[0]
        super().__init__(
            list(problems),
            config=config if self._as_on_betty else as_bettys(self._settings),
            dependencies={"u2l": graph.u2l, "l2u": graph.l2u},
            env=env,
        )
        for index in reversed(range(len(self._stages))):
            self.enter_stage(index)  # what a later stage's levels can't do is said now
        self._guard = NanGuard(self.problems, self.device)
        several.begin(self)

    @property
    def _metric(self) -> str | None:
        """The validation figure that chooses the best weights; None: the first one."""
        named = (hook.metric for hook in self._hooks if hook.metric is not None)
        return self._settings.metric or next(named, None)

    def hook(self, kind: type[H]) -> H:
        """The engine's hook of a class; KeyError if it has none."""
        for hook in self._hooks:
            if isinstance(hook, kind):
                return hook
        raise KeyError(f"this engine has no {kind.__name__}")

    def next_stage(self) -> None:
        """End the present stage, and make the one after it the present one."""
        for hook in self._hooks:
            hook.stage_end(self, self._stage)
        self._recorder.event("stage_end", self.global_step, stage=self._stage.name)
        self._stage_step = 0
        self.enter_stage(self._stage_index + 1)

    # --------------------------------------------------------------------- loop

    def run(self, iterations: int | None = None) -> None:
        """Train to the end of the last stage.

        With a config of Betty's every call trains for ``train_iters``, as they are then; but for
        the first one after :meth:`resume`, which finishes what was begun.

        Args:
            iterations: of the last stage, in place of the settings'.

        Raises:
            RunError: a loss is NaN or infinite, or something can't be written.
            Interrupted: SIGINT, SIGTERM or SIGHUP came; the run has been saved.
        """
        if self._as_on_betty and not self._goes_on:
            self._stage_step, self._stopped_early = 0, False
            if len(self._stages) == 1:
                self._stages[0].iterations = self.train_iters
        self._goes_on = False
        if iterations is not None:
            self._stages[-1].iterations = iterations
        self._clock = time.monotonic()
        for hook in self._hooks:
            hook.start(self)
        try:
            self._loop()
        except BaseException as error:
            if not isinstance(error, Interrupted):  # which all processes are at the same step
                parallel.abandon()
            with suppress(RunError):  # of the two, the first is the one to tell
                self._stop_hooks()
            if isinstance(error, parallel.Lost):
                raise RunError(f"{error}; {what_is_kept(self)}") from error
            raise
        self._stop_hooks()

    def _loop(self) -> None:
        self.train()
        with Interruption() as interruption, self._recorder.opened(self):
            while self._advance_stage():
                self._finished = False
                self.global_step += 1
                self._stage_step += 1
                self.train_step()
                self._guard.watch(self.problems, self.global_step)
                if self._is_due(self._settings.log_every):
                    self._log()
                self._validate_if_due()
                if self._is_due(self._settings.checkpoint_every or 0) and not self._is_over():
                    self.save()
                if interruption.agreed():
                    self._end_interrupted(interruption)
                if self._stopped_early:
                    break
            if interruption.agreed_at_last():
                self._end_interrupted(interruption)
            if not self._finished:
                self._finished = True
                self._recorder.event("finished", self.global_step)
                self.save()
        self.cleanup()

    def _end_interrupted(self, interruption: Interruption) -> None:
        self.save()
        self._recorder.event("interrupted", self.global_step)
        raise interruption.exception(self.global_step)

    def cleanup(self) -> None:
        """Called when all is done; Betty's ends its processes here, of which there are none."""

    def _stop_hooks(self) -> None:
        for hook in self._hooks:
            hook.stop(self)

    def train_step(self) -> None:
        """One iteration: the leaves step, and whoever is above them as their turn comes."""
        leaves = self.leaves
        for hook in self._hooks:
            chosen = hook.active(self)
            leaves = leaves if chosen is None else list(chosen)
        for leaf in leaves:
            leaf.step(global_step=self.global_step)
        notices.after_step(self)
        for hook in self._hooks:
            hook.stepped(self)

    def iterate(self) -> None:
        """One iteration by itself, without records; for measurements and dry runs."""
        self.global_step += 1
        self.train_step()

    def work(self) -> Sequence[Work]:
        """What the present stage consists of, for :mod:`mlseg.dry_run`."""
        for hook in self._hooks:
            work = hook.work(self)
            if work is not None:
                return work
        return [Work(self._stage.name, self._stage.iterations, self.iterate, whole=True)]

    def _advance_stage(self) -> bool:
        """Enter the stage that the next iteration belongs to; False when all is done."""
        while self._stage_step >= self._stage.iterations:
            if self._stage_index == len(self._stages) - 1:
                return False
            if any(hook.overrides("stage_end") for hook in self._hooks):
                check_losses(self)
            self.next_stage()
        if self._stage_step == 0:
            self._recorder.event("stage_start", self.global_step, stage=self._stage.name)
        return not self._stopped_early

    def _log(self) -> None:
        stepped = [
            problem
            for problem in self.problems
            if isinstance(problem, Problem) and problem.count != self._logged.get(problem.name, 0)
        ]
        self._logged = {problem.name: problem.count for problem in self.problems}
        figures = {problem.name: problem._metrics for problem in stepped}
        lines = self._recorder.log(self.global_step, figures, validation.rates(self.problems))
        check_losses(self)
        for hook in self._hooks:
            hook.logged(self, lines)
        notices.after_log(self, lines)

    # --------------------------------------------------------------- validation

    def do_validation(self) -> bool:
        """Whether the present stage is validated, and there is something to do it."""
        last = self._stage_index == len(self._stages) - 1
        able = super().do_validation() or any(hook.overrides("validate") for hook in self._hooks)
        return last and self._stage.validate and able

    def _validation_is_due(self) -> bool:
        """Whether this iteration ends with a validation."""
        return self._time_to_validate() and self.do_validation()

    def _time_to_validate(self) -> bool:
        if self._as_on_betty:
            return bool(self._stage_step % self.valid_step == 0)
        return self._is_due(self._settings.validate_every or self._stage.iterations)

    def _validate_if_due(self) -> None:
        if not self._time_to_validate():
            return
        if self.do_validation():
            self.validate()
        if self._settings.checkpoint_every is None and not self._is_over():
            self.save()

    def validate(self) -> dict[str, float]:
        """Validate now: records, best checkpoint, schedulers, early stopping."""
        return validation.validate(self)

    # -------------------------------------------------------------- checkpoints

    def checkpoint_path(self, name: str) -> Path:
        """Where the checkpoint ``name`` of this run is, or will be."""
        assert self._directory is not None
        return self._directory / "checkpoints" / f"{name}.pt"

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
        self._goes_on = True

    def save(self, name: str = "last") -> None:
        """Write a checkpoint; never one with a NaN in it. All processes take part."""
        if self._directory is None:
            return
        check_losses(self)
        self._recorder.flush()
        before, self._clock = self._clock, time.monotonic()
        self._seconds += self._clock - before
        state.write(self, name, self.best_state_dict() if name == "best" else self.state_dict())
        for hook in self._hooks:
            hook.saved(self)

    def resume(
        self,
        directory: Path,
        saved: Mapping[str, Any] | None = None,
        forget_best: bool = False,
    ) -> None:
        """Go on from ``last.pt`` of a run directory.

        Args:
            saved: what is in it, where that has been read already.
            forget_best: where the best weights are gone, choose them anew from here on.

        Raises:
            UserError: there is none, it doesn't fit these problems, or the best weights that it
                knows of are gone.
        """
        state.take_up(self, directory, saved, forget_best)

    # ------------------------------------------------------------------ the end

    def results(self) -> dict[str, Any]:
        """What to report of the run once it is over."""
        report = {
            "steps": self.global_step,
            "best": self._best,
            "last_validation": self._last_validation,
            "stopped_early": self._stopped_early,
            "seconds": round(self._seconds, 1),
        }
        for hook in self._hooks:
            report |= hook.results(self, report)
        return report

    def summaries(self) -> list[RenderableType]:
        """What to print after the final scores."""
        given = (hook.summary(self) for hook in self._hooks)
        return [summary for summary in given if summary is not None]

    @property
    def _notices(self) -> list[str]:
        """What to say when a run starts and when it ends."""
        return [hook.notice for hook in self._hooks if hook.notice]
