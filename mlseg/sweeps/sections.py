"""What any system's runs can add to a report: constant answers, ensembles, calibration, memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlseg.calibrate import KS, THRESHOLDS, chosen
from mlseg.errors import UserError
from mlseg.evaluate import own_data
from mlseg.problems.reporting import FIGURES, SECTIONS, Block, FinishedRun
from mlseg.segmentation.calibration import Choice
from mlseg.segmentation.data import DataSettings, Samples, SegmentationData, load_data
from mlseg.segmentation.metrics import SegmentationMetrics
from mlseg.segmentation.scoring import score
from mlseg.segmentation.trained import Ensemble, load_runs
from mlseg.sweeps.frame import spread
from mlseg.sweeps.running import NOTE
from mlseg.sweeps.showing import digits_of, plain, show

CPU = torch.device("cpu")
Rows = Mapping[str, Sequence[FinishedRun]]


@SECTIONS.register("constant_answers")
def constant_answers(rows: Rows, metric: str | None = None) -> list[Block]:
    """Scores of predicting one class everywhere, over the splits of all seeds.

    Args:
        metric: None: the headline one.
    """
    found: dict[str, dict[str, list[float]]] = {}
    by_data = {run.results["split_hash"]: run for runs in rows.values() for run in runs}
    for run in by_data.values():
        data = load_data(DataSettings.model_validate(run.config["data"]), unlabelled=False)
        if data.split_hash != run.results["split_hash"]:
            raise UserError(
                f"{run.directory}: its images can't be found again; set MLSEG_DATA as for the runs"
            )
        for split, samples in _tested(data).items():
            for index, name in enumerate(samples.spec.classes):
                value = _of_constant(samples, index)[metric or run.results["metric"]]
                found.setdefault(split, {}).setdefault(f"all {name}", []).append(value)
    return [
        Block(f"Constant answers, {split}", ["answer", "splits", "score"], body)
        for split, answers in found.items()
        for body in [[[n, str(len(v)), show(spread(v), 3)] for n, v in answers.items()]]
    ]


@FIGURES.register("memory")
def memory(run: FinishedRun) -> float | None:
    """Peak of the run's process, or on its GPU, in MiB; None of a run that no sweep has made.

    A run that was interrupted has that of its last process.
    """
    try:
        note = json.loads((run.directory / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = note.get("memory_mib")
    return None if found is None else float(found)


def _of_constant(samples: Samples, index: int) -> dict[str, float]:
    spec = samples.spec
    metrics = SegmentationMetrics(spec.num_classes, spec.ignore_index, spec.classes)
    masks = torch.as_tensor(samples.masks)
    metrics.update(torch.full_like(masks, index, dtype=torch.int64), masks, samples.ids)
    return metrics.compute()


def calibrated(run: FinishedRun, threshold_alone: bool = False) -> FinishedRun:
    """The run with ``scores.calibrated``, and what was chosen for it on validation images.

    As ``mlseg.calibrate`` chooses and ``mlseg.evaluate`` scores; nothing is stored. The score that
    it was chosen by is that on ``val``.

    Args:
        threshold_alone: at the network's own k.
    """
    ensemble = load_runs([run.directory], CPU)
    data, metric = own_data([run.directory]), str(run.results["metric"])
    ks = [ensemble.first.own_k] if threshold_alone else KS
    better, choice = _choose(ensemble, data, metric, ks)
    own = {"val": {metric: choice.value}, **_scores(better, data)}
    scores = {**run.results["scores"], "calibrated": own}
    chosen = {"k": choice.k, "threshold": choice.threshold}
    results = {**run.results, "scores": scores, "choice": chosen}
    return FinishedRun(run.directory, run.seed, results, run.config)


@SECTIONS.register("ensembles")
def ensembles(
    rows: Rows,
    metrics: Sequence[str] = ("jaccard", "dice"),
    title: str = "Ensembles of the seeds",
) -> list[Block]:
    """The mean of the seeds' probabilities, as configured and with k and threshold chosen.

    Args:
        metrics: shown.
        title: of the tables.
    """
    blocks: dict[str, list[list[str]]] = {}
    choices = []
    for name, runs in rows.items():
        if len(runs) < 2:
            continue
        directories = [run.directory for run in runs]
        data, together = own_data(directories), load_runs(directories, CPU)
        better, own = _choose(together, data, str(runs[0].results["metric"]), KS)
        singly = [run.results["choice"] for run in runs if "choice" in run.results]
        pairs = [(choice["k"], choice["threshold"]) for choice in singly]
        choices.append(
            [name, "; ".join(f"{k:g}, {t:g}" for k, t in [*pairs, (own.k, own.threshold)])]
        )
        for how, made in (("as configured", together), ("calibrated", better)):
            for split, values in _scores(made, data).items():
                cells = [f"{values[m]:.{digits_of(m)}f}" for m in metrics]
                blocks.setdefault(f"{title}, {how}, {split}", []).append(
                    [name, str(len(runs)), *cells]
                )
    if not choices:
        return []
    head = ["row", "runs", *map(plain, metrics)]
    said = Block(
        "Chosen on validation images", ["row", "k, threshold; the ensemble's last"], choices
    )
    return [*(Block(title, head, body) for title, body in blocks.items()), said]


def _choose(
    ensemble: Ensemble, data: SegmentationData, metric: str, ks: Sequence[float]
) -> tuple[Ensemble, Choice]:
    native = ensemble.first.scoring == "native"
    _, choice, _ = chosen(ensemble, data.val, CPU, ks, THRESHOLDS, native, metric)
    return ensemble.with_choice(choice.k, choice.threshold), choice


def _scores(ensemble: Ensemble, data: SegmentationData) -> dict[str, dict[str, float]]:
    native, threshold = ensemble.first.scoring == "native", ensemble.threshold
    return {
        split: score(
            ensemble, samples, CPU, threshold=threshold, native=native, distances=True
        ).compute()
        for split, samples in _tested(data).items()
    }


def _tested(data: SegmentationData) -> dict[str, Samples]:
    found = {"test": data.test, **data.out_of_distribution}
    return {split: samples for split, samples in found.items() if len(samples)}


def run_section(kind: str, rows: Rows, options: Mapping[str, Any]) -> Sequence[Block]:
    """The blocks of a registered section.

    Raises:
        UserError: it doesn't take these options.
    """
    try:
        return SECTIONS.get(kind)(rows, **options)
    except TypeError as error:
        raise UserError(f"section {kind!r}: {error}") from error
