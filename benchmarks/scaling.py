"""How cost grows: with steps, levels, image size, batch, parameters and the size of the set.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out scaling
    python benchmarks/scaling.py --axes T levels --rounds 9 --out scaling

A chain of levels: the lowest learns label maps under weights of classes that the top level learns,
each further one imitates the one below, and the top's gradient goes through all of them. Of one
outer iteration (all inner steps and the hypergradient) the CPU time and the peak of memory are
measured while one thing grows, all else kept; the axes take turns, round by round, and the fastest
round of each point counts. ``T`` is measured with all steps' weights stored, with few states and
with graphs.

The slope is that of a straight line through the points in logarithmic scales. What is expected:
time grows with the number of steps, hops, pixels, examples, and with parameters as convolutions do,
so that it has slope 1; memory of ``T`` steps has slope 1 with graphs, that of stored weights grows
by their copies alone, and few states don't grow at all; an epoch's cost has slope 1 in the size of
the set, an iteration's 0. ``--out`` has a picture of each axis beside ``scaling.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mlseg import machine
from mlseg.commands import as_script
from mlseg.comparison import memory
from mlseg.segmentation.nets.unet import UNet
from mlseg.testing import programs
from mlseg.testing.families import Vector
from mlseg.testing.programs import Graph, Nets

CLASSES = 2


@dataclass(frozen=True)
class Size:
    """Of a program.

    Attributes:
        steps: of the lowest level per step of the next.
        levels: the top included.
        side: pixels.
        batch: examples.
        channels: of each network's first layer; parameters grow with its square.
        examples: in the set.
        store: of ``unrolled``, the lowest level's method.
    """

    steps: int = 4
    levels: int = 2
    side: int = 32
    batch: int = 2
    channels: int = 4
    examples: int = 8
    store: Any = "weights"


def fits(nets: Nets, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy under the top's weights of classes."""
    image, mask = batch
    weights = nets["top"]().softmax(0) * CLASSES
    losses = functional.cross_entropy(nets["level0"](image), mask, reduction="none")
    return (losses * weights[mask]).mean()


def imitates(number: int) -> Callable[[Nets, tuple[Tensor, Tensor]], Tensor]:
    """Squared difference to the level below."""

    def loss(nets: Nets, batch: tuple[Tensor, Tensor]) -> Tensor:
        image, _ = batch
        own, below = nets[f"level{number}"](image), nets[f"level{number - 1}"](image)
        return ((own - below) ** 2).mean()

    return loss


def program(size: Size) -> Any:
    """An engine."""
    names = [f"level{n}" for n in range(size.levels - 1)]
    last = names[-1]

    def judges(nets: Nets, batch: tuple[Tensor, Tensor]) -> Tensor:
        image, mask = batch
        return functional.cross_entropy(nets[last].evaluated(image), mask)

    losses = {names[0]: fits, **{n: imitates(i) for i, n in enumerate(names) if i}, "top": judges}
    l2u = {name: [above] for name, above in zip(names, [*names[1:], "top"], strict=True)}
    graph = Graph(losses, l2u, {"top": [names[0]]})
    torch.manual_seed(0)
    nets = {name: UNet(3, CLASSES, channels=size.channels, levels=2) for name in names}
    batches = [
        (torch.randn(size.batch, 3, size.side, size.side),
         torch.randint(CLASSES, (size.batch, size.side, size.side)))
        for _ in range(max(1, size.examples // size.batch))
    ]  # fmt: skip
    method = {"method": "unrolled", "store": size.store}
    return programs.build(
        graph,
        {**nets, "top": Vector(torch.zeros(CLASSES))},
        dict.fromkeys((*names, "top"), batches),
        method,
        programs.sgd(0.01, momentum=0.9),
        kinds=dict.fromkeys((*names, "top"), programs.Level),
        configs={names[0]: {"unroll_steps": size.steps}},
    )


def outer(engine: Any, steps: int) -> Callable[[], None]:
    """One outer iteration."""

    def once() -> None:
        for _ in range(steps):
            engine.iterate()

    return once


BASE = Size()
TINY = Size(steps=1, side=8, batch=1, channels=2, examples=2)
DOUBLED = (1, 2, 4, 8)


def axes(base: Size) -> dict[str, dict[int, Size]]:
    """The points of each axis, by what grows."""

    def along(key: str, factors: Sequence[int] = DOUBLED, **more: Any) -> dict[int, Size]:
        start = getattr(base, key)
        return {f * start: replace(base, **{key: f * start}, **more) for f in factors}

    states = {"states": 2}
    return {
        "T": along("steps"),
        "T, graphs": along("steps", store="graphs"),
        "T, 2 states": along("steps", store=states),
        "levels": {n - 1: replace(base, levels=n) for n in (2, 3, 4, 5)},
        "pixels": {s.side**2: s for s in along("side").values()},
        "batch": along("batch"),
        "parameters": {
            sum(p.numel() for p in UNet(3, CLASSES, channels=s.channels, levels=2).parameters()): s
            for s in along("channels").values()
        },
        "set": along("examples"),
    }


def slope(points: Mapping[int, float]) -> float:
    """Of a straight line through the points, both scales logarithmic."""
    x = torch.tensor([math.log(k) for k in points], dtype=torch.float64)
    y = torch.tensor([math.log(max(v, 1e-12)) for v in points.values()], dtype=torch.float64)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def picture(name: str, seconds: Mapping[int, float], mib: Mapping[int, float], path: Path) -> None:
    """Time and memory over what grows, each with the slope 1 through its first point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, values, label in zip(both, (seconds, mib), ("s", "MiB"), strict=True):
        x, y = list(values), list(values.values())
        axis.loglog(x, y, "o-", label="measured")
        axis.loglog(x, [y[0] * n / x[0] for n in x], ":", label="slope 1")
        axis.set_xlabel(name)
        axis.set_ylabel(label)
        axis.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure, print a table, write pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=axes(BASE), default=list(axes(BASE)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="networks and images of no use")
    parser.add_argument("--out", type=Path, help="for pictures and figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = TINY if arguments.tiny else BASE
    chosen = {name: axes(base)[name] for name in arguments.axes}
    works = {
        (name, at): outer(program(size), size.steps)
        for name, points in chosen.items()
        for at, size in points.items()
    }
    fastest = dict.fromkeys(works, math.inf)
    for work in works.values():
        work()  # what is only set up once
    for _ in range(arguments.rounds):
        for key, work in works.items():
            begun = time.process_time()
            work()
            fastest[key] = min(fastest[key], time.process_time() - begun)
    mib = {key: memory.peak(work)[1] / 2**20 for key, work in works.items()}
    described = machine.describe()
    print(f"# How cost grows\n\n{machine.head(described)}\n- seed: 0, {arguments.rounds} rounds\n")
    print("| what grows | from, to | s | slope | MiB | slope |")
    print("|---|---|---|---|---|---|")
    figures: dict[str, Any] = {}
    for name, points in chosen.items():
        seconds = {at: fastest[name, at] for at in points}
        memories = {at: mib[name, at] for at in points}
        first, last = min(points), max(points)
        print(
            f"| {name} | {first}, {last} | {seconds[first]:.3g}, {seconds[last]:.3g} | "
            f"{slope(seconds):.2f} | {memories[first]:.3g}, {memories[last]:.3g} | "
            f"{slope(memories):.2f} |"
        )
        sizes = {at: asdict(size) for at, size in points.items()}
        figures[name] = {"seconds": seconds, "MiB": memories, "sizes": sizes}
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            picture(name, seconds, memories, arguments.out / f"{name.replace(', ', '_')}.png")
    if arguments.out is not None:
        text = json.dumps({"machine": described, "axes": figures}, indent=2)
        (arguments.out / "scaling.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(as_script(main))
