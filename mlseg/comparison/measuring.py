"""One cell of a comparison: a method on a task with a seed, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mlseg.comparison import memory
from mlseg.comparison.tasks.base import (
    Aim,
    Conditions,
    Program,
    Task,
    TaskSettings,
    aim_of,
    default_dtype,
)
from mlseg.engines.recording import read_scalars
from mlseg.randomness import replayed, seed_everything

Figures = dict[str, Any]

SUMMED = ("evaluations", "products", "iterations")
"""Diagnostics that add up over the hops of a hypergradient; of the others the largest counts."""


def accuracy(task: Task, settings: TaskSettings, conditions: Conditions, repeats: int) -> Figures:
    """Compare a method's hypergradient with the exact one, and measure its cost.

    The first of ``repeats + 1`` identical runs gives the hypergradient, its diagnostics and its
    memory, and warms everything up; the others give the time, of the upper level's whole gradient
    (its own backward pass and everything below), without the forward pass of its loss.

    Returns:
        ``cosine`` and ``error`` against the exact hypergradient of the task, ``aim`` and
        ``aim_error`` against what the method approximates, ``milliseconds`` (median),
        ``memory_bytes``, what the method reports, ``norm``, ``exact_norm`` and ``lower_residual``
        (norm of the lower loss's gradient at this point), and ``status``.
    """
    steps = getattr(conditions.method, "steps", None)
    conditions = replace(conditions, lower_steps=max(settings.lower_steps, steps or 1))
    aim = aim_of(conditions.method, conditions.lower_steps)
    with defaults(conditions):
        program, gradient, used = _first_step(task, settings, conditions, memory.peak)
        flat = _flat(gradient)
        figures: Figures = {
            "aim": str(aim),
            "exact": str(program.exact),
            "provenance": program.provenance,
            "norm": float(flat.norm()),
            "memory_bytes": used,
            "lower_residual": program.residual(),
            **diagnostics(program),
        }
        if not math.isfinite(figures["norm"]):
            return {**figures, "status": "not finite"}
        figures |= _against(flat, program, program.exact)
        own = _against(flat, program, aim)
        figures |= {f"aim_{key}": own[key] for key in ("cosine", "error") if key in own}
        seconds = []
        for _ in range(repeats):
            _, _, spent = _first_step(task, settings, conditions, _timed)
            seconds.append(spent)
    figures["milliseconds"] = 1e3 * sorted(seconds)[len(seconds) // 2]
    return {**figures, "status": "diverged" if figures.get("diverged") else "ok"}


def training(
    task: Task, settings: TaskSettings, conditions: Conditions, iterations: int, every: int
) -> Figures:
    """Train from end to end.

    Returns:
        ``curve``, a list of ``step`` (of the upper level), ``seconds`` (in training alone, without
        these evaluations), ``objective`` and ``score``; the last ``objective`` and ``score``;
        ``status``, which is ``diverged`` as soon as either is not finite.
    """
    conditions = replace(conditions, lower_steps=settings.lower_steps)
    with defaults(conditions):
        seed_everything(conditions.seed)
        program = task(settings, conditions)
        synchronise = _synchroniser(conditions.device)
        program.engine.train()
        seconds = 0.0
        curve: list[Figures] = []
        for step in range(iterations + 1):
            if step % every == 0 or step == iterations:
                point = {"objective": program.objective(), "score": program.score()}
                curve.append({"step": step, "seconds": seconds, **point})
                if not all(math.isfinite(value) for value in point.values()):
                    break
            if step < iterations:
                start = time.perf_counter()
                _to_upper_step(program)
                synchronise()
                seconds += time.perf_counter() - start
    last = curve[-1]
    finite = math.isfinite(last["objective"]) and math.isfinite(last["score"])
    return {
        "curve": curve,
        "objective": last["objective"],
        "score": last["score"],
        "seconds": seconds,
        "score_name": program.score_name,
        "score_note": program.score_note,
        "higher_is_better": program.higher_is_better,
        "provenance": program.provenance,
        "status": "ok" if finite else "diverged",
    }


def diagnostics(program: Program) -> Figures:
    """What the methods of the last hypergradient's hops reported, put together over the levels."""
    found: Figures = {}
    figures = read_scalars(program.upper.metrics)
    for level in program.engine.problems:
        prefix = f"hypergradient/{level.name}_"
        for name in figures:
            if name.startswith(prefix):
                key, value = name.removeprefix(prefix), figures[name]
                total = found.get(key, 0.0) + value
                found[key] = total if key in SUMMED else max(found.get(key, value), value)
    # The method's own clock: here the whole gradient is timed instead.
    found.pop("seconds", None)
    return found


@contextmanager
def defaults(conditions: Conditions) -> Iterator[None]:
    """Run the body with the conditions' dtype as torch's default; leave no trace of either.

    On CUDA the generators' states aren't put back.
    """
    with default_dtype(conditions.dtype), replayed(None):
        yield


def _first_step(
    task: Task,
    settings: TaskSettings,
    conditions: Conditions,
    measure: Callable[[Callable[[], Any], str], tuple[Any, Any]],
) -> tuple[Program, list[Tensor], Any]:
    """A new program up to the upper level's first step; ``measure`` runs its gradient."""
    seed_everything(conditions.seed)
    program = task(settings, conditions)
    program.engine.train()
    program.settle()
    upper = program.upper
    backward = upper.backward
    gradient: list[Tensor] = []
    measured: list[Any] = []

    def measuring(*args: Any, **kwargs: Any) -> Any:
        result, figure = measure(lambda: backward(*args, **kwargs), conditions.device)
        measured.append(figure)
        gradient.extend(
            torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for p in upper.trainable_parameters()
        )
        return result

    own = upper.__dict__  # of this one object, over its class
    own["backward"] = measuring
    _to_upper_step(program)
    del own["backward"]
    return program, gradient, measured[0]


def _to_upper_step(program: Program) -> None:
    """Iterate until the upper level has taken one more step."""
    before = program.upper.count
    while program.upper.count == before:
        program.engine.iterate()


def _timed(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    synchronise = _synchroniser(device)
    synchronise()
    start = time.perf_counter()
    result = function()
    synchronise()
    return result, time.perf_counter() - start


def _synchroniser(device: str) -> Callable[[], None]:
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _against(flat: Tensor, program: Program, aim: Aim) -> Figures:
    """Cosine and relative error of a hypergradient, and the norm of what it is compared with."""
    truth = program.truth(aim)
    if truth is None:
        return {}
    exact = _flat(truth)
    size = float(exact.norm())
    return {
        "cosine": float(functional.cosine_similarity(flat, exact, dim=0)) if size else math.nan,
        "error": float((flat - exact).norm()) / size if size else math.nan,
        "exact_norm": size,
    }


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().to("cpu", torch.float64).flatten() for t in tensors])
