"""The temperature k and the threshold that a grid search chose, kept in the runs they belong to.

``calibration.json`` of a run lists choices, each for certain checkpoints: its own alone, or those
of an ensemble, by the digests of the files. A run that is trained further has another digest, so a
choice never applies to weights that it wasn't made for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pydantic

from mlseg.errors import UserError
from mlseg.files import require_file, write_json
from mlseg.segmentation.trained import Ensemble

FILE = "calibration.json"


class Choice(pydantic.BaseModel):
    """What was chosen, for which weights, and how.

    Attributes:
        k: the temperature, by which the logits are divided.
        threshold: above it the mean probability means foreground.
        metric, value: what was maximised on the validation images, and its highest value.
        before: the value without the choice, at each network's k and the config's threshold.
        images: number of validation images.
        scored_at: the size at which they were counted.
        runs: names of the run directories.
        checkpoints: digests of their checkpoint files, sorted.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    k: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
    threshold: Annotated[float, pydantic.Field(gt=0, lt=1)]
    metric: str
    value: float
    before: float
    images: int
    scored_at: str
    runs: list[str]
    checkpoints: list[str]


def digests(ensemble: Ensemble) -> list[str]:
    """Of the members' checkpoint files, sorted."""
    return sorted(member.digest for member in ensemble.members)


def find(ensemble: Ensemble) -> Choice | None:
    """The choice made for exactly these weights together, or None.

    Raises:
        UserError: the file is damaged.
    """
    wanted = digests(ensemble)
    for choice in _read(ensemble.first.run):
        if choice.checkpoints == wanted:
            return choice
    return None


def keep(ensemble: Ensemble, choice: Choice) -> list[Path]:
    """Write the choice into each run, in place of one for the same weights; the files."""
    written = []
    for member in ensemble.members:
        others = [c for c in _read(member.run) if c.checkpoints != choice.checkpoints]
        path = member.run / FILE
        write_json(path, [c.model_dump() for c in [*others, choice]])
        written.append(path)
    return written


def calibrated(ensemble: Ensemble, k: float | None, threshold: float | None) -> Ensemble:
    """The ensemble with the k and threshold given, or else those chosen for it, or else its own.

    Raises:
        UserError: nothing says which of the runs' different thresholds to take.
    """
    choice = find(ensemble) if k is None and threshold is None else None
    if choice is not None:
        return ensemble.with_choice(choice.k, choice.threshold)
    if threshold is None:
        for member in ensemble.members:
            if member.threshold != ensemble.threshold:
                raise UserError(
                    f"{member.run}: its threshold is {member.threshold:g}, that of "
                    f"{ensemble.first.run} {ensemble.threshold:g}; choose one with --threshold or "
                    "by mlseg.calibrate"
                )
    return ensemble.with_choice(k, threshold)


def describe(ensemble: Ensemble) -> str:
    """How the ensemble decides, for a table's title."""
    ks = sorted({member.k for member in ensemble.members})
    flips = ", mean over flips and turns" if ensemble.flips else ""
    return f"k {', '.join(f'{k:.3g}' for k in ks)}, threshold {ensemble.threshold:g}{flips}"


def _read(run: Path) -> list[Choice]:
    path = run / FILE
    if not path.exists():
        return []
    try:
        require_file(path, 2**24)
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return [Choice.model_validate(entry) for entry in found]
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{path}: not a readable calibration; remove it and run mlseg.calibrate again"
        ) from None
