"""What a comparison leaves: the report, the table of all cells, and everything as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlseg import config
from mlseg.comparison import tables
from mlseg.comparison.cells import Cell, Figures
from mlseg.comparison.phases import Results, row
from mlseg.comparison.settings import Comparison
from mlseg.files import write_json, write_text

_IMPLICIT = """\
The exact hypergradient of this task is the **implicit** one: the derivative of the upper loss at
the lower level's solution, where it is measured (norm of the lower gradient there: {residual}).
*Cosine* and *error* (norm of the difference over the norm of the exact one) are against it, for all
methods. A method whose *aim* is another derivative, that through the lower level's last step or
steps, includes the learning rate and leaves out what more steps would add: its *error* can't come
near zero, however well it works. *Aim error* is against the derivative that the method means
to compute, for those others by double backward through their steps in float64."""

_STEPS = """\
The exact hypergradient of this task is that through **{exact}** of each lower level, along which
the system itself descends; no level of it is ever solved, so that there is no implicit one to
compare with. *Cosine* and *error* (norm of the difference over the norm of the exact one) are
against it, for all methods. For a method whose *aim* is another derivative they say how far the two
derivatives are apart here, not how precisely it computes its own; an implicit one has no learning
rate in it, and so another scale."""

_TRAINING = """\
Every method trains for the same number of upper steps, from the same start, with the same lower
level. The upper level's learning rate is chosen per method from one grid ({rates}) by the mean
upper loss after the last step over the tuning seeds ({tuning_seeds}), none of which is reported;
*(edge)* marks a rate at the end of the grid, beyond which a better one may lie. The score, {score},
is taken {note}; {better} is better. Seconds are those of training alone, without the evaluations
of the curves."""


def write(
    comparison: Comparison,
    results: Results,
    figures: Mapping[tuple[str, str], Path],
    directory: Path,
    head: Mapping[str, str],
) -> None:
    """Write ``compare.csv``, ``compare.json`` and ``report.md``.

    Args:
        head: machine, versions, date, command, for the top of the report.

    Raises:
        RunError: one can't be written.
    """
    phases = (results.accuracy, results.tuning, results.training)
    rows = [row(cell, f) for phase in phases for cell, f in phase.items()]
    write_text(directory / "compare.csv", _csv(rows))
    whole = [{**vars(cell), **f} for phase in phases for cell, f in phase.items()]
    rates = [
        {"task": task, "method": method, "rate": rate}
        for (task, method), rate in results.rates.items()
    ]
    write_json(
        directory / "compare.json",
        {
            "head": dict(head),
            "config": comparison.settings.model_dump(mode="json"),
            "rates": rates,
            "cells": whole,
        },
    )
    write_text(directory / "report.md", text(comparison, results, figures, head))


def all_tables(comparison: Comparison, results: Results) -> Iterable[tables.Table]:
    """For the terminal, in the report's order."""
    settings = comparison.settings
    for task in comparison.tasks:
        for dtype in settings.accuracy.dtypes if settings.accuracy else ():
            yield tables.accuracy(results, task, dtype)
        if settings.training is not None:
            yield tables.training(comparison, results, task)


def text(
    comparison: Comparison,
    results: Results,
    figures: Mapping[tuple[str, str], Path],
    head: Mapping[str, str],
) -> str:
    """The report, in Markdown."""
    settings = comparison.settings
    parts = [
        "# Hypergradient methods compared",
        "\n".join(f"- {key}: {value}" for key, value in head.items()),
        *_elsewhere(results, head),
    ]
    for label, (task, own) in comparison.tasks.items():
        values = own.model_dump(exclude={"name"})
        said = ", ".join(f"{key} {value}" for key, value in values.items())
        parts += [f"## {label}", f"Task `{own.name}`: {task.summary.strip()}. Settings: {said}."]
        provenance = _first(results, label, "provenance")
        if provenance:
            parts.append(f"Data: {provenance}.")
        if settings.accuracy is not None:
            parts += ["### Accuracy and cost", _truth(results, label)]
            for dtype in settings.accuracy.dtypes:
                parts += [
                    f"In {dtype}, median over {len(settings.seeds)} seeds (least to largest):"
                ]
                parts += [tables.accuracy(results, label, dtype).markdown()]
                parts += [_picture(figures, label, dtype)]
        if settings.training is not None:
            better = "more" if _first(results, label, "higher_is_better") else "less"
            parts += [
                "### From end to end",
                _TRAINING.format(
                    rates=", ".join(f"{rate:g}" for rate in settings.training.rates),
                    tuning_seeds=", ".join(map(str, settings.training.tuning_seeds)),
                    score=tables.score_name(results, label),
                    note=_first(results, label, "score_note") or "at the end",
                    better=better,
                ),
                f"{settings.training.iterations} upper steps of {own.lower_steps} lower steps in "
                f"{settings.training.dtype}, upper optimizer {settings.training.optimizer}; median "
                f"over {len(settings.seeds)} seeds (least to largest):",
                tables.training(comparison, results, label).markdown(),
                _picture(figures, label, "training"),
            ]
    failed = list(_failures(results))
    if failed:
        parts += ["## What failed", "\n".join(failed)]
    parts += ["## How costs are measured", _costs(comparison)]
    parts += ["## Config", f"```yaml\n{config.dump(settings).strip()}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _costs(comparison: Comparison) -> str:
    device = comparison.device
    memory = (
        "`torch.cuda.max_memory_allocated` less what was allocated before"
        if device.startswith("cuda")
        else "the peak of the sum of all blocks that torch's CPU allocator handed out and took "
        "back during it, as its profiler reports them, in a run of its own"
    )
    repeats = comparison.settings.accuracy.repeats if comparison.settings.accuracy else 0
    return (
        "*ms* is wall-clock for the upper level's whole gradient, from its loss: its own backward "
        f"pass and all that happens in the levels below; the median of {repeats} runs, each on "
        "levels built anew, so that nothing is warm-started, after one that isn't counted. What a "
        "method records during the lower level's steps isn't in it, but is in the seconds from end "
        f"to end. *MiB* is the peak extra memory of the same: {memory}; records kept since earlier "
        "steps aren't in it. *Evals* (of the lower loss, each forward and backward), *HVPs* "
        "(Hessian-vector products), *iters* and *residual* are what the methods report, added up "
        "over the levels (the residual: the largest); a dash where one reports none."
    )


def _truth(results: Results, task: str) -> str:
    cells = [f for c, f in results.accuracy.items() if c.task == task and "exact" in f]
    if not cells:
        return "No hypergradient could be measured; see what failed."
    if cells[0]["exact"] == "implicit":
        found = [f["lower_residual"] for f in cells if f.get("lower_residual") is not None]
        largest = tables.format_number(max(found)) if found else "not known"
        return _IMPLICIT.format(residual=f"at most {largest}")
    return _STEPS.format(exact=cells[0]["exact"])


def _first(results: Results, task: str, key: str) -> Any:
    for phase in (results.accuracy, results.tuning, results.training):
        for cell, figures in phase.items():
            if cell.task == task and key in figures:
                return figures[key]
    return None


def _picture(figures: Mapping[tuple[str, str], Path], task: str, what: str) -> str:
    path = figures.get((task, what))
    return f"![{task}, {what}]({path.name})" if path is not None else ""


def _failures(results: Results) -> Iterable[str]:
    for phase in (results.accuracy, results.tuning, results.training):
        for cell, figures in phase.items():
            if figures["status"] != "ok":
                place = f"{cell.phase}, {cell.task}, {cell.method}, {cell.dtype}, seed {cell.seed}"
                rate = "" if cell.rate is None else f", rate {cell.rate:g}"
                reason = f": {figures['reason']}" if "reason" in figures else ""
                yield f"- {place}{rate}: {figures['status']}{reason}"


def _elsewhere(results: Results, head: Mapping[str, str]) -> list[str]:
    """A warning where cells were computed under other circumstances than the head tells."""
    others = {
        "; ".join(f"{k}: {v}" for k, v in f["machine"].items() if head.get(k) != v)
        for phase in (results.accuracy, results.tuning, results.training)
        for f in phase.values()
    } - {""}
    if not others:
        return []
    listed = "\n".join(f"- {other}" for other in sorted(others))
    return [f"Some cells were computed before, where this was different:\n\n{listed}"]


def _csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for r in rows for key in r))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def failed(results: Results) -> list[tuple[Cell, Figures]]:
    """Cells that raised something."""
    return [
        (cell, f)
        for phase in (results.accuracy, results.tuning, results.training)
        for cell, f in phase.items()
        if f["status"] == "failed"
    ]
