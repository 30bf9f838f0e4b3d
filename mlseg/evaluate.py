"""Score a finished run on any data set.

    python -m mlseg.evaluate runs/try                          its own test split
    python -m mlseg.evaluate runs/try --data ph2 dermis        whole sets, out of distribution
    python -m mlseg.evaluate runs/try --data folder --root my/images --out scores.json

Scores are means over images at the size the run was trained at, by the run's selected weights.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mlseg import config
from mlseg.commands import guarded, make_console
from mlseg.data import DatasetSpec, DataSettings, Samples, load_data, load_examples
from mlseg.engines.recording import write_json
from mlseg.engines.segmentation import check_same_data, score
from mlseg.engines.settings import choose_device
from mlseg.errors import UserError
from mlseg.metrics import SCORES
from mlseg.run import parse_run
from mlseg.trained import Trained, load_trained


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(prog="mlseg evaluate", description="Score a finished run.")
    made.add_argument("run", type=Path, help="run directory")
    made.add_argument("--data", nargs="+", metavar="NAME", help="data sets; default: the run's own")
    made.add_argument("--root", help="folder of the data set, when one is named")
    made.add_argument("--weights", choices=("best", "last"), default="best")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--out", type=Path, help="JSON file for all figures, per image too")
    return made


def _run(arguments: argparse.Namespace) -> int:
    if arguments.root is not None and len(arguments.data or ()) != 1:
        raise UserError("--root: the folder of one data set; name exactly one with --data")
    device = choose_device(arguments.device)
    trained = load_trained(arguments.run, device, arguments.weights)
    if arguments.data is None:
        sets = own_splits(arguments.run)
    else:
        spec = describe(trained)
        sets = {
            name: load_examples(name, arguments.root, trained.image_size, spec)
            for name in arguments.data
        }
    shown = list(dict.fromkeys([trained.metric, *SCORES, "pooled_jaccard"]))
    title = f"{arguments.run}, {arguments.weights} weights (step {trained.step})"
    table = Table("data", "images", *shown, title=title)
    figures: dict[str, Any] = {}
    for name, samples in sets.items():
        metrics = score(trained.module, samples, device, autocast=trained.autocast)
        values = metrics.compute()
        figures[name] = {**values, "per_image": metrics.per_image()}
        table.add_row(name, str(len(samples)), *(f"{values[key]:.4f}" for key in shown))
    make_console().print(table)
    if arguments.out is not None:
        report = {"run": str(arguments.run), "weights": arguments.weights, "step": trained.step}
        write_json(arguments.out, {**report, "scores": figures})
    return 0


def describe(trained: Trained) -> DatasetSpec:
    """What data must be like to score ``trained`` on them."""
    return DatasetSpec(
        name=trained.data,
        channels=trained.in_channels,
        classes=tuple(trained.classes),
        ignore_index=trained.ignore_index,
        metric=trained.metric,
        palette=tuple((r, g, b) for r, g, b in trained.palette),
    )


def own_splits(run: Path) -> dict[str, Samples]:
    """Test split and out-of-distribution sets of the run's own config.

    Raises:
        UserError: the data are no longer those that the run was split from.
    """
    settings, _ = parse_run(config.load(run / "config.yaml"))
    wanted = getattr(settings, "data", None)
    if not isinstance(wanted, DataSettings):
        raise UserError(f"{run}: its system has no data of its own; name a data set with --data")
    data = load_data(wanted)
    check_same_data(run, data)
    sets = {"test": data.test, **data.out_of_distribution}
    return {name: samples for name, samples in sets.items() if len(samples)}


if __name__ == "__main__":
    sys.exit(main())
