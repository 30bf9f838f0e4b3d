"""An engine in several processes: what can't run so, how they begin, what each has to keep."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mlseg import parallel
from mlseg.errors import RunError, UserError
from mlseg.multilevel import sharing
from mlseg.multilevel.problem import Problem

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine

Place = tuple[str, ...]
"""Of an entry in a state."""

_SHARED = ("module", "optimizer", "scheduler")
"""What of a level is the same in all processes."""


def check(engine: Engine) -> None:
    """Refuse a program that several processes can't train together.

    Raises:
        UserError: with the mend.
    """
    if not parallel.several():
        return
    if engine._as_on_betty:
        raise UserError(
            f"{parallel.size()} processes: an engine with a config of Betty's runs in one; give it "
            "mlseg.EngineSettings, or run it on Betty's engine with its strategy 'distributed'"
        )
    if engine.env is not None:
        raise UserError(f"{parallel.size()} processes: an env of Betty's is stepped in one alone")
    for problem in engine.problems:
        if not isinstance(problem, Problem) or problem.method is None:
            raise UserError(
                f"problem {problem.name!r}: plain Betty's, which {parallel.size()} processes can't "
                "train together here; derive it from mlseg.Problem, with an mlseg.Config"
            )


def begin(engine: Engine) -> None:
    """All processes start from the first one's weights, and draw for themselves from here on."""
    if parallel.several():
        modules = {id(p.module): p.module for p in engine.problems}.values()
        for module in modules:
            parallel.copy_from_first([*module.parameters(), *module.buffers()])
    sharing.part_streams()


# ---------------------------------------------------------------------------- states


def joined(state: dict[str, Any]) -> dict[str, Any]:
    """A state with what every other process has of its own: random states, shares of batches.

    Raises:
        RunError: weights, buffers or optimizers aren't the same any more.
    """
    if not parallel.several():
        return state
    entries = _entries(state)
    digests = {place: _digest(value) for place, value in entries.items()}
    first = parallel.from_first(digests)
    differ = [place for place, digest in digests.items() if first.get(place) != digest]
    for all_of_them in parallel.gather(differ):
        for place in all_of_them:
            if place[0] == "problems" and place[2] in _SHARED:
                raise RunError(
                    f"the {place[2]} of problem {place[1]!r} isn't the same any more in all "
                    "processes: a step of it goes by what differs between them; let it go by the "
                    "batch, the parameters and torch's generators alone"
                )
    own = [(list(place), entries[place]) for place in differ]
    return {**state, "processes": parallel.gather(own), "shared_draws": sharing.draws()}


def own(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`joined`: a saved state as this process goes on from it.

    Raises:
        UserError: it was saved by another number of processes.
    """
    count = len(state.get("processes", [None]))
    if count != parallel.size():
        by = "one process" if count == 1 else f"{count} processes"
        how = "without torchrun" if count == 1 else f"under torchrun, with {count} processes in all"
        raise UserError(f"saved by {by}, and this run has {parallel.size()}; go on {how}")
    found: dict[str, Any] = dict(state)
    if count == 1:
        return found
    for place, value in state["processes"][parallel.rank()]:
        if len(place) == 1:
            found[place[0]] = value
        else:
            kind, name, key = place
            found[kind] = {**found[kind], name: {**found[kind][name], key: value}}
    return found


def _entries(state: Mapping[str, Any]) -> dict[Place, Any]:
    found: dict[Place, Any] = {("random_state",): state["random_state"]}
    for kind in ("problems", "hooks"):
        for name, values in state[kind].items():
            found |= {(kind, name, key): value for key, value in values.items()}
    return found


def _digest(value: Any) -> bytes:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, Mapping):
        digest.update(b"{")
        for key, part in value.items():
            digest.update(repr(key).encode())
            _feed(digest, part)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())


# --------------------------------------------------------------------------- figures


def mean_figures(values: Mapping[Any, float]) -> dict[Any, float]:
    """Figures of shares of batches as those of the whole ones: their mean over all processes."""
    if not parallel.several():
        return dict(values)
    everybody = parallel.gather(dict(values))
    return {
        key: sum(there) / len(there)
        for key in values
        if (there := [figures[key] for figures in everybody if key in figures])
    }


def first_steps(steps: list[int]) -> list[int]:
    """Of each of some things, the first step at which any process has seen it."""
    if not parallel.several():
        return steps
    return [min(seen) for seen in zip(*parallel.gather(steps), strict=True)]
