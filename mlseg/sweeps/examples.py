"""Pictures of what rows predict: image, truth, and each row's label map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mlseg.errors import UserError
from mlseg.evaluate import own_data
from mlseg.problems.reporting import FinishedRun
from mlseg.segmentation.data import Samples, SegmentationData
from mlseg.segmentation.data.splits import seeded_order
from mlseg.segmentation.metrics import SegmentationMetrics
from mlseg.segmentation.nets import decide
from mlseg.segmentation.pictures import Picture, Row, colour, legend, sheet, to_rgb
from mlseg.segmentation.scoring import predictions
from mlseg.segmentation.trained import load_runs
from mlseg.sweeps.frame import Finished
from mlseg.sweeps.settings import ExamplesSettings
from mlseg.sweeps.showing import digits_of, plain

CPU = torch.device("cpu")


def draw(finished: Finished) -> Iterator[tuple[str, Picture]]:
    """Every picture of examples by name that the report asks for and that a row has finished for.

    Raises:
        UserError: rows are on other data or splits, or an image isn't there.
    """
    for name, wanted in finished.grid.settings.report.examples.items():
        if wanted is None:
            continue
        rows = _rows(finished, wanted)
        if rows:
            yield name, _sheet(finished, f"report.examples.{name}", wanted, rows)


def _rows(finished: Finished, wanted: ExamplesSettings) -> dict[str, list[FinishedRun]]:
    from mlseg.sweeps.report import rows_of  # which has this drawn

    rows = {
        name: [run for run in runs if wanted.seeds is None or run.seed in wanted.seeds]
        for name, runs in rows_of(finished, wanted.where).items()
    }
    return {name: runs for name, runs in rows.items() if runs}


def _sheet(
    finished: Finished, key: str, wanted: ExamplesSettings, rows: dict[str, list[FinishedRun]]
) -> Picture:
    first = next(iter(rows.values()))[0]
    for runs in rows.values():
        for run in runs:
            if run.results["split_hash"] != first.results["split_hash"]:
                raise UserError(
                    f"{finished.grid.path}: {key}: {run.directory} has another split than "
                    f"{first.directory}; name one of the seeds (seeds: [{first.seed}]), or fewer "
                    "rows (where)"
                )
    samples = _chosen(own_data([first.directory]), f"{finished.grid.path}: {key}", wanted)
    metric, spec = finished.metrics[0], samples.spec
    columns = []
    scores: list[list[str]] = [[] for _ in samples.ids]
    for name, runs in rows.items():
        maps = _maps(runs, samples)
        metrics = SegmentationMetrics(spec.num_classes, spec.ignore_index, spec.classes)
        metrics.update(maps, samples.masks, samples.ids)
        columns.append(maps.numpy())
        by_image = metrics.per_image()
        for words, image in zip(scores, samples.ids, strict=True):
            if metric in by_image.get(image, {}):  # not where every pixel is ignored
                score = f"{by_image[image][metric]:.{digits_of(metric)}f}"
                words.append(f"{plain(name)} {score}" if len(rows) > 1 else score)
    lines = [
        Row(
            [
                to_rgb(samples.images[i]),
                *(
                    colour(m, spec.palette)
                    for m in (samples.masks[i].numpy(), *(c[i] for c in columns))
                ),
            ],
            f"{image}   {plain(metric)}: {', '.join(scores[i])}" if scores[i] else image,
        )
        for i, image in enumerate(samples.ids)
    ]
    heads = ["image", "truth", *(map(plain, rows) if len(rows) > 1 else ["prediction"])]
    return sheet(heads, lines, legend(spec, samples.masks, tinted=False))


def _chosen(data: SegmentationData, key: str, wanted: ExamplesSettings) -> Samples:
    named = {"val": data.val, "test": data.test, **data.out_of_distribution}
    there = {name: samples for name, samples in named.items() if len(samples)}
    if wanted.split not in there:
        raise UserError(f"{key}.split: no images of {wanted.split!r}; there are {', '.join(there)}")
    samples = there[wanted.split]
    ids: Sequence[str] = wanted.ids or seeded_order(samples.ids, wanted.seed)[: wanted.images]
    places = {name: index for index, name in enumerate(samples.ids)}
    for name in ids:
        if name not in places:
            raise UserError(
                f"{key}.ids: no image {name!r} in {wanted.split}; the split's names are in "
                "splits.json"
            )
    return samples.subset([places[name] for name in ids])


def _maps(runs: Sequence[FinishedRun], samples: Samples) -> torch.Tensor:
    """(N, H, W) uint8 at the networks' size: the mean of their probabilities, as configured."""
    ensemble = load_runs([run.directory for run in runs], CPU)
    found = [
        decide(probabilities, ensemble.threshold).to(torch.uint8)
        for _, probabilities in predictions(ensemble, samples, CPU)
    ]
    return torch.cat(found)
