"""A run that is killed at random moments, or before random operations on files, and resumed.

At its end everything must be as in the run that nobody touched.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

from kill_and_resume import differences

from trials.child import Child, Task, call
from trials.fixtures import Fixtures, Reference
from trials.judge import Failure, Outcome, clean, expect

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """One run of one system, killed one to four times."""
    system, kills = draw.choice(fixtures.systems), draw.randint(1, 4)
    row = f"kills: {system}"
    try:
        _killed(draw, folder, fixtures.run(system), kills)
    except Failure as failure:
        return Outcome("failed", str(failure), row, kills)
    return Outcome("right", row=row, kills=kills)


def _killed(draw: random.Random, folder: Path, reference: Reference, kills: int) -> None:
    place, out = folder / "place", folder / "run"
    begin = (str(reference.config), "--out", str(out))
    for number in range(kills):
        resumed = (out / "config.yaml").exists()
        arguments = ("--resume", str(out)) if resumed else begin
        # Half of them where it hurts most: between two operations on files.
        die_at = draw.randint(1, reference.operations) if draw.random() < 0.5 else 0
        task = Task("run", arguments, place, f"killed_{number}", die_at=die_at)
        how, after = draw.choice(SIGNALS), draw.uniform(0.0, reference.seconds)
        child = Child(task)
        if not die_at and child.running(after):
            child.send(how)
        ended = child.wait()
        fine = {0, -signal.SIGKILL} if die_at else {0, -how, 128 + how}
        clean(ended, fine, lines=False)
    clean(call(finishing(reference.config, out, place)), (0,))
    same(reference.directory, out)


def finishing(config: Path, out: Path, place: Path) -> Task:
    """What brings a run to its end, wherever it stands."""
    resumed = (out / "config.yaml").exists()
    arguments = ("--resume", str(out)) if resumed else (str(config), "--out", str(out))
    return Task("run", arguments, place, "finishing")


def same(reference: Path, out: Path) -> None:
    """Check that a run left what the untouched one did.

    Raises:
        Failure: it differs.
    """
    found = differences(reference, out)
    expect(not found, f"differs from the untouched run: {', '.join(found[:6])}")
