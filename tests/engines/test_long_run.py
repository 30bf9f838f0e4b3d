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
PROFILED = (9, 12, 18)
"""Between these iterations the allocator is listened to. The first stretch counts for nothing: the
release of older blocks isn't seen in it. The second holds whole epochs, and no validation."""


class Watch(Hooks):
    """Counts at two iterations, and what the allocator has handed out between two others.

    Args:
        first: the iteration of the first count, when all caches are full.
        last: that of the second.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.counts: list[dict[str, int]] = []
        self.held = 0
        self._profiler: Any = None

    def stepped(self, engine: Engine) -> None:
        step = engine.global_step
        if step in PROFILED[1:]:
            self._profiler.__exit__(None, None, None)
            events = self._profiler.kineto_results.events()
            self.held = sum(event.nbytes() for event in events if event.name() == "[memory]")
        if step in PROFILED[:-1]:
            self._profiler = profile(use_cpu=True, profile_memory=True)
            self._profiler.__enter__()
        if step == self.first:
            counts()  # counting itself makes an object for every tensor's storage
        if step in (self.first, self.last):
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
    """A run with all its records; a validation lies before the counts, another between them."""
    changes: dict[str, Any] = {
        "engine.validate_every": 30,
        "engine.checkpoint_every": 10,
        "engine.tensorboard": True,
    }
    watch = Watch(36, 62)
    if looks_ahead(system):  # ends by itself, and has a buffer to fill
        watch = Watch(210, 310)
        changes |= {"lookahead.cycles": 20, "lookahead.patience": 50}
    else:
        changes["engine.iterations"] = watch.last
    engine = tiny.build(system, changes, out)
    engine.hooks.extend([*more, watch])
    engine.run()
    return watch


def looks_ahead(system: str) -> bool:
    """Whether a system's iterations come in phases that differ."""
    return "lookahead" in tiny.values(system)


def leaks(watch: Watch) -> list[str]:
    """What has grown."""
    first, last = watch.counts
    grown = [key for key in first if key != "objects" and last[key] > first[key]]
    # A validation's records may stay; what leaks in every iteration adds one object at least.
    if last["objects"] - first["objects"] >= watch.last - watch.first:
        grown.append("objects")
    return grown + (["allocator"] if watch.held > 0 else [])


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("system", SYSTEMS)
def test_nothing_grows(tmp_path: Path, system: str) -> None:
    watch = watched(system, tmp_path)
    found = leaks(watch)
    if looks_ahead(system):  # what the profile saw was another phase
        found = [what for what in found if what != "allocator"]
    assert not found, (watch.counts, watch.held)


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
