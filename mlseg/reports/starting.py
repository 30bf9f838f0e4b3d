"""How a run was started: ``starts.json``, an entry for each time that it was, or went on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mlseg.config import Tree
from mlseg.config.loading import COMMAND_LINE
from mlseg.errors import unharmed
from mlseg.files import write_json
from mlseg.machine import describe

STARTS = "starts.json"


def note_start(
    directory: Path, command: str | None, tree: Tree, device: torch.device, step: int
) -> None:
    """Add an entry: command, date, step, machine, revision, and what the config sets itself.

    Nothing depends on the file; a failure to write it is a line on stderr.

    Args:
        command: None where the run was started from within another program.
        step: at which the run goes on; 0 for a new one.
    """
    path = directory / STARTS
    with unharmed(STARTS):
        entry = {
            "command": command,
            "folder": str(Path.cwd()),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "step": step,
            "config": tree.source,
            "set": own_values(tree, resumed=step > 0),
            "machine": describe(device),
        }
        write_json(path, [*_former(path), entry])


def own_values(tree: Tree, resumed: bool = False) -> dict[str, dict[str, Any]]:
    """What the command line and the config's own file set, by place and dotted key.

    Everything else is the base's, or a default.

    Args:
        resumed: the file is the run's own ``config.yaml``, which says everything.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, value in _leaves(tree.values, ()):
        place = tree.where(path)
        if place != COMMAND_LINE:
            place = place.rpartition(":")[0]
            if resumed or place != tree.source:
                continue
        found.setdefault(place, {})[".".join(path)] = value
    return found


def _leaves(values: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), value


def _former(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
