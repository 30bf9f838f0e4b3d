"""Processes that want one directory at one time."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

from trials.child import Child, Task
from trials.fixtures import Fixtures
from trials.judge import Outcome, clean, expect, failures
from trials.kills import same


def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """Two to four of them: one begins or goes on, the others are told who it is."""
    reference = fixtures.run()
    place, out = folder / "place", folder / "run"
    config, number = str(reference.config), draw.randint(2, 4)
    kind = draw.choice(("out", "resume", "none"))
    arguments: tuple[str, ...] = (config, "--out", str(out))
    if kind == "none":
        arguments = (config,)
    if kind == "resume":
        first = Child(Task("run", arguments, place, "first"))
        if first.running(draw.uniform(0.3, 1.0) * reference.seconds):
            first.send(signal.SIGKILL)
        clean(first.wait(), (0, -signal.SIGKILL), lines=False)
        if (out / "config.yaml").exists():
            arguments = ("--resume", str(out))
        else:
            shutil.rmtree(out, ignore_errors=True)
    children = [Child(Task("run", arguments, place, f"process_{n}")) for n in range(number)]
    ended = [child.wait() for child in children]
    for one in ended:
        clean(one)
    done = [one for one in ended if one.code == 0]
    for one in ended:
        expect(one.code == 0 or "is at work in it" in failures(one)[0]
               or "holds a run already" in failures(one)[0], f"{failures(one)}")  # fmt: skip
    runs = sorted((place / "runs").glob("*/*")) if kind == "none" else [out]
    expect(len(runs) == (number if kind == "none" else 1), f"{number} processes, {len(runs)} runs")
    expect(len(done) >= len(runs), "none has done it")
    for run in runs:
        same(reference.directory, run)
    return Outcome("right")
