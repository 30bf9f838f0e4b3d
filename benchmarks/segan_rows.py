"""SegAN beside its segmentor trained alone, over seeds, with ensembles, and the table of them.

    OMP_NUM_THREADS=1 python benchmarks/segan_rows.py --seeds 0 1 2
    python benchmarks/segan_rows.py --table                      # the table of what is there
    python benchmarks/segan_rows.py --seeds 0 --variant stackelberg segan game=stackelberg

Every run is ``python -m mlseg.run`` in a process of its own. Within a seed all rows begin with the
same segmentor and see the same batches in the same order, with the same optimizer and number of
steps. The split is the same for all seeds, so that the test images of one run are those of every
member of an ensemble; the spread is over initial weights, order and augmentation.

The table scores the weights selected on validation images, each run by itself and each row's runs
as an ensemble: at the config's threshold, and once more with what ``mlseg.calibrate`` chooses on
the validation images. Calling it again goes on: finished runs are kept, interrupted ones resumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import experiment
import segan_table
from experiment import Row

ROWS = {
    "segan": Row("segan"),
    "cross_entropy": Row("supervised"),
    "dice": Row("supervised", ["loss.cross_entropy=0", "loss.dice=1"]),
    "sigmoid": Row("segan", ["logistic.floor=1", "threshold=0.5"]),
    "free_norm": Row("segan", ["critic.clamp_norm=false"]),
    "with_dice": Row("segan", ["loss.dice_weight=1"]),
    "fixed_critic": Row("segan", ["problems.critic.optimizer.lr=1e-30"]),
    "stackelberg": Row("segan", ["game=stackelberg"]),
}
DEFAULT_ROWS = ["segan", "cross_entropy", "dice"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    experiment.add_arguments(parser, list(ROWS), seeds=3)
    parser.set_defaults(out=Path("runs/segan_rows"), rows=DEFAULT_ROWS)
    parser.add_argument("--segan", default="segan_isic_small.yaml", help="in --config-dir")
    parser.add_argument("--supervised", default="supervised_segan_small.yaml", help="the same")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(experiment.overrides_first(given))

    def work() -> int:
        if not arguments.table and not _run(arguments, given):
            return 1
        segan_table.write(arguments.out)
        return 0

    return experiment.guarded(work)


def _run(arguments: argparse.Namespace, given: Sequence[str]) -> bool:
    rows = {name: ROWS[name] for name in ROWS if name in arguments.rows}
    rows |= experiment.variants(arguments.variant, ROWS)
    made = experiment.Experiment(
        arguments.out,
        {
            "segan": arguments.config_dir / arguments.segan,
            "supervised": arguments.config_dir / arguments.supervised,
        },
        arguments.overrides,
        split_follows=False,
    )
    command = experiment.typed("segan_rows.py", given)
    return experiment.run(made, rows, arguments.seeds, arguments.jobs, command)


if __name__ == "__main__":
    sys.exit(main())
