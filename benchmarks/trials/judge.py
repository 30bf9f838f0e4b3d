"""What became of a trial: right, refused in one line, or failed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trials.child import CRASH, Ended

Verdict = Literal["right", "refused", "failed", "skipped"]
State = dict[str, tuple[object, ...]]


@dataclass(frozen=True)
class Outcome:
    """Of one trial.

    Attributes:
        verdict: what became of it.
        why: of a failure, or of what can't be had here.
        row: the line of the table that it counts in.
        kills: how many processes it has killed.
    """

    verdict: Verdict
    why: str = ""
    row: str = ""
    kills: int = 0


class Failure(AssertionError):
    """What should not have happened; its text says what."""


def expect(true: bool, why: str) -> None:
    """Fail the trial unless ``true``."""
    if not true:
        raise Failure(why)


def clean(ended: Ended, codes: Iterable[int] = (0, 1, 2), lines: bool = True) -> None:
    """Check that a command ended by itself, in time, within its memory, and without a traceback.

    Args:
        codes: that it may end with.
        lines: a code other than 0 comes with exactly one line of failure.

    Raises:
        Failure: it didn't.
    """
    last = (ended.error.strip().splitlines() or ["nothing on standard error"])[-1][:300]
    expect(not ended.hung, f"{ended.task.name}: hangs ({ended.seconds:.0f} s); {last}")
    expect(ended.code != CRASH, f"{ended.task.name}: traceback: {last}")
    for words in ("Traceback (most recent", "Exception in thread", "Exception ignored"):
        expect(words not in ended.error + ended.output, f"{ended.task.name}: {words}: {last}")
    expect(ended.code in set(codes), f"{ended.task.name}: exit code {ended.code}: {last}")
    expect(
        ended.memory <= ended.task.memory,
        f"{ended.task.name}: {ended.memory:.0f} MiB, {ended.task.memory} are allowed; {last}",
    )
    if lines and ended.code in (1, 2):
        found = failures(ended)
        expect(len(found) == 1, f"{ended.task.name}: {len(found)} lines of failure: {last}")


def failures(ended: Ended) -> list[str]:
    """The lines that say what failed."""
    return [
        line for line in ended.error.splitlines() if line.startswith(("error: ", "failed: "))
    ]  # fmt: skip


def files(folder: Path, but: Iterable[Path] = ()) -> State:
    """What lies in a folder, to see later that it is unchanged.

    Args:
        but: folders and files that may change.
    """
    left_out = {str(path) for path in but}
    found: State = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if str(Path(root, name)) not in left_out]
        for name in [*folders, *names]:
            path = Path(root, name)
            if str(path) in left_out:
                continue
            about = path.lstat()
            what: tuple[object, ...] = (stat.S_IFMT(about.st_mode),)
            if not stat.S_ISDIR(about.st_mode):
                what = (*what, about.st_ino, about.st_size, about.st_mtime_ns)
            found[str(path.relative_to(folder))] = what
    return found


def unchanged(before: State, now: State) -> None:
    """Check that nothing was made, changed or removed.

    Raises:
        Failure: something was.
    """
    touched = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    expect(not touched, f"touched what isn't its own: {', '.join(touched[:5])}")
