"""A run of many iterations holds as much at its end as at its beginning.

Counted exactly, since the process's size would hide a leak of some hundred iterations: tensors and
their bytes, open files, threads. What other tests of the same process have left stays as it is.
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
from torch._subclasses import FakeTensor

from mlseg import Hooks
from mlseg.engines.engine import Engine

SYSTEMS = ["supervised", *sorted(path.parent.name for path in tiny.PLACE.glob("*/tiny.yaml"))]


class Watch(Hooks):
    """Counts at two iterations.

    Args:
        first: the iteration of the first count, when all caches are full.
        last: that of the second.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.counts: list[dict[str, int]] = []

    def stepped(self, engine: Engine) -> None:
        if engine.global_step in (self.first, self.last):
            self.counts.append(counts())


def counts() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    # By its type, which asks no lazy module. What a dry run has left has no memory to count.
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    tensors = [t for t in found if not isinstance(t, FakeTensor) and t.device.type != "meta"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
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
    if "lookahead" in tiny.values(system):  # ends by itself, and has a buffer to fill
        watch = Watch(60, 90)
        changes |= {"lookahead.cycles": 60, "lookahead.patience": 12}
    else:
        changes["engine.iterations"] = watch.last
    engine = tiny.build(system, changes, out)
    engine.hooks.extend([*more, watch])
    engine.run()
    return watch


def leaks(watch: Watch) -> list[str]:
    """What has grown."""
    first, last = watch.counts
    return [key for key in first if last[key] > first[key]]


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("system", SYSTEMS)
def test_nothing_grows(tmp_path: Path, system: str) -> None:
    watch = watched(system, tmp_path)
    assert not leaks(watch), watch.counts


class Keeps(Hooks):
    """A leak of one thing an iteration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.kept: list[Any] = []

    def stepped(self, engine: Engine) -> None:
        files = self.kind == "files"
        self.kept.append(os.open(os.devnull, os.O_RDONLY) if files else torch.zeros(1))


@pytest.mark.parametrize("kind", ["files", "tensors"])
def test_a_leak_is_seen(tmp_path: Path, kind: str) -> None:
    keeps = Keeps(kind)
    assert kind in leaks(watched("supervised", tmp_path, keeps))
    for kept in keeps.kept if kind == "files" else ():
        os.close(kept)
