"""Programs written for Betty, on Betty's engine and on ours: do they come to the same numbers?

    python benchmarks/betty_programs.py            # all of them
    python benchmarks/betty_programs.py maml nas   # some

They are what Betty's own tests cover and its examples and tutorials do, written anew at toy size
from their description, on drawn data, in float64. Each is run three times: on Betty's engine, on
ours as it is, and on ours with its levels derived from ``mlseg.Problem``. Needs nothing beside
``betty-ml``. Prints a number of each run, the largest difference between all that they left behind
(weights, rates, counts, validations), and exits with 1 where it is more than rounding.

Where a loss draws random numbers, ``mlseg.Problem`` replays them in a hypergradient, which Betty
draws anew: that one column is shown, and not compared.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import betty_examples
import betty_tutorials
import torch
from betty.logging.logger_base import get_logger
from betty_parts import ON, PROGRAMS, On, Outcome
from torch import Tensor

assert PROGRAMS, (betty_tutorials, betty_examples)  # importing them enters their programs

TOLERANCE = 1e-8
"""Relative. A unit of rounding, 1e-16, over the finite differences' step of 1e-2, times the steps
of a program, which are fewer than 1e4, and its curvature; what differs in deed differs by 1e-4."""

REPLAYED = "dropout"
"""The program whose loss draws random numbers."""


@contextmanager
def as_they_were() -> Iterator[None]:
    """Float64, the same draws, and Betty's console silent; all as before afterwards."""
    former, state, console = torch.get_default_dtype(), torch.get_rng_state(), get_logger()
    level = console.level
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    console.setLevel("WARNING")
    try:
        with warnings.catch_warnings():
            # Betty steps a schedule with every batch, and torch remarks on it.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            yield
    finally:
        console.setLevel(level)
        torch.set_rng_state(state)
        torch.set_default_dtype(former)


def run(name: str, on: On) -> Outcome:
    """What a program leaves behind."""
    with as_they_were():
        return PROGRAMS[name](on)


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any part; infinite where one of the two lacks any."""
    if ours.keys() != theirs.keys() or any(ours[k].shape != theirs[k].shape for k in ours):
        return float("inf")
    pairs = [(ours[k].double(), theirs[k].double()) for k in ours]
    found = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    return max(value if value == value else float("inf") for value in found)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Betty's programs on both engines.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROGRAMS))
    names = parser.parse_args(arguments).names or list(PROGRAMS)
    unknown = sorted(set(names) - set(PROGRAMS))
    if unknown:
        parser.error(f"no program {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    agreed = True
    print(f"{'program':30}{'Betty':>18}{'ours':>18}{'mlseg.Problem':>18}  difference")
    for name in names:
        outcomes = [run(name, on) for on in ON.values()]
        numbers = [sum(float(v.double().sum()) for v in found.values()) for found in outcomes]
        compared = outcomes[1:2] if name == REPLAYED else outcomes[1:]
        worst = max(difference(found, outcomes[0]) for found in compared)
        same = worst <= TOLERANCE
        agreed &= same
        shown = "".join(f"{number:18.10f}" for number in numbers)
        print(f"{name:30}{shown}  {worst:.1e} {'same' if same else 'DIFFERENT'}", flush=True)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
