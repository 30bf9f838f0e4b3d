"""The table of ``segan_rows.py``: scores over seeds, of ensembles, before and after calibration."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows_table import gather, head, publish, show, spread, table

from mlseg.calibration import FILE
from mlseg.errors import UserError

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
    for name, seeds in runs.items():
        folders = [run.directory for run in seeds.values()]
        plain = [["--threshold", str(run.settings.get("threshold", 0.5))] for run in seeds.values()]
        row: dict[str, Any] = {
            "seeds": list(seeds),
            "seconds": spread([run.results["seconds"] for run in seeds.values()]),
            "selected step": spread([float(run.best_step) for run in seeds.values()]),
            "alone": [_evaluate([folder], how) for folder, how in zip(folders, plain, strict=True)],
            "last": [run.results["scores"]["last"]["test"] for run in seeds.values()],
            "choices": [_calibrate([folder]) for folder in folders],
            "calibrated": [_evaluate([folder], []) for folder in folders],
        }
        if len(folders) > 1:
            row["ensemble"] = _evaluate(folders, plain[0])
            row["ensemble choice"] = _calibrate(folders)
            row["calibrated ensemble"] = _evaluate(folders, [])
        report["rows"][name] = row
    publish(out, report, _markdown(report))


def _calibrate(folders: Sequence[Path]) -> dict[str, Any]:
    """What the command chooses for runs together."""
    _command("mlseg.calibrate", *map(str, folders))
    stored = json.loads((folders[0] / FILE).read_text(encoding="utf-8"))
    chosen: dict[str, Any] = stored[-1]
    assert len(chosen["runs"]) == len(folders)
    return chosen


def _evaluate(folders: Sequence[Path], arguments: Sequence[str]) -> dict[str, float]:
    """Test scores by the command, of the mean of the runs' probabilities."""
    scores = folders[0] / "scores.json"
    _command("mlseg.evaluate", *map(str, folders), *arguments, "--out", str(scores))
    values: dict[str, Any] = json.loads(scores.read_text(encoding="utf-8"))["scores"]["test"]
    scores.unlink()
    return {name: values[name] for name in SHOWN}


def _command(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")


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
        chosen = [*row["choices"], *([row["ensemble choice"]] if "ensemble" in row else [])]
        pairs = "; ".join(f"{c['k']:g}, {c['threshold']:g}" for c in chosen)
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
