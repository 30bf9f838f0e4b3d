"""The table of ``segan_rows.py``: scores over seeds, of ensembles, before and after calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows_table import gather, head, publish, show, spread, table

from mlseg.calibrate import KS, THRESHOLDS, choose
from mlseg.evaluate import own_data
from mlseg.segmentation.scoring import score
from mlseg.segmentation.trained import Ensemble, load_runs

SHOWN = (
    "jaccard",
    "thresholded_jaccard",
    "dice",
    "accuracy",
    "sensitivity",
    "specificity",
    "hd95",
    "pooled_jaccard",
)
DIGITS = {"hd95": 2}
FIRST = "segan"
# The losses are what differs.
COMPARED = ("data", "augmentation", "segmentor", "engine", "precision")


def write(out: Path) -> None:
    """Write ``table.md`` and ``table.json`` of the finished runs below ``out``; print the first.

    Raises:
        UserError: nothing has finished, or the runs can't be compared.
    """
    runs, report = gather(out, COMPARED)
    report["rows"] = {}
    data = own_data([run.directory for seeds in runs.values() for run in seeds.values()])

    def tested(ensemble: Ensemble) -> dict[str, float]:
        """Scores on the test images, as ``mlseg.evaluate`` has them."""
        threshold = ensemble.threshold
        found = score(ensemble, data.test, "cpu", threshold=threshold, native=True, distances=True)
        values = found.compute()
        return {key: values[key] for key in SHOWN}

    def chosen(ensemble: Ensemble) -> tuple[Ensemble, list[float]]:
        """The ensemble as ``mlseg.calibrate`` would have it, and its k and threshold."""
        cpu, metric = torch.device("cpu"), report["metric"]
        _, choice = choose(ensemble, data.val, cpu, KS, THRESHOLDS, True, metric)
        own = [choice.k, choice.threshold]
        return ensemble.with_choice(*own), own

    for name, seeds in runs.items():
        alone = [load_runs([run.directory], torch.device("cpu")) for run in seeds.values()]
        calibrated, choices = zip(*(chosen(ensemble) for ensemble in alone), strict=True)
        row: dict[str, Any] = {
            "seeds": list(seeds),
            "seconds": spread([run.results["seconds"] for run in seeds.values()]),
            "selected step": spread([float(run.best_step) for run in seeds.values()]),
            "alone": [run.results["scores"]["best"]["test"] for run in seeds.values()],
            "last": [run.results["scores"]["last"]["test"] for run in seeds.values()],
            "choices": list(choices),
            "calibrated": [tested(ensemble) for ensemble in calibrated],
        }
        if len(alone) > 1:
            together = load_runs([run.directory for run in seeds.values()], torch.device("cpu"))
            better, own = chosen(together)
            row["choices"].append(own)
            row["ensemble"], row["calibrated ensemble"] = tested(together), tested(better)
        report["rows"][name] = row
    publish(out, report, _markdown(report))


# ------------------------------------------------------------------------------ Markdown


def _markdown(report: dict[str, Any]) -> str:
    lines = head(report, "SegAN's rows")
    rows = report["rows"]
    names = [name.replace("_", " ") for name in SHOWN]
    for title, single, together in (
        ("at the config's threshold", "alone", "ensemble"),
        ("with k and threshold chosen on validation images", "calibrated", "calibrated ensemble"),
    ):
        lines += ["", f"## Test scores, {title}: mean ± standard deviation over seeds", ""]
        body = []
        for name, row in rows.items():
            cells = [_cell(row[single], key) for key in SHOWN]
            body.append([name, str(len(row["seeds"])), *cells])
            if together in row:
                cells = [f"{row[together][key]:.{DIGITS.get(key, 3)}f}" for key in SHOWN]
                body.append([f"{name}, ensemble", "", *cells])
        lines += table(["row", "seeds", *names], body)
    if FIRST in rows and len(rows) > 1:
        lines += ["", "Jaccard of segan minus each row, the same seeds:", ""]
        body = []
        for name, row in rows.items():
            both = [seed for seed in row["seeds"] if seed in rows[FIRST]["seeds"]]
            if name == FIRST or not both:
                continue
            cells = []
            for kind in ("alone", "calibrated", "last"):
                mine, its = (
                    [rows[n][kind][rows[n]["seeds"].index(s)]["jaccard"] for s in both]
                    for n in (FIRST, name)
                )
                differences = [a - b for a, b in zip(mine, its, strict=True)]
                above = sum(d > 0 for d in differences)
                cells += [show(spread(differences), 3, sign="+"), f"{above} of {len(both)}"]
            body.append([name, *cells])
        titles = [
            "row",
            "selected step",
            "above 0",
            "calibrated",
            "above 0",
            "last step",
            "above 0",
        ]
        lines += table(titles, body)
    lines += ["", "| row | last step, Jaccard | selected step | seconds | k, threshold chosen |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        pairs = "; ".join(f"{k:g}, {threshold:g}" for k, threshold in row["choices"])
        lines.append(
            f"| {name} | {_cell(row['last'], 'jaccard')} | {show(row['selected step'], 0)} | "
            f"{show(row['seconds'], 0)} | {pairs} |"
        )
    lines += [
        "",
        "Scores are means over test images, at the masks' own size; HD95 in pixels of it; pooled: "
        "over the pixels of all. Weights selected on validation images, by the Jaccard at the "
        "networks' size. The ensemble is the mean of the seeds' probabilities; its choice of k and "
        "threshold stands last.",
    ]
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[dict[str, float]], key: str) -> str:
    return show(spread([value[key] for value in values]), DIGITS.get(key, 3))
