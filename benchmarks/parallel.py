"""Several processes against one: seconds of an iteration, by whole runs.

    python benchmarks/parallel.py                                    two processes, one thread each,
                                                                     against one of two threads
    python benchmarks/parallel.py --processes 3 --config configs/segan_isic_small.yaml
    python benchmarks/parallel.py --iterations 40 --rounds 5 problems.segmentor.batch_size=8
    python benchmarks/parallel.py --ways 1x1 torchrun:1x1 --rounds 7   what torchrun costs one

Each way to run is timed at two lengths, in turn, round after round; the difference between the two
has no start-up, no data and no scoring in it. Ways are compared within each round, and of the
ratios the medians are shown. On stand-ins, validation at the end alone. One thread in one process
stands beside.

CPU seconds are those of all processes, torchrun's own included. Nothing else should run on the
machine; its load at the start is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlseg import command_line
from mlseg.commands import as_script

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Way:
    """So many processes of so many threads; one by itself, or also that under torchrun."""

    processes: int
    threads: int
    launched: bool = False

    def command(self, arguments: Sequence[str]) -> list[str]:
        """To run them."""
        alone = self.processes == 1 and not self.launched
        several = ["-m", "torch.distributed.run", f"--nproc-per-node={self.processes}"]
        return [sys.executable, *([] if alone else several), "-m", "mlseg.run", *arguments]

    def __str__(self) -> str:
        return f"{'torchrun:' * self.launched}{self.processes}x{self.threads}"

    @classmethod
    def read(cls, text: str) -> Way:
        """From the command line."""
        numbers = text.removeprefix("torchrun:")
        processes, threads = map(int, numbers.split("x"))
        return cls(processes, threads, launched=numbers != text)


def seconds(
    way: Way, config: Path, overrides: Sequence[str], iterations: int
) -> tuple[float, float]:
    """Of a whole run of so many iterations, by the clock and of all its processes' CPUs."""
    with tempfile.TemporaryDirectory() as name:
        fixed = [
            f"engine.iterations={iterations}",
            "engine.validate_every=0",
            "engine.samples=0",
            "engine.tensorboard=false",
            "data.when_missing=synthetic",
            f"threads={way.threads}",
            "device=cpu",
        ]
        arguments = [str(config), *fixed, *overrides, "--out", str(Path(name) / "run")]
        environment = {**os.environ, "MLSEG_DATA": name, "OMP_NUM_THREADS": str(way.threads)}
        started, before = time.perf_counter(), os.times()
        done = subprocess.run(
            way.command(arguments), env=environment, capture_output=True, text=True, check=False
        )
        wall, after = time.perf_counter() - started, os.times()
        if done.returncode:
            raise SystemExit(done.stderr)
        cpu = after.children_user + after.children_system
        return wall, cpu - before.children_user - before.children_system


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs/segan_isic_small.yaml")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", nargs="+", type=Way.read, metavar="PROCESSESxTHREADS")
    parser.add_argument("--iterations", type=int, default=30, help="the shorter length")
    parser.add_argument("--rounds", type=int, default=3)
    given = command_line.parse(parser)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    ways = given.ways or [Way(1, 1), Way(1, given.processes), Way(given.processes, 1)]
    found: dict[Way, list[tuple[float, ...]]] = {way: [] for way in ways}
    for number in range(given.rounds):
        for way in ways:
            short, long = (
                seconds(way, given.config, given.overrides, given.iterations * times)
                for times in (1, 3)
            )
            each = 2 * given.iterations
            found[way].append(tuple((b - a) / each for a, b in zip(short, long, strict=True)))
            print(f"round {number + 1} of {given.rounds}: {way}", file=sys.stderr)
    from mlseg import machine

    print(f"{machine.head(machine.describe())}\n- load before: {load}")
    print(f"- {given.config.stem}, {' '.join(given.overrides)}\n")
    print("| processes x threads | s per iteration | of the first | CPU s | of the first |")
    print("|---|---|---|---|---|")
    for way in ways:
        cells = []
        for mine, first in zip(
            zip(*found[way], strict=True), zip(*found[ways[0]], strict=True), strict=True
        ):
            ratio = statistics.median(a / b for a, b in zip(mine, first, strict=True))
            cells += [f"{statistics.median(mine):.4f}", f"{ratio:.3f}"]
        print(f"| {way} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(as_script(main))
