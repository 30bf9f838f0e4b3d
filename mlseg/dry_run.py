"""``--dry-run``: build everything, run each level once, say what a run would cost."""

import resource
import sys
import time
from collections.abc import Callable

import torch
from betty.problems import Problem as BettyProblem
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mlseg.commands import make_console
from mlseg.engines.engine import Engine

MIB = 2**20


def dry_run(engine: Engine) -> None:
    """Print the level graph, parameter counts, memory and the expected time; writes nothing."""
    console = make_console()
    console.print(graph(engine))
    console.print(sizes(engine))
    at_most = "at most, " if engine.total_iterations is None else ""
    table = Table("stage", "iterations", "s/iteration", f"{at_most}expected", title="Time")
    total, iterations = 0.0, 0
    for index in range(len(engine.stages)):
        engine.enter_stage(index)
        engine.train()
        for work in engine.work():
            period = max(map(_steps_to_top, engine.leaves), default=1) if work.whole else 1
            seconds = _time(work.once, period, engine.device)
            total += seconds * work.times
            iterations += work.times
            expected = _span(seconds * work.times)
            table.add_row(work.name, str(work.times), f"{seconds:.3f}", expected)
    table.add_row("all", str(iterations), "", _span(total))
    console.print(table)
    console.print(f"Peak memory: {_peak_memory(engine.device)}; validation and scoring come on top")


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


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / MIB:,.0f} MiB on the GPU"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return f"{peak / (MIB if sys.platform == 'darwin' else 1024):,.0f} MiB of the process"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
