"""Score a finished run, or an ensemble of runs, on any data set.

    python -m mlseg.evaluate runs/try                          its own test split
    python -m mlseg.evaluate runs/a runs/b runs/c              the mean of their probabilities
    python -m mlseg.evaluate runs/try --data ph2 dermis        whole sets, out of distribution
    python -m mlseg.evaluate runs/try --data folder --root my/images --out scores.json

Scores are means over images by the runs' selected weights, counted at each mask's own size
(``--scale trained``: at the size the run was trained at). What ``mlseg.calibrate`` chose for
exactly these weights is used, unless ``--k`` or ``--threshold`` say otherwise.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlseg import threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded

import torch
from rich.table import Table

from mlseg import config
from mlseg.commands import guarded, make_console
from mlseg.engines.segmentation import check_same_data
from mlseg.errors import UserError
from mlseg.files import write_json
from mlseg.machine import choose_device
from mlseg.resuming import require_unchanged
from mlseg.run import begun_with, parse_run
from mlseg.segmentation.calibration import calibrated, describe
from mlseg.segmentation.data import (
    DataSettings,
    SegmentationData,
    data_set,
    load_data,
    load_examples,
)
from mlseg.segmentation.metrics import SCORES
from mlseg.segmentation.scoring import score
from mlseg.segmentation.trained import Ensemble, load_runs


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(prog="mlseg evaluate", description="Score a finished run.")
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    made.add_argument("--data", nargs="+", metavar="NAME", help="data sets; default: the run's own")
    made.add_argument("--root", help="folder of the data set, when one is named")
    made.add_argument("--scale", choices=("native", "trained"), help="default: the run's own")
    add_choices(made)
    threads.add_flag(made)
    made.add_argument("--out", type=Path, help="JSON file for all figures, per image too")
    return made


def _run(arguments: argparse.Namespace) -> int:
    if arguments.root is not None and len(arguments.data or ()) != 1:
        raise UserError("--root: the folder of one data set; name exactly one with --data")
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
        sets = {
            name: load_examples(name, arguments.root, trained.image_size, trained.spec, trained.fit)
            for name in arguments.data
        }
    scale = arguments.scale or trained.scoring
    shown = list(dict.fromkeys([trained.spec.metric, *SCORES, "hd95", "pooled_jaccard"]))
    names = ", ".join(map(str, arguments.runs))
    steps = ", ".join(str(member.step) for member in ensemble.members)
    title = f"{names}, {arguments.weights} weights (step {steps}), {describe(ensemble)}, {scale}"
    table = Table("data", "images", *shown, title=title)
    figures: dict[str, Any] = {}
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
        table.add_row(
            name,
            str(len(samples)),
            *(f"{values[key]:.4f}" if key in values else "" for key in shown),
        )
    make_console().print(table)
    if arguments.out is not None:
        report = {
            "runs": [str(run) for run in arguments.runs],
            "weights": arguments.weights,
            "steps": [member.step for member in ensemble.members],
            "k": [member.k for member in ensemble.members],
            "threshold": ensemble.threshold,
            "scored_at": scale,
            "threads": chosen.record(),
        }
        write_json(arguments.out, {**report, "scores": figures})
    return 0


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Arguments about which weights are used, how, and where."""
    parser.add_argument("--weights", choices=("best", "last"), default="best")
    parser.add_argument(
        "--k", type=above_zero, help="temperature; default: the calibrated or the run's own"
    )
    parser.add_argument(
        "--threshold", type=probability, help="of the foreground's probability; default: the same"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def load_chosen(arguments: argparse.Namespace, device: torch.device) -> Ensemble:
    """The runs' segmentors with the k and threshold that the arguments or a calibration say."""
    ensemble = load_runs(arguments.runs, device, arguments.weights)
    return calibrated(ensemble, arguments.k, arguments.threshold)


def choose_threads(arguments: argparse.Namespace) -> threads.Threads:
    """As many as the command or the environment says, or else as the first run was trained with.

    So its figures are those that the run reported.
    """
    if arguments.threads is not None:
        return threads.Threads(arguments.threads, "--threads")
    own = threads.Threads(min(begun_with(arguments.runs[0]), threads.cores()), "run")
    return threads.by_environment() or own


def own_data(runs: Sequence[Path], trained_with: Any = None) -> SegmentationData:
    """The data of runs that share one split, as the first one's config has them.

    Args:
        trained_with: the config that the first one's checkpoint holds, if it does.

    Raises:
        UserError: the data, or the config, are no longer those that the runs were made with, or one
            run has been trained on what another is to be tested on.
    """
    tree = config.load(runs[0] / "config.yaml")
    settings, _ = parse_run(tree)
    require_unchanged(settings, tree, trained_with, runs[0])
    wanted = getattr(settings, "data", None)
    if not isinstance(wanted, DataSettings):
        raise UserError(f"{runs[0]}: its system has no data of its own; name a data set by --data")
    data = load_data(wanted)
    for run in runs:
        check_same_data(run, data)
    return data


def _nothing_of_its_own(run: Path, name: str) -> UserError:
    mend = "name a data set by --data"
    if data_set(name).withheld_test:
        mend += f" (--data {name} scores its validation part, which has chosen the weights)"
    return UserError(f"{run}: its test split is empty, so it has nothing to be scored on; {mend}")


def above_zero(text: str) -> float:
    """A number above 0, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} isn't above 0")
    return value


def probability(text: str) -> float:
    """A number between 0 and 1, for argparse."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} doesn't lie between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
