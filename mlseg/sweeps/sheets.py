"""Sheets of a sweep: images in columns, what its runs make of them in rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from mlseg.errors import UserError
from mlseg.problems.reporting import ILLUSTRATIONS, FinishedRun
from mlseg.segmentation.data import DataSettings, SegmentationData, load_data, to_float
from mlseg.segmentation.nets import decide
from mlseg.segmentation.pictures import Picture, Row, colour, legend, sheet, to_rgb
from mlseg.segmentation.trained import load_runs
from mlseg.sweeps.checks import fits
from mlseg.sweeps.frame import Finished
from mlseg.sweeps.settings import SheetSettings

Place = tuple[tuple[str, str], ...]
"""Values of the axes that aren't in rows."""


def draw(finished: Finished) -> Iterator[tuple[str, Picture]]:
    """Every sheet of the report by name, one for each value of the axes that aren't in its rows.

    Raises:
        UserError: the runs' images can't be found, or a run's weights not be loaded.
    """
    for name, settings in finished.grid.settings.report.sheets.items():
        if settings is None:
            continue
        groups = _groups(finished, settings)
        shared = set.intersection(*(set(place) for place in groups)) if groups else set()
        for place, runs in groups.items():
            said = [name, *(value for pair in place if pair not in shared for value in pair[1:])]
            yield ", ".join(said), _drawn(settings, finished, runs)


def _groups(finished: Finished, settings: SheetSettings) -> dict[Place, dict[str, FinishedRun]]:
    """Runs by row, for each place; those of the first seed that has any there."""
    seeds: dict[Place, dict[int, dict[str, FinishedRun]]] = {}
    for cell, run in finished.runs.items():
        if fits(settings.where, cell.values):
            place = tuple(pair for pair in cell.at if pair[0] != settings.rows)
            by_row = seeds.setdefault(place, {}).setdefault(cell.seed, {})
            by_row[cell.values[settings.rows]] = run
    order = list(finished.grid.axes[settings.rows])
    return {
        place: dict(sorted(found[min(found)].items(), key=lambda item: order.index(item[0])))
        for place, found in seeds.items()
    }


def _drawn(settings: SheetSettings, finished: Finished, runs: Mapping[str, FinishedRun]) -> Picture:
    first = next(iter(runs.values()))
    data = _data(first)
    heads, images, masks = [], [], []
    for split in settings.splits or finished.splits:
        samples = {"val": data.val, "test": data.test, **data.out_of_distribution}.get(split)
        for index in range(min(settings.images, len(samples) if samples is not None else 0)):
            assert samples is not None
            heads.append(f"{samples.ids[index]} ({split})")
            images.append(samples.images[index])
            masks.append(samples.masks[index])
    if not heads:
        raise UserError(f"{first.directory}: none of a sheet's splits has an image; name another")
    palette, batch = data.spec.palette, torch.stack(images)
    rows = [
        Row([to_rgb(image) for image in images], "image"),
        Row([colour(mask.numpy(), palette) for mask in masks], "truth"),
    ]
    for name, run in runs.items():
        model = load_runs([run.directory], torch.device("cpu"))
        labels = decide(model(to_float(batch)), model.threshold).to(torch.uint8)
        rows.append(Row([colour(mask.numpy(), palette) for mask in labels], name))
    for name, kind in settings.besides.items():
        if name in runs:
            made = ILLUSTRATIONS.get(kind)(runs[name], data, len(heads))
            rows += [Row(pictures, f"{name}: {words}") for words, pictures in made]
    return sheet(heads, rows, legend(data.spec, torch.stack(masks), tinted=False))


def _data(run: FinishedRun) -> SegmentationData:
    data = load_data(DataSettings.model_validate(run.config["data"]), unlabelled=False)
    if data.split_hash != run.results["split_hash"]:
        raise UserError(
            f"{run.directory}: its images can't be found again; set MLSEG_DATA as for the runs"
        )
    return data
