"""Try what a machine and a stranger's file can do to a run; nothing may be lost, nobody let in.

    python benchmarks/faults.py --minutes 20                 # every kind, about as long each
    python benchmarks/faults.py --only kills --trials 40     # some kinds, so often each
    python benchmarks/faults.py --only images --seed 3 --number 17     # one trial again

Each trial is drawn from the seed, its kind and its number, and must end right or refused: with the
result of a run that nobody touched, or one line that says what is wrong; without a traceback,
without a file outside, within its time and memory. A table counts the trials by kind. A trial that
fails is kept as a folder, with ``again.sh`` to try it again and the commands that it called in
``logs/commands.sh``, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from trials import (
    archives,
    checkpoints,
    commands,
    configs,
    disks,
    images,
    kills,
    together,
)
from trials.fixtures import Fixtures
from trials.judge import Failure, Outcome

from mlseg.commands import guarded
from mlseg.files import write_text

Trial = Callable[[random.Random, Path, Fixtures], Outcome]
KINDS: dict[str, Trial] = {
    "kills": kills.trial,
    "commands": commands.trial,
    "together": together.trial,
    "disks": disks.trial,
    "images": images.trial,
    "configs": configs.trial,
    "checkpoints": checkpoints.trial,
    "archives": archives.trial,
}


class Counts:
    """Outcomes by row of the table."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def table(self) -> str:
        """In Markdown."""
        lines = ["| kind | tried | right | refused in one line | failed | kills |"]
        lines.append("|---|---|---|---|---|---|")
        rows = sorted({outcome.row for outcome in self.outcomes})
        for row in [*rows, "**all**"]:
            own = [o for o in self.outcomes if row in (o.row, "**all**")]
            tried = [o for o in own if o.verdict != "skipped"]
            by = Counter(o.verdict for o in tried)
            killed = sum(o.kills for o in own)
            figures = (len(tried), by["right"], by["refused"], by["failed"], killed)
            lines.append(f"| {row} | {' | '.join(map(str, figures))} |")
        missing = sorted({o.why for o in self.outcomes if o.verdict == "skipped"})
        return "\n".join([*lines, *(f"\nskipped: {why}" for why in missing)])

    @property
    def failed(self) -> int:
        return sum(o.verdict == "failed" for o in self.outcomes)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if no trial failed."""
    return guarded(_run, _parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    counts = Counts()
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="faults_", ignore_cleanup_errors=True) as work:
        fixtures = Fixtures(Path(work) / "fixtures")
        fixtures.run()  # here, or the first kind would pay for it
        spent = dict.fromkeys(arguments.only, 0.0)
        numbers = dict.fromkeys(arguments.only, arguments.number or 0)
        while spent and time.monotonic() < end:
            kind = min(spent, key=lambda name: spent[name])  # about as long for each
            started = time.monotonic()
            outcome = attempt(kind, arguments.seed, numbers[kind], Path(work), fixtures)
            if outcome.verdict == "failed":
                _keep(Path(work) / "trial", kind, numbers[kind], outcome, arguments)
            counts.outcomes.append(outcome)
            spent[kind] += time.monotonic() - started
            numbers[kind] += 1
            enough = numbers[kind] - (arguments.number or 0) >= (arguments.trials or sys.maxsize)
            if enough or arguments.number is not None:
                del spent[kind]
    print(counts.table())
    if arguments.out is not None:
        write_text(arguments.out, counts.table() + "\n")
    return 1 if counts.failed else 0


def attempt(kind: str, seed: int, number: int, work: Path, fixtures: Fixtures) -> Outcome:
    """One trial, in the folder ``trial`` of ``work``."""
    folder = work / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "place").mkdir(parents=True)  # where its commands are called
    draw = random.Random(f"{seed} {kind} {number}")
    try:
        outcome = KINDS[kind](draw, folder, fixtures)
    except Failure as failure:
        return Outcome("failed", str(failure), kind)
    except Exception:  # noqa: BLE001, a trial that breaks is kept as well
        return Outcome("failed", traceback.format_exc(), kind)
    return outcome if outcome.row else Outcome(outcome.verdict, outcome.why, kind, outcome.kills)


def _keep(
    folder: Path, kind: str, number: int, outcome: Outcome, arguments: argparse.Namespace
) -> None:
    kept = arguments.keep / f"{kind}_{arguments.seed}_{number}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept, symlinks=True, ignore=_special)
    script = shlex.quote(str(Path(__file__).resolve()))
    again = f"python {script} --only {kind} --seed {arguments.seed} --number {number}"
    why = "\n".join(f"# {line}" for line in outcome.why.splitlines())
    (kept / "again.sh").write_text(f"{why}\n{again}\n", encoding="utf-8")
    last = outcome.why.strip().splitlines()[-1]
    print(f"failed: {kind} {number}: {last} (see {kept})", file=sys.stderr, flush=True)


def _special(folder: str, names: list[str]) -> set[str]:
    """Pipes and devices, which can't be copied."""
    paths = {name: Path(folder, name) for name in names}
    return {
        name
        for name, path in paths.items()
        if not path.is_symlink() and not path.is_file() and not path.is_dir()
    }


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--minutes", type=float, default=20.0, help="for all kinds together")
    made.add_argument("--trials", type=int, help="of each kind, at most")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND",
                      help=", ".join(KINDS))  # fmt: skip
    made.add_argument("--number", type=int, help="of the one trial to try again")
    made.add_argument("--out", type=Path, help="a file for the table")
    made.add_argument(
        "--keep", type=Path, default=Path("runs/faults"), help="folder of the trials that failed"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
