"""Grids of runs that train for a moment."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from mlseg import sweep
from mlseg.workers import Here

QUICK = {"engine.iterations": 2, "engine.validate_every": 1, "data.train": 4, "data.val": 2}
GRID: dict[str, Any] = {
    "title": "Two rows",
    "configs": {"plain": "tiny.yaml"},
    "axes": {
        "row": {
            "off": {"overrides": {"augmentation": "off"}},
            "flip": {"overrides": {"augmentation": "flip"}},
        },
    },
    "seeds": [0, 1],
}


def changed(changes: dict[Any, Any]) -> dict[str, Any]:
    """The grid with some of its keys set, by dotted key; a key with dots of its own as a tuple."""
    grid = copy.deepcopy(GRID)
    for key, value in changes.items():
        *above, last = key if isinstance(key, tuple) else key.split(".")
        place = grid
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return grid


def write(folder: Path, changes: dict[Any, Any] | None = None, more: Any = None) -> Path:
    """A grid's file, and beside it the config that it names."""
    tiny.write_config(folder / "tiny.yaml", changes={**QUICK, **(more or {})})
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(changed(changes or {}), sort_keys=False), encoding="utf-8")
    return path


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a sweep run its cells here, one after the other."""
    monkeypatch.setattr(sweep, "make_pool", lambda *_, **__: Here())
