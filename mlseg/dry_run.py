"""``--dry-run``: build everything, say what a run would cost; ``=timed`` does each level once."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from betty.problems import Problem as BettyProblem
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mlseg.commands import make_console
from mlseg.counting import NEEDS_NUMBERS, counted, faked, held_bytes
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Work
from mlseg.errors import one_line
from mlseg.machine import peak_memory

MIB = 2**20


def dry_run(engine: Engine) -> None:
    """Print the level graph, parameter counts, memory and what an iteration computes.

    The work isn't done (:mod:`mlseg.counting`), and the engine is of no use afterwards.
    """
    console = make_console()
    console.print(graph(engine))
    console.print(sizes(engine))
    at_most = "at most, " if engine.total_iterations is None else ""
    table = Table("stage", "iterations", "GFLOP/iteration", f"{at_most}TFLOP in all", title="Work")
    held, peak, total = held_bytes(engine), 0, 0.0
    remarks: list[str] = []
    works = [(index, work) for index in range(len(engine.stages)) for work in _works(engine, index)]
    with faked(engine):
        for index, work in works:
            engine.enter_stage(index)
            engine.train()
            period = _period(engine, work)
            try:
                count = counted(partial(_several, work.once, period))
            except NEEDS_NUMBERS as error:
                table.add_row(work.name, str(work.times), "not counted", "")
                remarks.append(f"{work.name} looks at numbers ({one_line(error, 80)})")
                continue
            flops = count.flops / period
            total += flops * work.times
            peak = max(peak, count.peak)
            table.add_row(
                work.name,
                str(work.times),
                f"{flops / 1e9:.4g}",
                f"{flops * work.times / 1e12:.4g}",
            )
    table.add_row("all", str(sum(w.times for _, w in works)), "", f"{total / 1e12:.4g}")
    console.print(table)
    console.print(
        f"Memory: {held / MIB:,.0f} MiB of parameters and buffers, and {peak / MIB:,.0f} MiB that "
        "training holds besides at its peak; images, validation and scoring come on top"
    )
    for remark in remarks:
        console.print(f"{remark}: --dry-run=timed does it once")
    console.print("How long it takes here: --dry-run=timed, which does one step of each")


def timed_dry_run(engine: Engine) -> None:
    """Print the level graph, parameter counts, memory and the expected time; writes nothing."""
    console = make_console()
    console.print(graph(engine))
    console.print(sizes(engine))
    at_most = "at most, " if engine.total_iterations is None else ""
    table = Table("stage", "iterations", "s/iteration", f"{at_most}expected", title="Time")
    total, iterations = 0.0, 0
    for index in range(len(engine.stages)):
        for work in _works(engine, index):
            seconds = _time(work.once, _period(engine, work), torch.device(engine.device))
            total += seconds * work.times
            iterations += work.times
            expected = span(seconds * work.times)
            table.add_row(work.name, str(work.times), f"{seconds:.3f}", expected)
    table.add_row("all", str(iterations), "", span(total))
    console.print(table)
    device = torch.device(engine.device)
    where = "on the GPU" if device.type == "cuda" else "of the process"
    memory = f"{peak_memory(device) / MIB:,.0f} MiB {where}"
    console.print(f"Peak memory: {memory}; validation and scoring come on top")


def _works(engine: Engine, index: int) -> Sequence[Work]:
    """What stage ``index`` consists of; it is the present one then."""
    engine.enter_stage(index)
    engine.train()
    return engine.work()


def _period(engine: Engine, work: Work) -> int:
    """Times after which every level has stepped."""
    return max(map(_steps_to_top, engine.leaves), default=1) if work.whole else 1


def _several(once: Callable[[], object], times: int) -> None:
    for _ in range(times):
        once()


def graph(engine: Engine) -> Tree:
    """The levels of each stage, lowest first, and the hypergradient's paths."""
    root = Tree(Text("Levels", style="bold"))
    for index, stage in enumerate(engine.stages):
        engine.enter_stage(index)
        branch = root.add(f"stage {stage.name}, {stage.iterations} iterations")
        for leaf in engine.leaves:
            _add_level(branch, leaf)
        for problem in engine.problems:
            for path in problem.paths:
                branch.add("gradient " + " → ".join(node.name for node in path))
    return root


def _add_level(branch: Tree, problem: BettyProblem) -> None:
    node = branch.add(f"{problem.name} ({type(problem).__name__})")
    for parent in problem.parents:
        _add_level(node, parent)


def sizes(engine: Engine) -> Table:
    """Parameters, optimizer and rate of every problem."""
    table = Table("problem", "parameters", "trainable", "optimizer", "rate", title="Problems")
    for problem in engine.problems:
        parameters = list(problem.module.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        table.add_row(
            problem.name,
            f"{sum(p.numel() for p in parameters):,}",
            f"{trainable:,}",
            type(problem.optimizer).__name__,
            f"{problem.optimizer.param_groups[0]['lr']:g}" if problem.optimizer else "",
        )
    return table


def _steps_to_top(leaf: BettyProblem) -> int:
    """Iterations until every level above ``leaf`` has stepped once."""
    steps, problem = 1, leaf
    while problem.parents:
        steps *= problem.config.unroll_steps * problem.config.gradient_accumulation
        problem = problem.parents[0]
    return steps


def _time(once: Callable[[], object], period: int, device: torch.device) -> float:
    """Seconds per call over one ``period``, in which every level steps, after a first one."""
    cuda = device.type == "cuda"
    for _ in range(period):
        once()
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(period):
        once()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / period


def span(seconds: float) -> str:
    """A time as a person says it."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
