"""What SegAN adds to the page of a run."""

from __future__ import annotations

from mlseg.problems.reporting import PAGES, Chart, Piece, RecordedRun


@PAGES.register("segan.k")
def annealed_k(run: RecordedRun) -> list[Piece]:
    """The k of the segmentor's logistic, as it was annealed."""
    if run.config.get("system") != "segan":
        return []
    found = run.curves.get("segmentor", {}).get("k")
    return [] if found is None else [Chart("k of the logistic 1 / (1 + exp(-z / k))", {"k": found})]
