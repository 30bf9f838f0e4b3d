"""Figures of a run that several parts of a page need."""

from __future__ import annotations

from mlseg.reports.reading import Run, at, mapping, number, numbers

FIRST = ("jaccard", "dice", "miou", "accuracy", "sensitivity", "specificity", "precision")


def headline(run: Run) -> tuple[str, str, str] | None:
    """The weights, the split and the metric of the score that a run is judged by."""
    scores = mapping(run.recorded.results.get("scores"))
    for weights in dict.fromkeys(["best", "last", *scores]):
        splits = mapping(scores.get(weights))
        for split in dict.fromkeys(["test", "val", *splits]):
            values = mapping(splits.get(split))
            for metric in (run.recorded.results.get("metric"), *FIRST):
                if isinstance(metric, str) and number(values.get(metric)) is not None:
                    return weights, split, metric
    return None


def score(run: Run, weights: str, split: str, metric: str) -> float | None:
    """Of ``results.json``."""
    return number(at(run.recorded.results, "scores", weights, split, metric))


def interval(run: Run, weights: str, split: str, metric: str) -> tuple[float, float] | None:
    """Of ``evaluation.json``, or of ``results.json``, which has the same."""
    found = numbers(at(run.evaluation, "scores", weights, split, "intervals", metric))
    if not found:
        found = numbers(at(run.recorded.results, "intervals", weights, split, metric))
    return (found[0], found[1]) if len(found) == 2 else None


def of_images(run: Run, weights: str, split: str, metric: str) -> dict[str, float]:
    """The score of every image, by id; empty where they weren't kept."""
    own = mapping(at(run.evaluation, "scores", weights, split))
    ids, values = own.get("images"), numbers(at(own, "scores", metric))
    if not isinstance(ids, list) or len(ids) != len(values):
        return {}
    return dict(zip(map(str, ids), values, strict=True))


def provenance(run: Run) -> str:
    """``real``, ``synthetic``, or that it isn't known."""
    found = run.recorded.results.get("provenance")
    return found if isinstance(found, str) else run.split_provenance


def plain(name: str) -> str:
    """A name as words."""
    return name.replace("_", " ")
