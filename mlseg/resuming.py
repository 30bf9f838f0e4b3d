"""What a run goes on from: its checkpoint, the config and the threads that it was trained with."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlseg import checkpoint, config, parallel, threads
from mlseg.config.explaining import quoted
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.errors import UserError
from mlseg.problems.systems import AnyRunSettings, load_system, parse_run
from mlseg.segmentation.trained import begun_with

SHOWN = 6
"""Changed keys that a message names."""


class TrainedWith(Hooks):
    """Every checkpoint holds the config that it was made with.

    Args:
        settings: the run's.
    """

    def __init__(self, settings: AnyRunSettings) -> None:
        self.values = settings.model_dump(mode="json")

    def description(self, engine: Engine) -> dict[str, Any]:
        """The config, as plain values."""
        return {"config": self.values}


def require_unchanged(
    settings: AnyRunSettings, tree: config.Tree, trained_with: Any, path: Path
) -> None:
    """Check that a config differs from the one of a checkpoint only where it may.

    Args:
        settings: made of ``tree``.
        trained_with: what the checkpoint holds; None for one that doesn't say.
        path: the checkpoint, for errors.

    Raises:
        UserError: something else is different, key by key; or the checkpoint holds no config.
    """
    if trained_with is None:
        return
    if not isinstance(trained_with, Mapping):
        raise UserError(f"{path}: its config is {quoted(trained_with)}; start the run again")
    before: Any = dict(trained_with)
    if before.get("system") == settings.system:  # keys that are new since then have their defaults
        before = config.parse(
            load_system(settings.system).settings, config.Tree(before, source=f"{path}: config")
        ).model_dump(mode="json")
    refuse_changes(before, settings.model_dump(mode="json"), tree, settings.resumable)


def require_untouched(run: Path, trained_with: Any) -> None:
    """Check that a run's ``config.yaml`` is the one of its checkpoint, but for what may change.

    Nothing that it names is looked up, so that a foreign run imports nothing.

    Args:
        trained_with: what the checkpoint holds; None for one that doesn't say.

    Raises:
        UserError: it differs, key by key.
    """
    if trained_with is not None:
        tree = config.load(run / "config.yaml")
        refuse_changes(trained_with, tree.values, tree, AnyRunSettings.resumable)


def refuse_changes(before: Any, now: Any, tree: config.Tree, may_change: Sequence[str]) -> None:
    """Raise UserError where plain values differ and may not; ``now`` are those of ``tree``."""
    changed = [
        key
        for key in config.differences(before, now)
        if not any(f"{key}.".startswith(f"{free}.") for free in may_change)
    ]
    if not changed:
        return
    told = [
        f"{key} differs ({quoted(_at(now, key))}, was {quoted(_at(before, key))})"
        for key in changed[:SHOWN]
    ]
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    raise UserError(
        f"{tree.where(changed[0])}: {', '.join(told)}{more}: not what the run was made with; put "
        f"that back, or start a new run (may change: {', '.join(may_change)})"
    )


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def saved_state(directory: Path) -> dict[str, Any] | None:
    """What a run goes on from; None for one that hasn't saved anything yet."""
    folder = directory / "checkpoints"
    if any((folder / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
        return checkpoint.load(folder / checkpoint.LAST)
    return None


def chosen_threads(
    arguments: argparse.Namespace, settings: AnyRunSettings
) -> tuple[threads.Threads, str | None]:
    """How many threads, and what a resumed run has to say of it: their number changes sums.

    A resumed run goes on with as many as it began with, unless its command says otherwise.
    """
    fitting = threads.choose(settings.work(), parallel.local_size())
    chosen = fitting
    if settings.threads != "auto":
        by = "config" if arguments.threads is None else "--threads"
        chosen = threads.Threads(settings.threads, by)
    if arguments.resume is None:
        return chosen, None
    before = begun_with(arguments.resume)
    asked = any(override.startswith("threads=") for override in arguments.overrides)
    if not asked and settings.threads in ("auto", before):
        return fitting if fitting.number == before else threads.Threads(before, "run"), None
    if chosen.number == before:
        return chosen, None
    return chosen, (
        f"It began with {before} and goes on with {chosen.number} threads: its figures may differ "
        "in the last digits from those of a run that kept them"
    )


def resumed(arguments: argparse.Namespace) -> config.Tree:
    """The config stored in the run; what may differ from it is in its settings' ``resumable``."""
    if arguments.out is not None:
        raise UserError("--out: a resumed run stays in its directory; drop it")
    path = arguments.resume / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume: {arguments.resume} is no run directory (it has no config.yaml)")
    stored = config.load(path, [] if arguments.config else arguments.overrides)
    original = config.load(path)
    if arguments.config is not None:
        given = config.load(arguments.config, arguments.overrides)
        given.values.setdefault("threads", original.values.get("threads", "auto"))
        settings, _ = parse_run(given)
        stored = config.Tree(settings.model_dump(mode="json"), given.origins, given.source)
    before = parse_run(original)[0].model_dump(mode="json")
    settings, _ = parse_run(stored)
    refuse_changes(before, settings.model_dump(mode="json"), stored, settings.resumable)
    return stored
