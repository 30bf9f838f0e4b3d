"""The rows of E2EAug's comparison, over seeds, and the table of them.

    OMP_NUM_THREADS=1 python benchmarks/e2eaug_rows.py --out runs/rows --seeds 0 1 2 3 4
    python benchmarks/e2eaug_rows.py --out runs/rows --table          # the table of what is there
    python benchmarks/e2eaug_rows.py --out runs/rows --rows ours vanilla engine.iterations=2000
    python benchmarks/e2eaug_rows.py --out runs/rows --rows ours \\
        --variant fast_alphas ours problems.architecture.optimizer.lr=0.1

Every run is ``python -m mlseg.run`` in a process of its own, with ``seed`` and ``data.split_seed``
both set to the row's seed: the spread is over initial weights, order and split together, and within
a seed all rows share split, initial segmentor and order of its real batches. Segmentor, optimizer,
steps and selection rule come from the two configs and from the overrides, which reach every row.

The GAN is pre-trained once per seed, in a run of its own (row ``pretraining``), for the rows that
begin with the same one: ours, frozen_alphas and separate. gan (no cells) and random_alphas (other
alphas) pre-train their own. A variant is another row with further overrides; it shares the GAN
unless it changes a setting of generator, discriminator or gan.

Calling it again goes on: a finished run (``results.json``) is kept, provided it was made with the
same settings; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import experiment
import rows_table
from experiment import Prelude, Row

FROZEN_GAN = "gan.frozen=true"
ROWS = {
    "vanilla": Row("supervised", ["augmentation=off"]),
    "rotate": Row("supervised", ["augmentation=rotate"]),
    "flip": Row("supervised", ["augmentation=flip"]),
    "translate": Row("supervised", ["augmentation=translate"]),
    "combine": Row("supervised", ["augmentation=combine"]),
    "gan": Row("e2eaug", ["generator.search=none", FROZEN_GAN]),
    "separate": Row("e2eaug", ["architecture.mode=frozen", FROZEN_GAN], after=True),
    "frozen_alphas": Row("e2eaug", ["architecture.mode=frozen"], after=True),
    "random_alphas": Row("e2eaug", ["architecture.mode=random"]),
    "ours": Row("e2eaug", [], after=True),
}
# One iteration of the segmentor after the GAN's, since a run has to have a last stage.
PRETRAINING = Prelude(
    rows_table.PRETRAINING,
    Row("e2eaug", [FROZEN_GAN, "engine.iterations=1"]),
    lambda run: f"gan.pretrained={run / 'checkpoints' / 'gan.pt'}",
)
DEFAULT_ROWS = ["vanilla", "combine", "gan", "separate", "frozen_alphas", "random_alphas", "ours"]
OF_THE_GAN = ("generator.", "discriminator.", "gan.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    experiment.add_arguments(parser, list(ROWS), seeds=5)
    parser.set_defaults(out=Path("runs/rows"), rows=DEFAULT_ROWS)
    parser.add_argument("--e2eaug", default="e2eaug_isic_small.yaml", help="in --config-dir")
    parser.add_argument("--supervised", default="supervised_isic_small.yaml", help="the same")
    parser.add_argument(
        "--split-seeds-follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw another split with each seed; with --no-... the configs' split for all",
    )
    # `--rows a b KEY=VALUE` and `--seeds 0 1 KEY=VALUE` leave the overrides to neither option.
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(experiment.overrides_first(given))

    def work() -> int:
        if not arguments.table and not _run(arguments, given):
            return 1
        rows_table.write(arguments.out)
        return 0

    return experiment.guarded(work)


def _run(arguments: argparse.Namespace, given: Sequence[str]) -> bool:
    rows = {name: ROWS[name] for name in ROWS if name in arguments.rows}
    rows |= experiment.variants(arguments.variant, ROWS, OF_THE_GAN)
    made = experiment.Experiment(
        arguments.out,
        {
            "e2eaug": arguments.config_dir / arguments.e2eaug,
            "supervised": arguments.config_dir / arguments.supervised,
        },
        arguments.overrides,
        arguments.split_seeds_follow,
        PRETRAINING,
    )
    command = experiment.typed("e2eaug_rows.py", given)
    return experiment.run(made, rows, arguments.seeds, arguments.jobs, command)


if __name__ == "__main__":
    sys.exit(main())
