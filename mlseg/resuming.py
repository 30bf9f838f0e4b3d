"""Whether a run goes on, or is evaluated, with the config that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlseg import config
from mlseg.config.explaining import quoted
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.errors import UserError
from mlseg.problems.systems import AnyRunSettings, load_system

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
