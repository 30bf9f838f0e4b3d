"""Hypergradients: time and memory beside Betty, higher, TorchOpt and hand-written autograd.

    OMP_NUM_THREADS=1 python benchmarks/hypergradients.py --json hypergradients.json     # CPU
    python benchmarks/hypergradients.py --device cuda --size large

One U-Net, the same batches and starting weights for everybody; an upper level that enters the
segmentor's loss late (class weights) or early (an image perturbation). Three pieces of work:

* ``one_step``: one hop, the upper loss's gradient by the segmentor's weights given, with the
  identity for the inverse Hessian: by finite differences (ours and Betty's, the same step) and by
  autograd (ours in both orders, and two hand-written calls);
* ``step_and_hop``: a training step and such a hop by finite differences: a one-sided one, which has
  its other side from the step, beside a central one and Betty's;
* ``products``: the iteration of ``cg`` and ``neumann`` per Hessian-vector product, beside the bare
  product, all on graphs that are there already; and their whole hop beside Betty's;
* ``unrolled``: inner steps from the same weights and then the outer gradient: ours with the
  training step as it is and its recording, ``higher`` and TorchOpt with their differentiable inner
  loop.

Before anything is measured, everybody does the work once in double precision, and has to agree with
the others. Then they take turns, round by round, so that whatever else the machine does hurts all
of them alike; a ratio is the median over rounds of the ratio within a round. Time is this process's
CPU time (CUDA: time in the stream).

Memory is what the work allocates beyond what is there when it starts, at its peak, in a run of its
own, as torch's allocators report it (:mod:`mlseg.comparison.memory`). What a run leaves behind for
the next, such as the storage of recorded steps, is freed before, so that it counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import two_levels
from contests import Agreement, Group, Makers, table
from spans import CpuClock, CudaClock
from torch import Tensor
from torch.autograd import forward_ad
from two_levels import Contestant, Task

from mlseg import command_line, machine
from mlseg.commands import as_script
from mlseg.hypergradients.second_order.products import dual_level
from mlseg.hypergradients.substitution import substituted

DARTS_STEP = 0.01
"""Betty's ``darts_alpha``: the norm of the finite difference's step."""
NEUMANN_STEP = 1e-4
DAMPING = 100.0
"""So that no negative curvature ends an iteration early."""
CHECKED_STEPS = 5
FORWARD = {"mode": "forward_over_reverse"}
UNROLLED: dict[str, dict[str, Any]] = {
    "mlseg, graphs": {"store": "graphs"},
    "mlseg, weights": {"store": "weights"},
    "mlseg, weights, forward_over_reverse": {"store": "weights", **FORWARD},
}
UNROLLED_GOALS = {"mlseg, graphs": (0.80, 1.10), "mlseg, weights": (1.00, 0.30)}
"""Time and memory, to the better of the two libraries."""


def one_step() -> Makers:
    """One hop with the identity for the inverse Hessian."""

    def ours(**spec: Any) -> Callable[[Task], Contestant]:
        return lambda task: two_levels.our_hop(task, {"scale": "none", **spec})

    return {
        "Betty darts": lambda task: two_levels.bettys_hop(task, "darts", darts_alpha=DARTS_STEP),
        "mlseg finite_difference": lambda task: ours(**_difference(task))(task),
        "double backward by hand": two_levels.hop_by_hand,
        "mlseg identity": ours(method="identity"),
        "mlseg identity, forward_over_reverse": ours(method="identity", **FORWARD),
    }


def _difference(task: Task) -> dict[str, Any]:
    """Of the same step as Betty's."""
    size = float(torch.nn.utils.get_total_norm(task.network().parameters()))
    return {"method": "finite_difference", "epsilon": DARTS_STEP / size}


def step_and_hop() -> Makers:
    """A training step, and a hop over it by finite differences."""

    def ours(scheme: str) -> Callable[[Task], Contestant]:
        given = {"scheme": scheme, "scale": "none", "linearise": "before_step"}
        return lambda task: two_levels.our_step_and_hop(task, {**_difference(task), **given})

    return {
        "Betty darts": lambda task: two_levels.bettys_step_and_hop(
            task, "darts", darts_alpha=DARTS_STEP
        ),
        "mlseg central": ours("central"),
        "mlseg forward": ours("forward"),
        "mlseg one_sided": ours("one_sided"),
    }


def iterations(count: int) -> Makers:
    """Iterations of ``count`` Hessian-vector products, on a graph that is there."""

    def solve(**spec: Any) -> Callable[[Task], Contestant]:
        return lambda task: two_levels.solve(task, spec, count)

    return {
        "bare product": lambda task: two_levels.bare_products(task, count),
        "mlseg cg": solve(method="cg", iterations=count, damping=DAMPING, tolerance=0.0),
        "mlseg neumann": solve(
            method="neumann", terms=count, step_size=NEUMANN_STEP, damping=DAMPING
        ),
    }


def implicit_hops(count: int) -> Makers:
    """Whole hops with ``count`` Hessian-vector products and a mixed one.

    Betty's methods know no damping, and its ``cg`` is wrong (a direction made with the old
    residual), so that results can't agree here; the number of products is checked instead.
    """
    neumann = {
        "method": "neumann",
        "terms": count,
        "step_size": NEUMANN_STEP,
        "damping": DAMPING,
    }
    cg = {"method": "cg", "iterations": count, "damping": DAMPING, "tolerance": 0.0}
    return {
        "Betty neumann": lambda task: two_levels.bettys_hop(
            task, "neumann", neumann_iterations=count, neumann_alpha=NEUMANN_STEP
        ),
        "mlseg neumann": lambda task: two_levels.our_hop(task, neumann, count + 1),
        "Betty cg": lambda task: two_levels.bettys_hop(task, "cg", cg_iterations=count),
        "mlseg cg": lambda task: two_levels.our_hop(task, cg, count + 1),
    }


def unrolled(inner: str) -> Makers:
    """Inner steps of an optimizer, and the outer gradient through them."""

    def ours(spec: Mapping[str, Any]) -> Callable[[Task], Contestant]:
        whole = {"method": "unrolled", **spec}
        return lambda task: two_levels.our_unrolling(task, inner, whole)

    return {
        "higher": lambda task: two_levels.higher_unrolling(task, inner),
        "TorchOpt": lambda task: two_levels.torchopt_unrolling(task, inner),
        **{name: ours(spec) for name, spec in UNROLLED.items()},
    }


AGREEMENT: Sequence[Agreement] = (
    # The rounding unit of 1e-16 over their step of 1e-2, times thousands of operations.
    ("mlseg finite_difference", "Betty darts", 1e-6),
    ("mlseg central", "Betty darts", 1e-6),
    ("mlseg one_sided", "mlseg forward", 1e-9),
    ("mlseg identity", "double backward by hand", 1e-9),
    ("mlseg identity, forward_over_reverse", "double backward by hand", 1e-9),
    # Its correction of the moments' bias is in single precision, also with double weights:
    # 1 - 0.999 is off by 6e-8 / 1e-3 there, and a few such steps follow each other.
    ("TorchOpt", "higher", 5e-3),
    *((name, "higher", 1e-9) for name in UNROLLED),
)

# ------------------------------------------------------------------------------ why it costs


def passes(task: Task, rounds: int) -> dict[str, float]:
    """Seconds of the passes that the pieces of work are made of, medians."""
    network, upper = task.network(), task.upper()
    weights, inputs = list(network.parameters()), list(upper.parameters())
    cuda = task.device.type == "cuda"
    clock = CudaClock(task.device) if cuda else CpuClock()
    found: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        clock.mark()
        result = function()
        clock.mark()
        found.setdefault(name, []).append(clock.stretches()[0]["stream" if cuda else "cpu"])
        return result

    def loss() -> Tensor:
        return task.inner(network, upper, task.train[0])

    def grad(outputs: Any, by: Sequence[Tensor], **options: Any) -> Any:
        return torch.autograd.grad(outputs, by, **options)

    for _ in range(rounds + 1):
        value = timed("forward", loss)
        timed("backward", partial(grad, value, weights))
        value = loss()
        gradient = timed(
            "backward, with its graph", partial(grad, value, weights, create_graph=True)
        )
        timed(
            "product, weights and inputs, by double backward",
            partial(grad, gradient, [*weights, *inputs], grad_outputs=task.vector),
        )
        with dual_level():
            duals = [forward_ad.make_dual(w, v) for w, v in zip(weights, task.vector, strict=True)]
            with substituted([network], weights, duals):
                value = timed("forward with tangents", loss)
            timed("backward with tangents", partial(grad, value, [*duals, *inputs]))
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


# ------------------------------------------------------------------------------------ report


class Targets:
    """What was expected, and what came out."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def most(self, what: str, value: float, limit: float) -> None:
        """``value``, to two places, is to be at most ``limit``."""
        self._add(what, f"{value:.2f}", f"at most {limit:.2f}", round(value, 2) <= limit)

    def unrolled(self, group: Group) -> None:
        """To the faster of both libraries, and the memory to the smaller's."""
        theirs = [n for n in ("higher", "TorchOpt") if n in group.seconds]
        fastest = min(theirs, key=lambda n: statistics.median(group.seconds[n]))
        smallest = min(group.bytes[n] for n in theirs)
        for name, (most, largest) in UNROLLED_GOALS.items():
            time, size = group.ratio(name, fastest), group.bytes[name] / smallest
            self._add(
                f"{group.title}: {name} to {fastest}",
                f"time {time:.2f}, memory {size:.2f}",
                f"time at most {most:.2f}, memory at most {largest:.2f}",
                round(time, 2) <= most and round(size, 2) <= largest,
            )

    def _add(self, what: str, found: str, wanted: str, met: bool) -> None:
        self.rows.append({"what": what, "found": found, "wanted": wanted, "met": met})

    def __str__(self) -> str:
        lines = ["| target | found | wanted | met |", "|---|---|---|---|"]
        for row in self.rows:
            met = "yes" if row["met"] else "no"
            lines.append(f"| {row['what']} | {row['found']} | {row['wanted']} | {met} |")
        return "\n".join(lines)


PARTS = ("passes", "one_step", "step_and_hop", "products", "unrolled")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--entries", nargs="+", choices=two_levels.ENTRIES, default=None)
    parser.add_argument("--optimizers", nargs="+", choices=two_levels.INNER, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=two_levels.SIZES, default="small")
    parser.add_argument("--steps", type=int, default=5, help="inner steps of unrolled")
    parser.add_argument("--products", type=int, default=5, help="of cg and neumann")
    parser.add_argument("--rounds", type=int, default=9, help="that medians are taken over")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = command_line.parse(parser)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # Betty's engine introduces its problems
    gc.freeze()  # what was imported needn't be walked at each of the collections below
    device, size = machine.choose_device(arguments.device), two_levels.SIZES[arguments.size]
    rounds, targets = arguments.rounds, Targets()
    report: dict[str, Any] = {"machine": machine.describe(device), "size": vars(size)}
    print(machine.head(report["machine"]), "\n", sep="")
    groups: list[Group] = []

    def run(
        what: str,
        makers: Makers,
        make_task: Callable[[torch.dtype], Task],
        references: Sequence[str],
        divide: int = 1,
    ) -> Group:
        group = Group(f"{what}, {entry}", makers, make_task, device, AGREEMENT)
        group.measure(rounds)
        groups.append(group)
        print(table(group, references, divide), flush=True)
        return group

    for entry in arguments.entries or two_levels.ENTRIES:

        def make_task(dtype: torch.dtype, entry: str = entry) -> Task:
            # Agreement is checked in double precision, whose graphs are twice as large.
            most = CHECKED_STEPS if dtype == torch.float64 else arguments.steps
            return Task(size, entry, min(arguments.steps, most), device, dtype)

        if "passes" in arguments.parts:
            found = passes(make_task(torch.float32), rounds)
            report.setdefault("passes", {})[entry] = found
            print(f"| passes, {entry} | ms |\n|---|---|")
            for name, seconds in found.items():
                print(f"| {name} | {1e3 * seconds:.1f} |")
            print(flush=True)
        if "one_step" in arguments.parts:
            darts, by_hand = "Betty darts", "double backward by hand"
            group = run("one hop", one_step(), make_task, [darts, by_hand])
            ours = "mlseg finite_difference"
            targets.most(f"{group.title}: {ours} to {darts}", group.ratio(ours, darts), 1.0)
            ours = "mlseg identity"
            targets.most(f"{group.title}: {ours} to {by_hand}", group.ratio(ours, by_hand), 0.75)
        if "step_and_hop" in arguments.parts:
            group = run("a step and its hop", step_and_hop(), make_task, [darts := "Betty darts"])
            ours = "mlseg one_sided"
            targets.most(f"{group.title}: {ours} to {darts}", group.ratio(ours, darts), 0.8)
        if "products" in arguments.parts:
            count = arguments.products
            bare = "bare product"
            group = run("a product", iterations(count), make_task, [bare], count)
            for ours in ("mlseg cg", "mlseg neumann"):
                targets.most(f"{group.title}: {ours} to {bare}", group.ratio(ours, bare), 0.80)
            hops = implicit_hops(count)
            run(f"{count} products, one hop", hops, make_task, ["Betty neumann", "Betty cg"])
        if "unrolled" in arguments.parts:
            for inner in arguments.optimizers or two_levels.INNER:
                what = f"{arguments.steps} steps of {inner}"
                targets.unrolled(run(what, unrolled(inner), make_task, ["higher", "TorchOpt"]))
    print(targets)
    report |= {"groups": [group.as_dict() for group in groups], "targets": targets.rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(as_script(main))
