"""Where an iteration of a system goes: time and peak memory by part.

    OMP_NUM_THREADS=1 python benchmarks/iteration.py configs/e2eaug_isic_small.yaml --iterations 5
    python benchmarks/iteration.py configs/e2eaug_isic.yaml --device cuda --precision fp32 bf16
    python benchmarks/iteration.py configs/segan_isic.yaml --device cuda data.train=100 data.val=8

One iteration is one step of each level, in the last stage: what is trained before it alone, as in
E2EAug's pre-training, is left out. Parts:

* data: drawing the batches of all levels, augmentation included;
* a problem's step: forward, backward, optimizer, without what follows in this list;
* outer gradient: the upper loss's backward pass, and what ties the hops together;
* hop of a problem: carrying the outer gradient through it, towards all that its loss depends on;
* optimizer: all levels' updates;
* segmentor: forward, and clamp: SegAN's alone, the one forward pass that serves both players'
  steps, and that of the critic's parameters;
* rest: the order of steps, the guard against NaN.

Times on CUDA come from events in the stream, on the CPU from the wall clock and from the process's
CPU time (the one to trust on a busy machine). Peak memory is measured in iterations of its own: on
CUDA what torch's allocator has handed out, on the CPU resident memory, both with networks,
optimizer states and data included. Each precision runs in a process of its own. Without the data
set its stand-in is used; the figures don't depend on it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from spans import CpuClock, CpuMemory, CudaClock, CudaMemory, Spans

from mlseg import command_line, config, machine
from mlseg.commands import as_script, counted, named
from mlseg.engines.engine import Engine
from mlseg.engines.segmentation import Segmentation
from mlseg.multilevel.outer_gradient import OuterGradient
from mlseg.multilevel.problem import Problem
from mlseg.problems.systems import parse_run

REST = "rest"
MORE_PARTS: Mapping[str, Mapping[str, str]] = {
    "segan": {"segmentor.predict": "segmentor: forward", "critic.param_callback": "clamp"}
}
"""By system, a part for a problem's method, beyond those that every level has."""


@contextmanager
def parts_of(
    engine: Engine, spans: Callable[[str], AbstractContextManager[Any]], system: str
) -> Iterator[None]:
    """Within this block the methods that make up an iteration open spans of their own."""
    restore = []

    def wrap(owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with spans(part):
                return original(*args, **kwargs)

        restore.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, timed)

    for problem in engine.problems:
        wrap(problem, "get_batch", "data")
        wrap(problem, "one_step_descent", f"{problem.name}: step")
        wrap(problem, "optimizer_step", "optimizer")
        if isinstance(problem, Problem):
            wrap(problem, "hypergradient", f"{problem.name}: hop")
    wrap(OuterGradient, "__call__", "outer gradient")
    for place, part in MORE_PARTS.get(system, {}).items():
        name, method = place.split(".")
        wrap(getattr(engine, name), method, part)
    try:
        yield
    finally:
        for owner, name, own in reversed(restore):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def built(path: Path, overrides: Sequence[str]) -> tuple[Any, Engine]:
    """A config's settings, and its engine in the last stage."""
    settings, build = parse_run(config.load(path, overrides))
    torch.manual_seed(0)
    engine = build(settings, None)
    while engine.stage is not engine.stages[-1]:
        engine.next_stage()
    return settings, engine


def measure(
    path: Path,
    overrides: Sequence[str],
    device_name: str,
    precision: str,
    iterations: int,
) -> dict[str, Any]:
    """Build the system and measure its iterations, in this process.

    Returns:
        ``parts``: per part median seconds (``wall``, ``cpu`` on the CPU, ``stream`` on CUDA) and
        ``peak`` bytes; ``total``: the same of a whole iteration, with quartiles.
    """
    own = [f"device={device_name}", f"precision={precision}", "data.test=8"]
    settings, engine = built(path, [*overrides, *own])
    data = engine.hook(Segmentation).data
    device = engine.device
    cuda = device.type == "cuda"
    for _ in range(3):  # cuDNN chooses, caches fill, optimizers make their states
        engine.iterate()
    clock = Spans(CudaClock(device) if cuda else CpuClock())
    totals: list[dict[str, float]] = []
    with parts_of(engine, clock, settings.system):
        for _ in range(iterations):
            with clock(REST):
                engine.iterate()
            totals.append(clock.end_of_round())
    memory = Spans(CudaMemory(device) if cuda else CpuMemory())
    with parts_of(engine, memory, settings.system):
        for _ in range(2):
            with memory(REST):
                engine.iterate()
            memory.end_of_round()
    parts = {
        part: {
            **{unit: statistics.median(values) for unit, values in clock.exclusive[part].items()},
            "peak": max(memory.inclusive[part]["peak"]),
        }
        for part in clock.order
    }
    summary: dict[str, Any] = {"peak": max(memory.inclusive[REST]["peak"])}
    for unit in totals[0]:
        values = [total[unit] for total in totals]
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        summary[unit] = {"median": statistics.median(values), "quartiles": quartiles}
    parameters = {p.name: sum(q.numel() for q in p.module.parameters()) for p in engine.problems}
    return {
        "precision": precision,
        "parts": parts,
        "total": summary,
        "parameters": parameters,
        "image_size": list(data.train.image_size),
        "batch_sizes": {
            name: level["batch_size"] for name, level in settings.model_dump()["problems"].items()
        },
        "provenance": data.provenance,
    }


def report(found: dict[str, Any]) -> str:
    """One precision's figures as Markdown."""
    total = found["total"]
    units = [unit for unit in ("stream", "wall", "cpu") if unit in total]
    main = "stream" if "stream" in units else "cpu"
    lines = [
        f"## {found['precision']}",
        "",
        f"Images {'x'.join(map(str, found['image_size']))} ({found['provenance']}); batches: "
        + ", ".join(f"{name} {size}" for name, size in found["batch_sizes"].items())
        + "; parameters: "
        + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in found["parameters"].items()),
        "",
        "| part | " + " | ".join(f"{unit} ms" for unit in units) + " | share | peak MiB |",
        "|---" * (len(units) + 3) + "|",
    ]
    for part, values in found["parts"].items():
        times = " | ".join(f"{1e3 * values[unit]:.2f}" for unit in units)
        share = values[main] / total[main]["median"]
        lines.append(f"| {part} | {times} | {share:.1%} | {values['peak'] / 2**20:.0f} |")
    times = " | ".join(f"{1e3 * total[unit]['median']:.2f}" for unit in units)
    lines.append(f"| **iteration** | {times} | 100% | {total['peak'] / 2**20:.0f} |")
    low, _, high = total[main]["quartiles"]
    lines += ["", f"Quartiles of an iteration ({main}): {1e3 * low:.2f} and {1e3 * high:.2f} ms."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each precision and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=named)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--iterations", type=counted, default=20)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = command_line.parse(parser)
    parse_run(config.load(arguments.config, arguments.overrides))  # before a process is started
    described = machine.describe(arguments.device)
    print(f"# One iteration of {arguments.config.name}\n\n{machine.head(described)}\n", flush=True)
    figures = []
    for precision in arguments.precision:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(
                measure,
                arguments.config,
                arguments.overrides,
                arguments.device,
                precision,
                arguments.iterations,
            ).result()
        figures.append(found)
        print(report(found), flush=True)
    if arguments.json:
        text = json.dumps({"machine": described, "figures": figures}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(as_script(main))
