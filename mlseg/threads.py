"""How many threads a command computes with, and how long those that wait may spin.

OpenMP's threads spin while they wait for the next piece of work: they look for it over and over, so
as to be there at once, and torch's libgomp lets them do so for 15 ms and longer. Where another
program wants a core, the one that everybody waits for doesn't get it, and networks whose pieces
take microseconds train ten times slower than on one thread. So a command does two things, unless
its user has said otherwise: it bounds the spinning, in the environment and before torch is loaded,
since OpenMP looks there once; and it takes as many threads as its work fills.

``benchmarks/threads.py`` measures what the numbers below are worth.

A library doesn't change its user's environment: all this is done by commands.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORK_PER_THREAD = 2**25
"""Multiply-adds that are worth a thread; ``RunSettings.work`` says of what.

On two cores of a Xeon, U-Nets and their second thread, alone and beside a program that keeps one
core busy: 2 M are trained 1.2 and 0.4 times as fast, 34 M 1.5 and 0.8, 134 M 1.55 and 0.95.
"""

MOST = 1024
"""Threads of a command. OpenMP ends its process without a word where there can't be so many."""

SPINNING = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""For GNU's OpenMP, in turns of its loop, half a millisecond; for LLVM's and Intel's, in ms."""

_SPINNING_KEYS = ("OMP_WAIT_POLICY", *SPINNING)
_NUMBER_KEYS = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")  # torch heeds the first of them


@dataclass(frozen=True)
class Threads:
    """A decision.

    Attributes:
        number: of threads.
        chosen_by: ``--threads``, ``config``, a variable of the environment, ``size`` of the work,
            or ``run``: those that a run began with.
    """

    number: int
    chosen_by: str

    def use(self) -> Threads:
        """Make torch compute with them; itself."""
        import torch

        torch.set_num_threads(self.number)
        return self

    def record(self) -> dict[str, Any]:
        """For ``results.json``: number, who chose it, and what bounds the spinning."""
        return {"number": self.number, "chosen_by": self.chosen_by, "spinning": spinning()}


def bound_spinning() -> None:
    """Keep waiting threads from spinning for long, unless the environment says how they wait.

    Without effect where torch is loaded already: a command called from a user's own program.
    """
    if "torch" not in sys.modules and not any(key in os.environ for key in _SPINNING_KEYS):
        os.environ.update(SPINNING)


def spinning() -> str:
    """What the environment says of it: ``GOMP_SPINCOUNT=10000 KMP_BLOCKTIME=1``."""
    said = [f"{key}={os.environ[key]}" for key in _SPINNING_KEYS if key in os.environ]
    return " ".join(said) or "unbounded"


def choose(work: int, jobs: int = 1) -> Threads:
    """What the environment says, or else one for each ``WORK_PER_THREAD``, as there are cores.

    Args:
        work: multiply-adds; 0 where nothing is known of them.
        jobs: processes that share the cores.
    """
    fitting = max(1, min(work // WORK_PER_THREAD, cores() // jobs))
    return by_environment() or Threads(fitting, "size")


def by_environment() -> Threads | None:
    """What the user's environment says; None where it says nothing."""
    for key in _NUMBER_KEYS:
        first = os.environ.get(key, "").partition(",")[0].strip()  # a list has one per nesting
        if first.isdecimal() and int(first):
            return Threads(int(first), key)
    return None


def cores() -> int:
    """Processor cores that this process may use, at least 1.

    Those of its CPU affinity, each once however many hardware threads it has, as torch counts;
    not more than a container's quota.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    return max(1, min(len({_siblings(cpu) for cpu in cpus}), _quota() or len(cpus)))


def _siblings(cpu: int) -> str:
    path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(path) or str(cpu)


def _quota() -> int | None:
    """Whole CPUs that the control group grants, versions 2 and 1."""
    folder = "/sys/fs/cgroup"
    both = _read(f"{folder}/cpu.max") or " ".join(
        _read(f"{folder}/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")
    )
    quota, _, period = both.partition(" ")
    if not (quota.isdecimal() and period.isdecimal()):
        return None  # "max", -1, or no such file
    return max(1, int(quota) // int(period))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """``--threads``."""
    parser.add_argument(
        "--threads", type=_number, metavar="N", help="of the processor; default: as the work needs"
    )


def _number(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if not 1 <= number <= MOST:
        raise argparse.ArgumentTypeError(f"{text} isn't 1 to {MOST}")
    return number
