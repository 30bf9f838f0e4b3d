"""A run that is interrupted and resumed, compared with the one that nobody touched."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.interruption import Interrupted

Make = Callable[[Path], Engine]


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved after it."""


def stop_after(engine: Engine, step: int, how: str) -> None:
    """Have ``engine`` stop in the iteration ``step``: by SIGTERM, or dead on the spot."""
    former = engine.train_step

    def train_step() -> None:
        former()
        if engine.global_step == step:
            if how == "killed":
                raise Killed
            signal.raise_signal(signal.SIGTERM)

    engine.train_step = train_step  # type: ignore[method-assign]


def ending(engine: Engine, out: Path) -> dict[str, Any]:
    """What must not depend on whether the run was interrupted."""
    state = checkpoint.load(out / "checkpoints" / "last.pt")
    del state["engine"]["seconds"]
    state["records"].pop("offsets")
    files = ("events.jsonl", "architecture.json")
    return {
        "state": state,
        "weights": tiny.weights(engine),
        "metrics": tiny.untimed((out / "metrics.jsonl").read_text()),
        "records": {f: (out / f).read_text() for f in files if (out / f).exists()},
        "best": engine.best,
    }


def check(make: Make, tmp_path: Path, stops: list[int], how: str) -> None:
    """Run through, run with a stop at each of ``stops``, compare."""
    engine = make(tmp_path / "through")
    engine.run()
    expected = ending(engine, tmp_path / "through")
    out = tmp_path / "stopped"
    engine = make(out)
    for stop in stops:
        stop_after(engine, stop, how)
        with pytest.raises(Killed if how == "killed" else Interrupted):
            engine.run()
        engine = make(out)
        if (out / "checkpoints" / "last.pt").exists():
            torch.manual_seed(99)  # a new process knows nothing of the old one's generators
            engine.resume(out)
    engine.run()
    found = ending(engine, out)
    for key in ("records", "best", "weights"):
        assert tiny.same(found[key], expected[key]), key
    for key, value in expected["state"].items():
        assert tiny.same(found["state"][key], value), key
