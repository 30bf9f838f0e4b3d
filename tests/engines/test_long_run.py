"""A run of many iterations holds as much at its end as at its beginning.

Counted exactly, since the process's size would hide a leak of some hundred iterations: tensors and
their bytes, what the allocator hands out (also to what only autograd's graph holds, which no Python
object shows), open files, threads, Python's objects.
"""

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from mlseg import Hooks
from mlseg.engines.engine import Engine

SYSTEMS = ["supervised", *sorted(path.parent.name for path in tiny.PLACE.glob("*/tiny.yaml"))]
WINDOW = 24
"""Iterations between the two counts."""


class Watch(Hooks):
    """Counts at two iterations, and what the allocator has handed out between two others.

    Args:
        first: the iteration of the first count, when all caches are full.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.counts: list[dict[str, int]] = []
        self.held = 0
        self._profiler: Any = None

    def stepped(self, engine: Engine) -> None:
        step = engine.global_step
        if step in (12, 20):
            self._profiler.__exit__(None, None, None)
            events = self._profiler.kineto_results.events()
            self.held = sum(event.nbytes() for event in events if event.name() == "[memory]")
        if step in (10, 12):  # twice: the first time no block's release is seen that is older
            self._profiler = profile(use_cpu=True, profile_memory=True)
            self._profiler.__enter__()
        if step in (self.first, self.first + WINDOW):
            self.counts.append(counts())


def counts() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if issubclass(type(o), Tensor)]  # asks no lazy module
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "objects": len(objects),
        "tensors": len(tensors),
        "bytes": sum(storages.values()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def watched(system: str, out: Path, *more: Hooks) -> Watch:
    """A run with all its records, of which at least one validation lies between the counts."""
    changes: dict[str, Any] = {
        "engine.validate_every": 20,
        "engine.checkpoint_every": 10,
        "engine.tensorboard": True,
    }
    first = 24
    if "lookahead" in tiny.values(system):  # ends by itself, and has snapshots to fill
        first = 110
        changes |= {"lookahead.cycles": 12, "lookahead.patience": 50}
    else:
        changes["engine.iterations"] = first + WINDOW
    watch = Watch(first)
    engine = tiny.build(system, changes, out)
    engine.hooks = [*engine.hooks, *more, watch]
    engine.run()
    return watch


def leaks(watch: Watch) -> list[str]:
    """What has grown."""
    first, last = watch.counts
    grown = [key for key in first if key != "objects" and last[key] > first[key]]
    # A validation's records may stay; what leaks in every iteration adds one object at least.
    if last["objects"] - first["objects"] >= WINDOW:
        grown.append("objects")
    return grown + (["allocator"] if watch.held > 0 else [])


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("system", SYSTEMS)
def test_nothing_grows(tmp_path: Path, system: str) -> None:
    watch = watched(system, tmp_path)
    assert not leaks(watch), (watch.counts, watch.held)


class Keeps(Hooks):
    """A leak of one thing an iteration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.kept: list[Any] = []

    def stepped(self, engine: Engine) -> None:
        if self.kind == "objects":
            self.kept.append([engine.global_step])
        elif self.kind == "files":
            self.kept.append(os.open(os.devnull, os.O_RDONLY))
        else:
            x = torch.zeros(1, requires_grad=True)
            self.kept.append((x * 2).grad_fn if self.kind == "allocator" else x)


@pytest.mark.parametrize("kind", ["objects", "files", "tensors", "allocator"])
def test_a_leak_is_seen(tmp_path: Path, kind: str) -> None:
    keeps = Keeps(kind)
    assert kind in leaks(watched("supervised", tmp_path, keeps))
    for kept in keeps.kept if kind == "files" else ():
        os.close(kept)
