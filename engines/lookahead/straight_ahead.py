"""LoAd's control: updates in a row, without a roll-back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlseg.checkpoint import require_form
from mlseg.engines.lookahead.commands import Command, not_finite, note, snapshot


class StraightAhead:
    """Without lookahead: a given number of updates in a row, the best on the hold-out kept.

    No rollback, no buffer; as many evaluations to choose from as the lookahead has had. LoAd's
    control, and plain alternating descent and ascent.

    Args:
        length: number of updates.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.updates = 0
        self.cycle = 0
        self.mu_best = math.nan
        self.name = "g0"

    @property
    def best(self) -> tuple[str, float]:
        """The best so far."""
        return self.name, self.mu_best

    @property
    def longest(self) -> tuple[int, int]:
        """All updates, in one cycle."""
        return self.length, 1

    def begin(self) -> list[Command]:
        """Ask for the start model's mIoU."""
        return [Command("evaluate")]

    def observe(self, mu: float) -> list[Command]:
        """Take the mIoU that was asked for.

        Raises:
            RunError: it is not finite.
        """
        if not math.isfinite(mu):
            raise not_finite(mu, self.updates, self.cycle, self.best)
        if self.cycle == 0:
            self.cycle, self.mu_best = 1, mu
            return [
                snapshot("start", "g0", mu),
                note("start", model="g0", miou=mu),
                Command("step"),
            ]
        self.updates += 1
        where = {"cycle": self.cycle, "update": self.updates, "miou": mu}
        commands = [note("update", **where)]
        if mu > self.mu_best:
            commands.append(note("peak", **where, before=self.mu_best))
            self.name, self.mu_best = f"g{self.updates}", mu
            commands.insert(0, snapshot("start", self.name, mu))
        if self.updates < self.length:
            return [*commands, Command("step")]
        stop = {"updates": self.updates, "model": self.name, "miou": self.mu_best}
        return [*commands, Command("restore"), note("stop", **stop), Command("stop")]

    def state_dict(self) -> dict[str, Any]:
        """Every attribute."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        require_form(self.state_dict(), state, "controller")
        vars(self).update(state)
