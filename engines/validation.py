"""Validation: what it gives, and what follows for rates, best weights and the run's end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import betty.engine
import torch
from betty.misc.early_stopping import EarlyStopping
from betty.problems import Problem as BettyProblem

from mlseg import parallel
from mlseg.engines.nan_guard import check_losses, what_is_kept
from mlseg.engines.recording import read_scalars
from mlseg.errors import RunError
from mlseg.multilevel.problem import Problem

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine


def validate(engine: Engine) -> dict[str, float]:
    """Validate now: records, best checkpoint, schedulers, early stopping.

    Raises:
        RunError: a loss so far or the figure that counts isn't finite, or there is no such figure.
    """
    check_losses(engine)
    engine.eval()
    try:
        values = _figures(engine)
        with torch.no_grad():
            for hook in engine._hooks:
                values |= hook.validate(engine)
            read = read_scalars({str(key): value for key, value in values.items()})
            figures = parallel.from_first(read)  # which decide
    finally:
        engine.train()
    engine._last_validation = figures
    engine._recorder.validation(engine.global_step, figures)
    if engine._metric is not None or figures:
        _choose(engine, figures)
        for hook in engine._hooks:
            hook.validated(engine, figures)
    _stop_if_no_better(engine, values)
    return figures


def _figures(engine: Engine) -> dict[str, Any]:
    """What ``validation`` returns, if there is one; with gradients on where it is Betty's."""
    if not betty.engine.Engine.do_validation(engine):
        return {}
    with torch.set_grad_enabled(engine._as_on_betty):
        try:
            values = dict(engine.validation() or {})
        except RuntimeError as error:
            if "does not require grad" not in str(error) or engine._as_on_betty:
                raise
            raise RunError(
                "validation takes gradients, which are off in it; put what does under "
                "torch.enable_grad()"
            ) from error
    if engine._as_on_betty:
        engine.logger.log(values, tag="validation", step=engine.global_step)
    return values


def _choose(engine: Engine, figures: dict[str, float]) -> None:
    """Rates that go by validations, and the best weights so far."""
    name = engine._metric or next(iter(figures))
    if name not in figures:
        raise RunError(
            f"engine.metric: validation gives no {name!r}, only {', '.join(sorted(figures))}"
        )
    value = figures[name]
    if math.isnan(value) and not engine._as_on_betty:
        raise RunError(
            f"validation {name} is NaN at step {engine.global_step}; {what_is_kept(engine)}"
        )
    _step_schedulers(engine, value)
    if engine._metric is not None or not engine._as_on_betty:
        # Betty's config says which way is better for the metric of early stopping alone.
        _select(engine, name, value)


def _stop_if_no_better(engine: Engine, values: Mapping[str, Any]) -> None:
    patience, own = engine._settings.patience, engine.early_stopping
    if own is not None and type(own) is not EarlyStopping:
        stop = parallel.from_first(bool(own(values)))
    else:
        stop = patience is not None and engine._validations_without_best >= patience
    if stop:
        engine._recorder.event("early_stop", engine.global_step, patience=patience)
        engine._stopped_early = True


def _select(engine: Engine, metric: str, value: float) -> None:
    """Keep the present weights if they are the best so far."""
    sign = 1.0 if engine._settings.mode == "max" else -1.0
    better = engine._best is None or sign * value > sign * engine._best["value"]
    if not better or math.isnan(value):
        engine._validations_without_best += 1
        return
    engine._best = {"metric": metric, "value": value, "step": engine.global_step}
    engine._validations_without_best = 0
    engine._recorder.event("new_best", engine.global_step, metric=metric, value=value)
    engine.save("best")


def rates(problems: Iterable[BettyProblem]) -> dict[str, float]:
    """The learning rate of each problem that has an optimizer."""
    return {
        problem.name: problem.optimizer.param_groups[0]["lr"]
        for problem in problems
        if problem.optimizer is not None
    }


def _step_schedulers(engine: Engine, metric: float) -> None:
    before = rates(engine.problems)
    for problem in engine.problems:
        if isinstance(problem, Problem):
            problem.step_scheduler("validation", metric)
    for name, rate in rates(engine.problems).items():
        if rate != before[name]:
            engine._recorder.event("rate_change", engine.global_step, problem=name, rate=rate)
