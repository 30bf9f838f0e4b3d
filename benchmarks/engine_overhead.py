"""One iteration of the engine against a hand-written loop of the same passes.

    OMP_NUM_THREADS=1 python benchmarks/engine_overhead.py                    # both cases, CPU
    python benchmarks/engine_overhead.py --device cuda --cases e2eaug --json overhead.json

Two cases: E2EAug as ``configs/e2eaug_isic_small.yaml`` has it (the search stage, from scratch), and
a two-level toy, a small network whose weight decay is learned. Each exists twice, from the same
seed: one copy runs under ``Engine.run``, with its records going to a temporary directory;
the other is stepped by the plain loops below. The two take turns, iteration by iteration, so that
whatever else the machine does hurts both; at the end their weights have to agree, bit for bit on
the CPU, so that both have done the same work.

The engine's time is everything between two hand-written iterations: the step, the guard against
NaN, records every ten iterations. Reported is the ratio of medians over blocks of iterations, and
its range; target: at most 1.05 for E2EAug.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from hand_written import HandWrittenDecay, HandWrittenE2EAug, decay_engine

from mlseg import command_line, config, machine, randomness
from mlseg.commands import as_script
from mlseg.engines.engine import Engine
from mlseg.problems.systems import parse_run

SMALL = Path(__file__).parent.parent / "configs" / "e2eaug_isic_small.yaml"
TARGET = 1.05


class Loop(Protocol):
    """A hand-written loop."""

    def iterate(self) -> None:
        """One iteration."""

    def parameters(self) -> list[torch.Tensor]:
        """Of all networks, in the order of the engine's problems."""


@dataclass
class Times:
    """Seconds per iteration, by wall clock and by this process's CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class Turns:
    """Lets a hand-written iteration run before each of the engine's, and times both.

    It stands in for ``engine.train_step``: the engine's own loop stays as it is, and an engine's
    iteration is what happens from one call's end of the hand-written part to the next call.
    """

    def __init__(self, engine: Engine, loop: Loop, device: torch.device, seed: int) -> None:
        self._engine, self._loop, self._device = engine, loop, device
        self._step = engine.train_step
        self._mark: tuple[float, float] | None = None
        self.engine_times, self.hand_times = Times(), Times()
        # Each side has a random stream of its own, both from the same beginning.
        with randomness.replayed(None, device):
            randomness.seed_everything(seed)
            self._state = randomness.capture(device)
        engine.__dict__["train_step"] = self

    def __call__(self) -> None:
        """Time the engine's iteration that has just ended, run a hand-written one, then step."""
        if self._mark is not None:
            self._note(self.engine_times, self._mark)
        with randomness.replayed(self._state, self._device):
            mark = self._now()
            self._loop.iterate()
            self._note(self.hand_times, mark)
            self._state = randomness.capture(self._device)
        self._mark = self._now()
        self._step()

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def _note(self, times: Times, mark: tuple[float, float]) -> None:
        now = self._now()
        times.wall.append(now[0] - mark[0])
        times.cpu.append(now[1] - mark[1])


def e2eaug(device: str, out: Path | None, iterations: int, overrides: Sequence[str]) -> Engine:
    """The small system, on stand-in images where the real ones are missing; no pre-training."""
    tree = config.load(
        SMALL,
        [
            "data.test=8",
            "gan.pretrain=0",
            "engine.samples=0",
            "engine.validate_every=0",
            f"engine.iterations={iterations}",
            f"device={device}",
            *overrides,
        ],
    )
    settings, build = parse_run(tree)
    return build(settings, out)


def compare(
    make: Callable[[Path | None], Engine],
    hand: Callable[[Engine], Loop],
    device: torch.device,
    blocks: int,
    warm_up: int,
) -> dict[str, Any]:
    """Run both sides and put the figures together.

    Args:
        make: an engine, with a run directory or without; the same one every time.
        hand: the loop over another such engine's networks, optimizers and loaders.
    """
    seed = 0
    with tempfile.TemporaryDirectory() as folder:
        randomness.seed_everything(seed)
        loop = hand(make(None))
        randomness.seed_everything(seed)
        engine = make(Path(folder) / "run")
        engine.recorder.progress.quiet = True
        turns = Turns(engine, loop, device, seed)
        randomness.seed_everything(seed)
        engine.run()
    largest = _check_agreement(engine, loop, exact=device.type == "cpu")
    # The last iteration has no end of its own, and validates.
    engine_times, hand_times = turns.engine_times, turns.hand_times
    report: dict[str, Any] = {"iterations": len(engine_times.wall), "difference": largest}
    for clock in ("wall", "cpu"):
        ours = getattr(engine_times, clock)[warm_up:]
        theirs = getattr(hand_times, clock)[warm_up : warm_up + len(ours)]
        size = len(ours) // blocks
        spans = [slice(i * size, (i + 1) * size) for i in range(blocks)]
        ratios = [statistics.median(ours[s]) / statistics.median(theirs[s]) for s in spans]
        report[clock] = {
            "engine_ms": 1e3 * statistics.median(ours),
            "hand_ms": 1e3 * statistics.median(theirs),
            "ratio": statistics.median(ours) / statistics.median(theirs),
            "ratio_blocks": ratios,
            # Medians leave out the iterations that write records; means don't.
            "ratio_of_means": statistics.fmean(ours) / statistics.fmean(theirs),
        }
    return report


def _check_agreement(engine: Engine, loop: Loop, exact: bool) -> float:
    """Largest difference between the two sides' parameters, relative to the largest parameter.

    Raises:
        SystemExit: they differ, so that the two have not done the same work.
    """
    ours = [p for problem in engine.problems for p in problem.module.parameters()]
    theirs = loop.parameters()
    assert len(ours) == len(theirs)
    largest = max(
        float((a - b).detach().abs().max() / a.detach().abs().max().clamp_min(1e-12))
        for a, b in zip(ours, theirs, strict=True)
    )
    if exact and largest > 0.0:
        raise SystemExit(f"the loops disagree by {largest:.1e}: they did not do the same work")
    return largest


CASES: dict[str, int] = {"e2eaug": 60, "toy": 1500}
"""Iterations by default."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of E2EAug's config")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--iterations", type=int, help="per case, instead of its own number")
    parser.add_argument("--blocks", type=int, default=5, help="that the spread is taken over")
    parser.add_argument("--warm-up", type=int, default=5, help="iterations left out")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = command_line.parse(parser)
    device = machine.choose_device(arguments.device)
    report: dict[str, Any] = {"machine": machine.describe(device), "cases": {}}
    print(machine.head(report["machine"]), "\n", sep="")
    print("| case | clock | engine ms | hand-written ms | ratio of medians | blocks | of means |")
    print("|---|---|---|---|---|---|---|")
    for case in arguments.cases:
        iterations = (arguments.iterations or CASES[case]) + arguments.warm_up + 1
        if case == "e2eaug":

            def make(out: Path | None, iterations: int = iterations) -> Engine:
                return e2eaug(arguments.device, out, iterations, arguments.overrides)

            hand: Callable[[Engine], Loop] = HandWrittenE2EAug
        else:

            def make(out: Path | None, iterations: int = iterations) -> Engine:
                return decay_engine(arguments.device, out, iterations)

            hand = HandWrittenDecay
        found = compare(make, hand, device, arguments.blocks, arguments.warm_up)
        report["cases"][case] = found
        for clock in ("wall", "cpu"):
            row = found[clock]
            low, high = min(row["ratio_blocks"]), max(row["ratio_blocks"])
            print(
                f"| {case} | {clock} | {row['engine_ms']:.2f} | {row['hand_ms']:.2f} | "
                f"{row['ratio']:.3f} | {low:.3f} to {high:.3f} | {row['ratio_of_means']:.3f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if "e2eaug" in report["cases"]:
        ratio = report["cases"]["e2eaug"]["cpu" if device.type == "cpu" else "wall"]["ratio"]
        print(f"\nE2EAug: {ratio:.3f}, target {TARGET}: {'met' if ratio <= TARGET else 'missed'}")


if __name__ == "__main__":
    raise SystemExit(as_script(main))
