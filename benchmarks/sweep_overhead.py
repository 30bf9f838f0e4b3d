"""What a cell of a sweep costs beside its run: seconds, by the clock and of the CPU.

    OMP_NUM_THREADS=1 python benchmarks/sweep_overhead.py --rounds 5

A sweep of one cell and one of five, a process that makes one run and one that makes five, in turn,
round after round: what four more take has no start-up in it, and no tables but for four more rows.
Synthetic images, 4 iterations; for Linux.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from mlseg import machine
from mlseg.commands import as_script

RUN = {
    "system": "supervised",
    "device": "cpu",
    "data": {"name": "synthetic_lesions", "image_size": 32, "train": 8, "val": 4, "test": 4},
    "segmentor": {"name": "unet", "channels": 4, "levels": 2},
    "engine": {"iterations": 4, "validate_every": 2, "samples": 0, "tensorboard": False},
    "problems": {"segmentor": {"optimizer": {"name": "adam", "lr": 1e-3}, "batch_size": 4}},
}
RUNS = """
import sys
from mlseg import run
config, out, count = sys.argv[1:]
for seed in range(int(count)):
    assert run.main([config, f"seed={seed}", "--out", f"{out}/seed_{seed}"]) == 0
"""


WATCHED = """
import ctypes, os, resource, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a command leaves behind counts too
started = time.perf_counter()
code = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode
wall = time.perf_counter() - started
try:
    while True:
        os.wait()
except ChildProcessError:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(wall, used.ru_utime + used.ru_stime)
sys.exit(code)
"""


def spent(command: Sequence[object]) -> list[float]:
    """Seconds of a command of Python, by the clock and of the CPU of all its processes.

    Raises:
        SystemExit: it failed; with what it said.
    """
    whole = [sys.executable, "-c", WATCHED, *map(str, command)]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [float(word) for word in done.stdout.split()]


def of_one(folder: Path, more: int) -> dict[str, tuple[float, ...]]:
    """What each of ``more`` further ones takes in a sweep and by itself, and the difference."""
    config, grid = folder / "toy.yaml", folder / "grid.yaml"
    config.write_text(yaml.safe_dump(RUN), encoding="utf-8")
    own = {"title": "Toys", "configs": {"toy": str(config)}, "axes": {"row": {"toy": {}}}}
    grid.write_text(yaml.safe_dump({**own, "seeds": [0]}), encoding="utf-8")
    sweeps, runs = [], []
    for count in (1, 1 + more):
        out = folder / str(count)
        command = ["-m", "mlseg.sweep", grid, "--out", out / "sweep", "--seeds", *range(count)]
        sweeps.append(spent(command))
        runs.append(spent(["-c", RUNS, config, out, count]))
    cell, run = ([(b - a) / more for a, b in zip(*two, strict=True)] for two in (sweeps, runs))
    beside = tuple(a - b for a, b in zip(cell, run, strict=True))
    return {"a cell of a sweep": tuple(cell), "a run": tuple(run), "the cell beside it": beside}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--more", type=int, default=4, help="cells and runs beside the first")
    arguments = parser.parse_args()
    rounds = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            rounds.append(of_one(Path(name), arguments.more))
    print(f"{machine.head(machine.describe())}\n")
    print(f"| median of {len(rounds)} | s by the clock | s of the CPU |\n|---|---|---|")
    for what in rounds[0]:
        shown = [
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for values in zip(*(found[what] for found in rounds), strict=True)
        ]
        print(f"| {what} | {' | '.join(shown)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(as_script(main))
