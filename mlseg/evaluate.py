"""Score a finished run, or an ensemble of runs, on any data set.

    python -m mlseg.evaluate runs/try                          its own test split
    python -m mlseg.evaluate runs/a runs/b runs/c              the mean of their probabilities
    python -m mlseg.evaluate runs/try --data ph2 dermis        whole sets, out of distribution
    python -m mlseg.evaluate runs/try --data folder --root my/images --out scores.json

Scores are means over images by the runs' selected weights, counted at each mask's own size
(``--scale trained``: at the size the run was trained at); below each the interval that holds 95 %
of the means of images drawn with replacement. What ``mlseg.calibrate`` chose for
exactly these weights is used, unless ``--k`` or ``--threshold`` say otherwise.

Scores of a single run are added to its ``evaluation.json`` and ``report.html`` too, where these can
be written; what training ended with stays.

A run may be somebody else's. Its files are read, and none of the modules that it names is imported
but mlseg's own; a run with parts from elsewhere needs ``--trust``. Nothing is downloaded for it.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlseg import signals, threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded
    signals.end_at_once()

import torch
from rich.table import Table

from mlseg import config
from mlseg.commands import (
    INTERVAL,
    guarded,
    interval_cells,
    make_console,
    named,
    print_whole,
    worded,
)
from mlseg.config.registry import say_foreign, strangers, trusted
from mlseg.engines.evaluation import spans
from mlseg.engines.segmentation import check_same_data
from mlseg.errors import UserError
from mlseg.files import require_file, require_writable, write_json
from mlseg.machine import choose_device
from mlseg.problems.systems import parse_run
from mlseg.reports.keeping import keep
from mlseg.reports.page import PAGE
from mlseg.resuming import require_untouched
from mlseg.segmentation.calibration import calibrated, describe
from mlseg.segmentation.data import (
    DataSettings,
    SegmentationData,
    data_set,
    load_data,
    load_examples,
)
from mlseg.segmentation.data.decode import MEGAPIXELS, limit_pixels
from mlseg.segmentation.data.layout import MAX_FILES, folder_layout
from mlseg.segmentation.metrics import SCORES
from mlseg.segmentation.scoring import score
from mlseg.segmentation.trained import Ensemble, load_runs, run_threads


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(prog="mlseg evaluate", description="Score a finished run.")
    made.add_argument("runs", type=named, nargs="+", metavar="RUN", help="run directories")
    made.add_argument(
        "--data", type=worded, nargs="+", metavar="NAME", help="data sets; default: the run's own"
    )
    made.add_argument("--root", type=worded, help="folder of the data set, when one is named")
    for key, text in (
        ("images", "folder of its images (images)"),
        ("masks", "folder of its masks (masks)"),
        ("mask-pattern", "how masks are named, such as {id}_mask* ({id})"),
    ):
        made.add_argument(
            f"--{key}",
            type=worded,
            help=f"of --data folder: {text}; as data.{key.replace('-', '_')} of a config",
        )
    made.add_argument("--scale", choices=("native", "trained"), help="default: the run's own")
    made.add_argument(
        "--max-files", type=int, default=MAX_FILES, metavar="N", help="in a data set's folder"
    )
    add_choices(made)
    add_tta(made)
    threads.add_flag(made)
    made.add_argument("--out", type=named, help="JSON file for all figures, per image too")
    made.add_argument(
        "--overwrite", action="store_true", help="also a file there that evaluate hasn't written"
    )
    return made


def _run(arguments: argparse.Namespace) -> int:
    if arguments.root is not None and len(arguments.data or ()) != 1:
        raise UserError("--root: the folder of one data set; name exactly one with --data")
    where = arguments.images, arguments.masks, arguments.mask_pattern
    if any(where) and arguments.data != ["folder"]:
        raise UserError("--images, --masks, --mask-pattern: are of --data folder alone; drop them")
    layout = folder_layout(*where) if any(where) else None
    limit_pixels(arguments.max_megapixels)
    if arguments.out is not None:
        check_output(arguments.out, arguments.overwrite)
    device = choose_device(arguments.device)
    ensemble = load_chosen(arguments, device)
    chosen = choose_threads(arguments).use()
    trained = ensemble.first
    if arguments.data is None:
        data = own_data(arguments.runs, trained.config)
        own = {"test": data.test, **data.out_of_distribution}
        sets = {name: samples for name, samples in own.items() if len(samples)}
        if not sets:
            raise _nothing_of_its_own(arguments.runs[0], data.manifest["dataset"])
    else:
        size, spec, fit = trained.image_size, trained.spec, trained.fit
        with strangers(trusted=True, said=False):
            sets = {
                name: load_examples(
                    name, arguments.root, size, spec, fit, arguments.max_files, layout
                )
                for name in arguments.data
            }
    scale = arguments.scale or trained.scoring
    shown = list(dict.fromkeys([trained.spec.metric, *SCORES, "hd95", "nsd", "pooled_jaccard"]))
    names = ", ".join(map(str, arguments.runs))
    steps = ", ".join(str(member.step) for member in ensemble.members)
    title = f"{names}, {arguments.weights} weights (step {steps}), {describe(ensemble)}, {scale}"
    table = Table("data", "images", *shown, title=title)
    figures: dict[str, Any] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    for name, samples in sets.items():
        metrics = score(
            ensemble,
            samples,
            device,
            threshold=ensemble.threshold,
            native=scale == "native",
            distances=True,
        )
        values = metrics.compute()
        figures[name] = {**values, "per_image": metrics.per_image()}
        intervals[name] = spans(metrics)
        table.add_row(
            name,
            str(len(samples)),
            *(f"{values[key]:.4f}" if key in values else "" for key in shown),
        )
        if intervals[name]:
            table.add_row(INTERVAL, "", *interval_cells(intervals[name], shown))
    console = make_console()
    print_whole(console, table)
    if arguments.out is not None:
        report = {
            "runs": [str(run) for run in arguments.runs],
            "weights": arguments.weights,
            "steps": [member.step for member in ensemble.members],
            "k": [member.k for member in ensemble.members],
            "threshold": ensemble.threshold,
            "tta": arguments.tta,
            "scored_at": scale,
            "threads": chosen.record(),
        }
        write_json(arguments.out, {**report, "scores": figures, "intervals": intervals})
    if len(ensemble.members) == 1 and trained.run.is_dir():
        entries = [
            {
                "data": name,
                "root": arguments.root,
                "layout": list(where) if any(where) else None,
                "weights": arguments.weights,
                "step": trained.step,
                "checkpoint": trained.digest,
                "k": trained.k,
                "threshold": ensemble.threshold,
                "tta": arguments.tta,
                "scored_at": scale,
                "metric": trained.spec.metric,
                "images": len(sets[name]),
                "scores": {k: v for k, v in values.items() if k != "per_image"},
                "intervals": intervals[name],
            }
            for name, values in figures.items()
        ]
        if keep(trained.run, entries):
            console.print(f"Also on {trained.run / PAGE}", soft_wrap=True)
    return 0


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Arguments about which weights are used, how, and where."""
    parser.add_argument(
        "--weights", choices=("best", "last", "start"), default="best",
        help="chosen on validation images, the last, or those that a last stage began with",
    )  # fmt: skip
    parser.add_argument(
        "--k", type=above_zero, help="temperature; default: the calibrated or the run's own"
    )
    parser.add_argument(
        "--threshold", type=probability, help="of the foreground's probability; default: the same"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_trust(parser)
    parser.add_argument(
        "--max-megapixels",
        type=above_zero,
        default=MEGAPIXELS,
        metavar="N",
        help=f"largest image, in millions of pixels ({MEGAPIXELS:g})",
    )


def add_tta(parser: argparse.ArgumentParser) -> None:
    """The argument about predicting an image in several ways."""
    parser.add_argument(
        "--tta",
        choices=("flips",),
        help="average over the eight flips and quarter turns of each image: eight times as long",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The argument about code that a run names."""
    parser.add_argument(
        "--trust", action="store_true", help="import the modules that the runs name; says which"
    )


def load_chosen(arguments: argparse.Namespace, device: torch.device) -> Ensemble:
    """The runs' segmentors with the k and threshold that the arguments or a calibration say."""
    ensemble = load_runs(arguments.runs, device, arguments.weights)
    chosen = calibrated(ensemble, arguments.k, arguments.threshold)
    return replace(chosen, flips=arguments.tta == "flips")


def choose_threads(arguments: argparse.Namespace) -> threads.Threads:
    """As many as the command or the environment says, or else as the first run was trained with.

    So its figures are those that the run reported.
    """
    return run_threads(arguments.runs[0], arguments.threads)


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse to write over what isn't an earlier call's.

    Raises:
        UserError: something else is there, or nothing can be written.
    """
    require_writable(path)
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise UserError(f"--out: {path} is a folder; name a file")
    if not overwrite and (path.is_symlink() or not _own(path)):
        raise UserError(
            f"--out: {path} is there already, and not by evaluate; name another file or give "
            "--overwrite"
        )


def _own(path: Path) -> bool:
    """Whether an earlier call has written it."""
    try:
        require_file(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"runs", "weights", "scored_at", "scores"} <= found.keys()


def own_data(runs: Sequence[Path], trained_with: Any = None) -> SegmentationData:
    """The data of runs that share one split, as the first one's config has them.

    Args:
        trained_with: the config that the first one's checkpoint holds, if it does.

    Raises:
        UserError: the data, or the config, are no longer those that the runs were made with, or one
            run has been trained on what another is to be tested on.
    """
    for run in runs:
        if run.is_file():
            raise UserError(
                f"{run}: a file of weights has no data of its own; name a run directory"
            )
    require_untouched(runs[0], trained_with)
    wanted = _data_settings(runs[0])
    if wanted is None:
        raise UserError(f"{runs[0]}: its system has no data of its own; name a data set by --data")
    if wanted.when_missing == "download":  # into a folder that the run names
        wanted = wanted.model_copy(update={"when_missing": "error"})
    data = load_data(wanted, unlabelled=False)
    for run in runs:
        check_same_data(run, data)
    return data


def _data_settings(run: Path) -> DataSettings | None:
    """What a run's config says of its data; the rest may name what isn't trusted."""
    tree = config.load(run / "config.yaml")
    say_foreign(tree.values)
    if trusted():
        found = getattr(parse_run(tree)[0], "data", None)
        return found if isinstance(found, DataSettings) else None
    values = tree.values.get("data")
    if not isinstance(values, dict):
        return None
    return config.parse(DataSettings, config.Tree(values, source=f"{tree.source}: data"))


def _nothing_of_its_own(run: Path, name: str) -> UserError:
    mend = "name a data set by --data"
    if data_set(name).withheld_test:
        mend += f" (--data {name} scores its validation part, which has chosen the weights)"
    return UserError(f"{run}: its test split is empty, so it has nothing to be scored on; {mend}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def above_zero(text: str) -> float:
    """A number above 0, for argparse."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} isn't above 0")
    return value


def probability(text: str) -> float:
    """A number between 0 and 1, for argparse."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} doesn't lie between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
