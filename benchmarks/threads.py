"""What a second thread is worth, alone on the machine and beside a program that keeps a core busy.

    python benchmarks/threads.py                         training steps of U-Nets of several sizes
    python benchmarks/threads.py --sizes 2x64x256 --rounds 5
    python benchmarks/threads.py --commands              run, evaluate, predict and compare as they
                                                         come; ends with 1 where a busy core costs
                                                         more than --bound times its fair share
    python benchmarks/threads.py --commands gan.pretrain=100 engine.iterations=40

The first gives the rule of ``mlseg.threads`` and how long threads may spin: a fixed number of steps
of one network per way to compute, each way in a process of its own, in turn, round after round, so
that what else the machine does falls on all of them; times are medians over rounds, and what is
compared are the ratios to one thread, alone and beside the busy program by themselves. The second
measures whole commands on stand-ins for ISIC, alone and beside the busy program in turn.

Nothing else should run on the machine; its load at the start is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from mlseg import command_line
from mlseg.commands import as_script

REPOSITORY = Path(__file__).resolve().parents[1]
BUSY = "while True: pass"
ACCURACY_ALONE = ["training=null"]
ALONE, BESIDE = "alone", "one core busy"


@dataclass(frozen=True)
class Size:
    """Of a U-Net and its batch: examples x channels x pixels of a side, ``2x64x256``."""

    batch: int
    channels: int
    pixels: int

    @classmethod
    def read(cls, text: str) -> Size:
        """From the command line."""
        batch, channels, pixels = map(int, text.split("x"))
        return cls(batch, channels, pixels)

    @property
    def work(self) -> int:
        """As ``RunSettings.work`` counts it."""
        return self.batch * self.pixels**2 * self.channels**2

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.pixels}"


@dataclass(frozen=True)
class Way:
    """Threads, and what the environment says of their spinning, ``KEY=VALUE``."""

    threads: int
    spinning: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """For a process."""
        return dict([self.spinning.split("=")]) if self.spinning else {}

    def __str__(self) -> str:
        return f"{self.threads}, {self.spinning or 'as torch comes'}"


WAYS = [
    Way(1),
    Way(2),
    Way(2, "OMP_WAIT_POLICY=PASSIVE"),
    *(Way(2, f"GOMP_SPINCOUNT={count}") for count in (1000, 10000, 100000)),
]
# Steps that take a second or so on one thread.
SIZES = {"2x16x64": 24, "16x8x64": 8, "2x64x64": 2, "2x32x128": 2, "2x64x128": 1, "2x64x256": 1}


def steps(threads: int, sizes: Sequence[str]) -> dict[str, float]:
    """Seconds of a training step of each size, in this process."""
    import torch
    from torch.nn import functional

    from mlseg.segmentation.nets.unet import UNet

    torch.set_num_threads(threads)
    found = {}
    for text in sizes:
        size = Size.read(text)
        torch.manual_seed(0)
        network = UNet(3, 2, size.channels)
        optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
        image = torch.randn(size.batch, 3, size.pixels, size.pixels)
        target = torch.randint(2, (size.batch, size.pixels, size.pixels))
        number = SIZES.get(text, 2)
        for warm in (True, False):
            started = time.perf_counter()
            for _ in range(1 if warm else number):
                optimizer.zero_grad()
                functional.cross_entropy(network(image), target).backward()
                optimizer.step()
        found[text] = (time.perf_counter() - started) / number
    return found


def compare_ways(sizes: Sequence[str], ways: Sequence[Way], rounds: int) -> str:
    """The table of :func:`steps` by size and way, as Markdown."""
    seconds: dict[tuple[str, Way, str], list[float]] = {}
    for number in range(rounds):
        for way in ways:
            for beside in (ALONE, BESIDE):
                command = [__file__, "--child", str(way.threads), "--sizes", *sizes]
                with busy() if beside == BESIDE else nullcontext():
                    printed, _ = timed(command, way.environment)
                for size, value in json.loads(printed).items():
                    seconds.setdefault((size, way, beside), []).append(value)
            print(f"round {number + 1} of {rounds}: {way}", file=sys.stderr)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    lines = [
        "| batch x channels x pixels | work | threads, spinning | alone, s | beside, s | faster "
        "than one thread alone | beside | slower beside than alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        for way in ways:
            alone, shared = (medians[size, way, place] for place in (ALONE, BESIDE))
            one = [medians[size, ways[0], place] for place in (ALONE, BESIDE)]
            lines.append(
                f"| {size} | {Size.read(size).work / 2**20:.0f} Mi | {way} | {alone:.3f} "
                f"| {shared:.3f} | {one[0] / alone:.2f} | {one[1] / shared:.2f} "
                f"| {shared / alone:.2f} |"
            )
    return "\n".join(lines)


def compare_commands(overrides: Sequence[str], rounds: int, bound: float) -> tuple[str, bool]:
    """The table of whole commands as Markdown, and whether all are within ``bound``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        draw(images)
        configs = REPOSITORY / "configs"
        trained = str(folder / "trained")
        compare = ["-m", "mlseg.compare", str(configs / "compare_quadratic.yaml"), *ACCURACY_ALONE]
        run = ["-m", "mlseg.run", str(configs / "e2eaug_isic_small.yaml"), *overrides]
        timed([*run, "--out", trained], {"MLSEG_DATA": name})
        commands = {
            "run": run,
            "evaluate": ["-m", "mlseg.evaluate", trained],
            "predict": ["-m", "mlseg.predict", trained, str(images)],
            "compare, 1 job": compare,
            "compare, 2 jobs": [*compare, "--jobs", "2"],
        }
        seconds: dict[tuple[str, str], list[float]] = {}
        for number in range(rounds):
            for what, command in commands.items():
                for beside in (ALONE, BESIDE):
                    out = folder / f"{what}-{beside}-{number}".replace(" ", "_")
                    where = [] if what == "evaluate" else ["--out", str(out)]
                    with busy() if beside == BESIDE else nullcontext():
                        _, taken = timed([*command, *where], {"MLSEG_DATA": name})
                    seconds.setdefault((what, beside), []).append(taken)
                    print(f"round {number + 1}: {what}, {beside}: {taken:.1f} s", file=sys.stderr)
    lines = ["| command | alone, s | one core busy, s | ratio | fair |", "|---|---|---|---|---|"]
    kept = True
    for what in commands:
        alone, shared = (statistics.median(seconds[what, place]) for place in (ALONE, BESIDE))
        # With more programs than cores each has less than a core, however well it computes.
        fair = max(1.0, ((2 if what.endswith("2 jobs") else 1) + 1) / len(os.sched_getaffinity(0)))
        kept = kept and shared / alone <= bound * fair
        lines.append(f"| {what} | {alone:.1f} | {shared:.1f} | {shared / alone:.2f} | {fair:.2f} |")
    return "\n".join(lines), kept


def draw(folder: Path, number: int = 64) -> None:
    """Images of noise, as a camera's would be in size."""
    from PIL import Image

    folder.mkdir()
    for index in range(number):
        Image.effect_noise((640, 480), 60).convert("RGB").save(folder / f"{index:03d}.png")


def timed(command: Sequence[str], environment: dict[str, str]) -> tuple[str, float]:
    """What a Python command prints, and the seconds it takes from start to end."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout, time.perf_counter() - started


@contextmanager
def busy() -> Iterator[None]:
    """Beside a program that keeps one core busy."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as program:
        try:
            yield
        finally:
            program.kill()


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of run, for --commands")
    parser.add_argument("--commands", action="store_true", help="measure the commands")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="BxCxP")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bound", type=float, default=1.3, help="of the ratio of --commands")
    parser.add_argument("--child", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = command_line.parse(parser)
    if arguments.child is not None:
        print(json.dumps(steps(arguments.child, arguments.sizes)))
        return 0
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    if arguments.commands:
        table, kept = compare_commands(arguments.overrides, arguments.rounds, arguments.bound)
    else:
        table, kept = compare_ways(arguments.sizes, WAYS, arguments.rounds), True
    from mlseg import machine

    print(f"{machine.head(machine.describe())}\n- load before: {load}\n\n{table}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(as_script(main))
