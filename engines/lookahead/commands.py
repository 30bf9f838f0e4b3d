"""What a controller answers with, and what the engine asks of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mlseg.errors import RunError

Action = Literal[
    "evaluate", "step", "snapshot", "promote", "restore", "flush", "delete", "append", "train",
    "note", "stop",
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """Something to carry out.

    =========  ====================================================================================
    action     values
    =========  ====================================================================================
    evaluate   score the present model on the hold-out; the controller waits for the number
    step       one update of the present model, then evaluate; the controller waits for the number
    snapshot   ``slot``: copy the present model and its optimizer into "start" or "peak"; ``model``,
               ``miou``: its name and score
    promote    the peak's snapshot becomes the start's
    restore    put the start's snapshot back
    flush      ``keep``: positions in the buffer that stay, in this order
    delete     ``position`` in the buffer
    append     ``label``, ``position``: maps of all images by the present model
    train      train the discriminator to early stopping
    note       ``event`` and its values, for the records
    stop       nothing is left to do; the present model is the result
    =========  ====================================================================================
    """

    action: Action
    values: Mapping[str, Any] = field(default_factory=dict)


class Controller(Protocol):
    """What the engine asks of a controller."""

    updates: int
    cycle: int

    def begin(self) -> list[Command]:
        """Commands up to the first number."""

    def observe(self, mu: float) -> list[Command]:
        """Commands that follow from the number asked for, up to the next."""

    @property
    def best(self) -> tuple[str, float]:
        """Name and mIoU of the best model accepted so far."""

    @property
    def longest(self) -> tuple[int, int]:
        """Updates and cycles of a run without a peak in which no cycle diverges."""

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


def not_finite(mu: float, updates: int, cycle: int, best: tuple[str, float]) -> RunError:
    """The error for a hold-out mIoU that isn't finite; ``best``: name and mIoU of a model."""
    if cycle == 0:
        return RunError(f"the hold-out mIoU of the start model is {mu}; check the start model")
    return RunError(
        f"the hold-out mIoU is {mu} after update {updates + 1} (cycle {cycle}); the best model so "
        f"far, {best[0]} with {best[1]:.4f}, is kept; try a lower learning rate"
    )


def snapshot(slot: str, model: str, miou: float) -> Command:
    """Of the present model."""
    return Command("snapshot", {"slot": slot, "model": model, "miou": miou})


def note(event: str, **values: Any) -> Command:
    """For the records."""
    return Command("note", {"event": event, **values})
