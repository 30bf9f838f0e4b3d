"""How many kernels an iteration launches, how long they keep the GPU busy, and which they are.

    python benchmarks/kernels.py configs/e2eaug_isic.yaml data.out_of_distribution=[] data.test=8
    python benchmarks/kernels.py configs/segan_isic.yaml data.train=100 data.val=8 --longest 20

Where an iteration (``benchmarks/iteration.py``) takes longer than its kernels together, the host
can't launch them fast enough. Printed are an iteration's milliseconds without a profiler, how long
the host takes to launch it, and, by torch's profiler, each part's kernels, by the moment of their
launch. On the CPU, which launches none, operators stand in for them.
"""

from __future__ import annotations

import argparse
import bisect
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from iteration import REST, built, parts_of
from torch.profiler import ProfilerActivity, profile, record_function

from mlseg import command_line, machine
from mlseg.commands import as_script, counted, named
from mlseg.engines.engine import Engine

PART = "part: "
KERNELS, LAUNCHES = {"kernel", "gpu_memcpy", "gpu_memset"}, {"cuda_runtime", "cuda_driver"}


class Marks:
    """Parts as ranges of the profiler."""

    def __call__(self, part: str) -> AbstractContextManager[Any]:
        """A range of this part."""
        return record_function(PART + part)


@dataclass
class Found:
    """Kernels of one part, or of one name: how many, and microseconds."""

    count: int = 0
    microseconds: float = 0.0


@dataclass
class Profile:
    """Kernels of some iterations."""

    parts: dict[str, Found] = field(default_factory=dict)
    names: dict[str, Found] = field(default_factory=dict)

    @classmethod
    def read(cls, events: Sequence[Mapping[str, Any]], cuda: bool) -> Profile:
        """From a trace of torch's profiler."""
        marks = sorted(
            (e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(PART))
            for e in events
            if e.get("cat") == "user_annotation" and e["name"].startswith(PART)
        )
        launched = {
            e["args"]["correlation"]: e["ts"]
            for e in events
            if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
        }
        found, end = cls(), 0.0
        for event in sorted(
            (e for e in events if e.get("cat") in (KERNELS if cuda else {"cpu_op"})),
            key=lambda e: e["ts"],
        ):
            moment = event["ts"]
            if cuda:
                moment = launched.get(event["args"].get("correlation"), moment)
            elif moment < end:
                continue  # within another operator
            end = event["ts"] + event["dur"]
            for table, key in (
                (found.parts, _innermost(marks, moment)),
                (found.names, event["name"]),
            ):
                entry = table.setdefault(key, Found())
                entry.count += 1
                entry.microseconds += event["dur"]
        return found


def _innermost(marks: Sequence[tuple[float, float, str]], moment: float) -> str:
    """The part that was opened last of those that are open; backward passes run in a thread of
    their own, but at a moment of their part."""
    for begin, end, part in reversed(
        marks[: bisect.bisect_right(marks, moment, key=lambda m: m[0])]
    ):
        if begin <= moment <= end:
            return part
    return REST


def timed(engine: Engine, iterations: int) -> tuple[float, float]:
    """Milliseconds of an iteration, and those after which the host has launched it."""

    def wait() -> None:
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)

    wait()
    begun = time.perf_counter()
    for _ in range(iterations):
        engine.iterate()
    launched = time.perf_counter()
    wait()
    ended = time.perf_counter()
    return 1e3 * (ended - begun) / iterations, 1e3 * (launched - begun) / iterations


def profiled(engine: Engine, system: str, iterations: int) -> Profile:
    """The kernels of so many iterations."""
    cuda = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with parts_of(engine, Marks(), system), profile(activities=activities) as recorded:
        for _ in range(iterations):
            engine.iterate()
        if cuda:
            torch.cuda.synchronize(engine.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return Profile.read(trace["traceEvents"], cuda)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=named)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--iterations", type=counted, default=20, help="that are timed")
    parser.add_argument("--profiled", type=counted, default=3, help="iterations with a profiler")
    parser.add_argument("--longest", type=counted, default=12, help="kernels to name")
    arguments = command_line.parse(parser)
    device = machine.choose_device(arguments.device)
    settings, engine = built(arguments.config, [f"device={device}", *arguments.overrides])
    for _ in range(5):
        engine.iterate()
    whole, launched = timed(engine, arguments.iterations)
    found = profiled(engine, settings.system, arguments.profiled)
    each = arguments.profiled
    what = "kernels" if device.type == "cuda" else "operators"
    busy = sum(part.microseconds for part in found.parts.values()) / each / 1e3
    print(f"# {what} of an iteration of {arguments.config.name}\n")
    print(machine.head(machine.describe(device)), "\n", sep="")
    print(f"{whole:.1f} ms an iteration, launched by the host in {launched:.1f} ms; ")
    print(f"{sum(p.count for p in found.parts.values()) / each:.0f} {what}, {busy:.1f} ms\n")
    for head, table, most in (
        ("part", found.parts, len(found.parts)),
        ("name", found.names, arguments.longest),
    ):
        print(f"| {head} | {what} | ms |\n|---|---|---|")
        for key, part in sorted(table.items(), key=lambda item: -item[1].microseconds)[:most]:
            name = key.replace("|", "\\|")[:100]
            print(f"| {name} | {part.count / each:.0f} | {part.microseconds / each / 1e3:.2f} |")
        print()


if __name__ == "__main__":
    raise SystemExit(as_script(main))
