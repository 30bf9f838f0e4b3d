"""What it costs to check that steps repeat themselves, and what each iteration notes for it.

    OMP_NUM_THREADS=1 python benchmarks/checks.py --config configs/e2eaug_isic_small.yaml

A level that an upper one differentiates through evaluates its step again at its steps 1, 10 and
100 and every 1000th, and is an error where that gives another loss (``mlseg/multilevel/again.py``).
All in one run, in seconds of the process's CPU time: iterations without a check, the checks, and
the notes (the generators' states at the start of each step, what is said of a first
hypergradient). Without the data set its stand-in is used; the figures don't depend on it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from mlseg import command_line, config, machine
from mlseg.commands import as_script
from mlseg.engines import notices
from mlseg.multilevel import again, revisiting
from mlseg.problems.systems import parse_run


class Watch:
    """Seconds of CPU time in some functions, since it was last read."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*given: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*given, **named)
            finally:
                self.seconds += time.process_time() - start
                self.calls += 1

        return timed

    def read(self) -> tuple[float, int]:
        """Seconds and calls, which start anew."""
        found = self.seconds, self.calls
        self.seconds, self.calls = 0.0, 0
        return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/e2eaug_isic_small.yaml")
    parser.add_argument("--iterations", type=int, default=30, help="without a check")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = command_line.parse(parser)
    overrides = ["device=cpu", "gan.pretrain=0", *given.overrides]
    settings, build = parse_run(config.load(given.config, overrides))
    torch.manual_seed(settings.seed)
    engine = build(settings, None)
    engine.enter_stage(0)
    engine.train()
    checks, notes = Watch(), Watch()
    watched = [
        (again.Again, "check", checks),
        (revisiting, "check_level", checks),
        (again.Again, "begin", notes),
        (notices, "after_step", notes),
    ]
    plain: list[float] = []
    checked: list[float] = []
    noted: list[float] = []
    with ExitStack() as stack:
        for owner, name, watch in watched:
            stack.enter_context(mock.patch.object(owner, name, watch.over(getattr(owner, name))))
        while len(plain) < given.iterations or len(checked) < 2:
            start = time.process_time()
            engine.iterate()
            took = time.process_time() - start
            (in_checks, calls), (in_notes, _) = checks.read(), notes.read()
            if calls:
                checked.append(in_checks)
            elif len(checked) > 1:  # what is loaded when it is first used is loaded
                plain.append(took)
                noted.append(in_notes)
    iteration, check = statistics.median(plain), statistics.median(checked)
    note = statistics.median(noted)
    often = len(again._FIRST_CHECKS) + 1000 // again._CHECK_EVERY
    share = (check * often / 1000 + note) / iteration
    print(machine.head(machine.describe()) + "\n")
    print("| what | ms of CPU time | share of an iteration |")
    print("|---|---|---|")
    print(f"| an iteration without a check | {1e3 * iteration:.1f} | |")
    print(f"| all checks of a checked one | {1e3 * check:.1f} | {check / iteration:.1%} |")
    print(f"| notes in every iteration | {1e3 * note:.3f} | {note / iteration:.2%} |")
    print(f"| both, over the first 1000 iterations | | {share:.2%} |")


if __name__ == "__main__":
    raise SystemExit(as_script(main))
