"""The table of ``e2eaug_rows.py``: scores over seeds, differences to Ours, constant answers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlseg import config, machine
from mlseg.errors import UserError
from mlseg.run import parse_run
from mlseg.segmentation.data import DataSettings, Samples, load_data
from mlseg.segmentation.metrics import SegmentationMetrics

PRETRAINING = "pretraining"
OURS = "ours"
# What has to agree between rows for their scores to be compared at all.
COMPARED = ("segmentor", "loss", "engine", "precision")


@dataclass(frozen=True)
class Run:
    """One finished run: its ``results.json``, its settings, and where it lies."""

    results: dict[str, Any]
    settings: dict[str, Any]
    directory: Path

    def score(self, weights: str, split: str) -> float:
        """The headline metric of ``best`` or ``last`` weights on a split."""
        return self.results["scores"][weights][split][self.results["metric"]]

    @property
    def pretraining(self) -> int:
        """Iterations that this run spent on the GAN alone."""
        gan = self.settings.get("gan")
        return gan["pretrain"] if gan and gan["pretrained"] is None else 0

    @property
    def best_step(self) -> int:
        """The selected step, counted from the segmentor's first."""
        return self.results["best"]["step"] - self.pretraining


Runs = dict[str, dict[int, Run]]


def write(out: Path) -> None:
    """Write ``table.md`` and ``table.json`` of the finished runs below ``out``; print the first.

    Raises:
        UserError: nothing has finished, or the runs can't be compared (real with synthetic data,
            different data, splits or segmentor settings).
    """
    runs, report = gather(out, COMPARED)
    shared = finished(out / PRETRAINING)
    some = [run for seeds in runs.values() for run in seeds.values()]
    report["seconds_shared_pretraining"] = spread([r.results["seconds"] for r in shared.values()])
    report["splits"] = {}
    for split in sorted({s for run in some for s in run.results["scores"]["last"]} - {"val"}):
        report["splits"][split] = _of_split(runs, split)
    report["search"] = _search(runs)
    publish(out, report, _markdown(report))


def gather(out: Path, compared: Sequence[str]) -> tuple[Runs, dict[str, Any]]:
    """The finished runs of the rows that were asked for, and the head of a report on them.

    Args:
        compared: sections of the config in which rows shouldn't differ.

    Raises:
        UserError: nothing has finished, or the runs can't be compared.
    """
    path = out / "rows.json"
    if not path.exists():
        raise UserError(f"{path} is missing; run the rows first, without --table")
    asked = json.loads(path.read_text(encoding="utf-8"))
    runs: Runs = {name: found for name in asked["rows"] if (found := finished(out / name))}
    if not runs:
        raise UserError(f"no run below {out} has finished yet")
    notes = check(runs, compared)
    some = [run for seeds in runs.values() for run in seeds.values()]
    report: dict[str, Any] = {
        "provenance": some[0].results["provenance"],
        "data": some[0].results["data"],
        "metric": some[0].results["metric"],
        "machine": machine.describe(),
        "device": sorted({run.results["device"] for run in some}),
        "commands": asked["commands"],
        "overrides": {name: asked["rows"][name]["overrides"] for name in runs},
        "notes": notes,
    }
    # The runs' versions, which need not be those of today; the commands say the revision.
    del report["machine"]["revision"]
    report["machine"]["versions"] = "; ".join(
        sorted({", ".join(f"{k} {v}" for k, v in run.results["versions"].items()) for run in some})
    )
    return runs, report


def head(report: dict[str, Any], title: str) -> list[str]:
    """The first lines of a table's page."""
    lines = [f"# {title} on {report['data']}, {report['provenance']} images", ""]
    lines += [machine.head(report["machine"]), f"- runs on: {'; '.join(report['device'])}"]
    lines += [f"- command: `{command}`" for command in report["commands"]]
    for name, overrides in report["overrides"].items():
        lines.append(f"- {name}: {' '.join(f'`{text}`' for text in overrides) or 'as configured'}")
    return [*lines, *(f"- **not comparable:** {note}" for note in report["notes"])]


def publish(out: Path, report: dict[str, Any], text: str) -> None:
    """Write ``table.md`` and ``table.json``, and print the first."""
    (out / "table.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)


def finished(folder: Path) -> dict[int, Run]:
    """Runs of a row by seed."""
    runs = {}
    for path in folder.glob("seed_*/results.json"):
        settings = parse_run(config.load(path.parent / "config.yaml"))[0].model_dump(mode="json")
        results = json.loads(path.read_text(encoding="utf-8"))
        runs[int(path.parent.name.removeprefix("seed_"))] = Run(results, settings, path.parent)
    return dict(sorted(runs.items()))


def check(runs: Runs, compared: Sequence[str]) -> list[str]:
    """Refuse what can't be compared; return remarks on what differs."""
    some = [run for seeds in runs.values() for run in seeds.values()]
    for key in ("provenance", "data", "metric"):
        found = sorted({str(run.results[key]) for run in some})
        if len(found) > 1:
            raise UserError(f"the runs differ in {key}: {', '.join(found)}; keep them apart")
    hashes: dict[int, str] = {}
    for seeds in runs.values():
        for seed, run in seeds.items():
            if hashes.setdefault(seed, run.results["split_hash"]) != run.results["split_hash"]:
                raise UserError(f"{run.directory}: another split than the other rows of its seed")
    notes = []
    first_name = next(iter(runs))
    first = next(iter(runs[first_name].values())).settings
    for name, seeds in runs.items():
        for seed, run in seeds.items():
            different = [key for key in compared if run.settings[key] != first[key]]
            own, other = (s["problems"]["segmentor"] for s in (run.settings, first))
            # How an upper level's gradient passes through it is no part of its own training.
            different += [
                f"problems.segmentor.{key}"
                for key in own
                if key != "hypergradient" and own[key] != other.get(key)
            ]
            if different:
                notes.append(f"{name}, seed {seed}: {', '.join(different)} other than {first_name}")
    return notes


def _of_split(runs: Runs, split: str) -> dict[str, Any]:
    rows = {}
    for name, seeds in runs.items():
        have = {s: r for s, r in seeds.items() if split in r.results["scores"]["last"]}
        if not have:
            continue
        metric = f"{next(iter(have.values())).results['metric']}_std"
        rows[name] = {
            "seeds": list(have),
            "best": spread([run.score("best", split) for run in have.values()]),
            "last": spread([run.score("last", split) for run in have.values()]),
            "per_seed": {
                s: [r.score("best", split), r.score("last", split)] for s, r in have.items()
            },
            "within": spread(
                [run.results["scores"]["best"][split][metric] for run in have.values()]
            ),
            "best_step": spread([float(run.best_step) for run in have.values()]),
            "seconds": spread([run.results["seconds"] for run in have.values()]),
        }
    differences: dict[str, dict[str, Any]] = {}
    for name, seeds in runs.items():
        if name == OURS or OURS not in runs:
            continue
        both = [s for s in seeds if s in runs[OURS] and name in rows]
        for weights in ("best", "last"):
            values = [
                runs[OURS][s].score(weights, split) - seeds[s].score(weights, split) for s in both
            ]
            if values:
                differences.setdefault(name, {})[weights] = {
                    **spread(values),
                    "seeds": len(values),
                    "wins": sum(value > 0 for value in values),
                }
    return {"rows": rows, "ours_minus": differences, "constant": _constant(runs, split)}


def _constant(runs: Runs, split: str) -> dict[str, dict[str, float]]:
    """Scores of predicting one class everywhere, over the splits of all seeds."""
    values: dict[str, list[float]] = {}
    by_seed = {seed: run for seeds in runs.values() for seed, run in seeds.items()}
    for run in by_seed.values():
        data = load_data(DataSettings.model_validate(run.settings["data"]))
        samples = data.test if split == "test" else data.out_of_distribution.get(split)
        if samples is None or data.manifest["hash"] != run.results["split_hash"]:
            raise UserError(
                f"{run.directory}: its {split} images can't be found again; set MLSEG_DATA as for "
                "the runs"
            )
        for index, name in enumerate(samples.spec.classes):
            score = _score_constant(samples, index)[run.results["metric"]]
            values.setdefault(f"all {name}", []).append(score)
    return {name: spread(found) for name, found in values.items()}


def _score_constant(samples: Samples, index: int) -> dict[str, float]:
    spec = samples.spec
    metrics = SegmentationMetrics(spec.num_classes, spec.ignore_index, spec.classes)
    masks = torch.as_tensor(samples.masks)
    metrics.update(torch.full_like(masks, index, dtype=torch.int64), masks, samples.ids)
    return metrics.compute()


def _search(runs: Runs) -> dict[str, Any]:
    """How far the alphas went, for rows that learn them."""
    found = {}
    for name, seeds in runs.items():
        records = [
            json.loads((run.directory / "architecture.json").read_text(encoding="utf-8"))
            for run in seeds.values()
            if run.settings.get("architecture", {}).get("mode") == "learned"
            and not run.settings["gan"]["frozen"]
            and (run.directory / "architecture.json").exists()
        ]
        if records:
            moved = [max(max(cell) for cell in record["moved"]) for record in records]
            found[name] = {
                "entropy": spread([record["entropy"] for record in records]),
                "largest_move": spread(moved),
                "choices": [record["choice"] for record in records],
            }
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    if not values:
        return {}
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation}


# ------------------------------------------------------------------------------ Markdown


def _markdown(report: dict[str, Any]) -> str:
    metric = report["metric"].capitalize()
    lines = head(report, "E2EAug's rows")
    for split, found in report["splits"].items():
        lines += ["", f"## {metric}, {split}: mean ± standard deviation over seeds", ""]
        lines += table(
            ["row", "seeds", "selected step", "last step", "over images", "best step", "seconds"],
            [
                [
                    name,
                    str(len(row["seeds"])),
                    show(row["best"], 3),
                    show(row["last"], 3),
                    f"{row['within']['mean']:.3f}",
                    show(row["best_step"], 0),
                    show(row["seconds"], 0),
                ]
                for name, row in found["rows"].items()
            ]
            + [
                [name, "", show(row, 3), show(row, 3), "", "", ""]
                for name, row in found["constant"].items()
            ],
        )
        if found["ours_minus"]:
            lines += ["", f"Ours minus each row, {split}, the same seed and split:", ""]
            lines += table(
                ["row", "seeds", "selected step", "above 0", "last step", "above 0"],
                [
                    [
                        name,
                        str(row["best"]["seeds"]),
                        show(row["best"], 3, sign="+"),
                        str(row["best"]["wins"]),
                        show(row["last"], 3, sign="+"),
                        str(row["last"]["wins"]),
                    ]
                    for name, row in found["ours_minus"].items()
                ],
            )
    lines += [
        "",
        "Selected: on the validation images alone, by the best score; steps count from the "
        "segmentor's first. Over images: standard deviation within a test set at the selected "
        "step, mean over seeds. Seconds: of the whole run, pre-training included where the row has "
        "its own.",
    ]
    shared = report["seconds_shared_pretraining"]
    if shared:
        lines.append(f"The pre-training that rows share took {show(shared, 0)} s beside that.")
    for name, row in report["search"].items():
        lines.append(
            f"\n{name}: entropy of the alphas {show(row['entropy'], 3)} nats (undecided: 1.099), "
            f"largest move of a selection weight {show(row['largest_move'], 3)}."
        )
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def show(spread: dict[str, float], digits: int, sign: str = "") -> str:
    return f"{spread['mean']:{sign}.{digits}f} ± {spread['std']:.{digits}f}"
