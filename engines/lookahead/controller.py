"""LoAd's controller: when to go on, when to roll back, what to keep. Numbers in, commands out.

The controller knows no network. It is told the hold-out mIoU after every update and answers with
the commands that have to be carried out before the next number is due; the hook of
:mod:`mlseg.engines.lookahead.loop` carries them out on problems. Everything it remembers is in
:meth:`Lookahead.state_dict`.

Source: LoAd (Jamali-Rad, Szabo and Presutto, arXiv 2006.11227), algorithms 1 to 3. Where the
printed algorithm leaves a gap, this is how it is closed:

* A cycle starts from the start model: weights, BatchNorm buffers and optimizer state are restored.
  The text demands it, the printed algorithm has no such line.
* It starts with ``mu = mu_0 = mu_s = mu_*`` as well. Printed, ``mu`` keeps the value of the model
  that was left behind, and after a cycle that ended by divergence no cycle would update anything.
* All comparisons are strict, as printed. ``omega > Omega`` is printed too, where the text has
  "reaches": ``peak_rule`` offers both. Without a value for Omega (none is published) the search
  for a peak is that of algorithm 2.
* The thresholds ``mu_s - beta_l`` and ``mu_s + beta_u`` are those that held before the update:
  ``omega`` counts an update that beat the threshold even where it then restarts the search.
* The first entry of the buffer is always the start's, or the last peak's, and is never deleted; a
  full buffer gives up its oldest ending model (algorithm 1).
* After the last cycle the discriminator is not trained again: nothing would use it.
* An mIoU that is not finite ends the run (:class:`~mlseg.errors.RunError`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from mlseg.checkpoint import require_form
from mlseg.config import Settings
from mlseg.engines.lookahead.commands import Command, not_finite, note, snapshot


class LookaheadSettings(Settings):
    """Algorithm 3's constants; defaults from the paper's section 4.

    Attributes:
        cycles: Psi, consecutive cycles without a peak after which all is over.
        patience: Gamma, updates in a cycle (since its start, or since the last restart).
        peak_patience: Omega, updates above the upper threshold after which the search for a peak
            starts again from the present model; None: never, which is algorithm 2.
        peak_rule: whether their number has to exceed Omega, as printed, or to reach it.
        beta_l: fall of the mIoU, as a fraction, at which a cycle has diverged.
        beta_u: rise of the mIoU, as a fraction, that a peak must exceed.
        buffer_size: B_max, sets of label maps.
        on_peak: ``flush`` empties the buffer for a new peak; ``retain`` keeps the maps of
            ``retained_peaks`` earlier ones (the paper's future work).
        retained_peaks: the start model counts as one.
        momentum: what becomes of the stepper's optimizer when a cycle starts: ``restore`` puts its
            state back with the model, ``drop`` lets it start afresh.
    """

    cycles: PositiveInt = 50
    patience: PositiveInt = 50
    peak_patience: NonNegativeInt | None = None
    peak_rule: Literal["exceed", "reach"] = "exceed"
    beta_l: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    beta_u: Annotated[NonNegativeFloat, Field(le=1.0)] = 0.001
    buffer_size: Annotated[int, Field(ge=2, le=255)] = 3
    on_peak: Literal["flush", "retain"] = "flush"
    retained_peaks: PositiveInt = 1
    momentum: Literal["restore", "drop"] = "restore"

    @model_validator(mode="after")
    def _check(self) -> LookaheadSettings:
        if self.on_peak == "retain" and self.buffer_size < 2 + self.retained_peaks:
            raise ValueError(
                f"buffer_size: {self.buffer_size} sets can't hold a peak, an ending model and "
                f"{self.retained_peaks} earlier peaks; give {2 + self.retained_peaks} or more"
            )
        if self.peak_patience is None and self.peak_rule != "exceed":
            raise ValueError("peak_rule: there is no Omega to reach; set peak_patience as well")
        if self.on_peak == "flush" and self.retained_peaks != 1:
            raise ValueError("retained_peaks: a flush keeps none; set on_peak to retain as well")
        return self


class Lookahead:
    """Algorithm 3 as a state machine.

    Models are named ``g0`` (the start), ``g1``, ``g2``, ... by the number of updates that have been
    made before them, over all cycles.

    Args:
        settings: its constants.

    Attributes:
        updates: made so far.
        cycle: the present one, counted from 1; 0 before the first.
        psi: consecutive cycles without a peak.
        gamma, omega: updates, and updates above the threshold, since the cycle's start or restart.
        mu, mu_0, mu_s, mu_p: mIoU of the present model, of the one the cycle started from, of the
            start model (moved by a restart) and of the best of the cycle.
        buffer: names of the models whose maps are in the buffer.
    """

    def __init__(self, settings: LookaheadSettings) -> None:
        self.settings = settings
        self.updates = 0
        self.cycle = 0
        self.psi = 0
        self.gamma = 0
        self.omega = 0
        self.mu = self.mu_0 = self.mu_s = self.mu_p = math.nan
        self.start = "g0"
        self.peak: str | None = None
        self.buffer: list[str] = []
        self.retained = 0
        """How many entries after the first are earlier peaks."""
        self.stopped = False

    @property
    def best(self) -> tuple[str, float]:
        """The best model accepted so far: the peak of this cycle, or the model it started from."""
        if self.peak is not None:
            return self.peak, self.mu_p
        return self.start, self.mu_0

    @property
    def longest(self) -> tuple[int, int]:
        """Updates and cycles of a run without a peak in which no cycle diverges."""
        return self.settings.cycles * self.settings.patience, self.settings.cycles

    def begin(self) -> list[Command]:
        """Ask for the start model's mIoU."""
        return [Command("evaluate")]

    def observe(self, mu: float) -> list[Command]:
        """Take the mIoU that was asked for.

        Raises:
            RunError: it is not finite.
        """
        assert not self.stopped
        if not math.isfinite(mu):
            raise not_finite(mu, self.updates, self.cycle, self.best)
        if self.cycle == 0:
            return self._init(mu)
        commands = self._after_step(mu)
        floor = self.mu_s - self.settings.beta_l
        if floor < self.mu and self.gamma < self.settings.patience:
            return [*commands, Command("step")]
        return commands + self._end("patience" if floor < self.mu else "divergence")

    # --------------------------------------------------------------- transitions

    def _init(self, mu: float) -> list[Command]:
        self.mu = self.mu_0 = self.mu_s = self.mu_p = mu
        self.buffer = [self.start]
        return [
            snapshot("start", self.start, mu),
            note("start", model=self.start, miou=mu),
            Command("append", {"label": self.start, "position": 0}),
            Command("train"),
            *self._cycle(),
        ]

    def _cycle(self) -> list[Command]:
        """A cycle from the start model, which is the present one."""
        self.cycle += 1
        self.mu = self.mu_0 = self.mu_p = self.mu_s
        self.gamma = self.omega = 0
        self.peak = None
        return [
            note("cycle", cycle=self.cycle, model=self.start, miou=self.mu, psi=self.psi),
            Command("step"),
        ]

    def _after_step(self, mu: float) -> list[Command]:
        self.updates += 1
        self.mu = mu
        name, threshold = f"g{self.updates}", self.mu_s + self.settings.beta_u
        where = {"cycle": self.cycle, "update": self.updates, "miou": mu}
        # Copies come before notes, whose writing may fail: what has been found is kept.
        copies: list[Command] = []
        notes = [note("update", **where, gamma=self.gamma, omega=self.omega)]
        if mu > threshold:
            if mu > self.mu_p:
                copies.append(snapshot("peak", name, mu))
                notes.append(note("peak", **where, threshold=threshold, before=self.mu_p))
                self.mu_p, self.peak = mu, name
            if self._search_is_over():
                copies.append(snapshot("start", name, mu))
                notes.append(note("restart", **where, before=self.mu_s, omega=self.omega))
                self.mu_s, self.start = mu, name
                self.omega = self.gamma = 0
            self.omega += 1
        self.gamma += 1
        return copies + notes

    def _search_is_over(self) -> bool:
        limit = self.settings.peak_patience
        if limit is None:
            return False
        return self.omega > limit or (self.settings.peak_rule == "reach" and self.omega == limit)

    def _end(self, reason: str) -> list[Command]:
        ending, before = f"g{self.updates}", list(self.buffer)
        # The peak's snapshot is the start's from here on, before anything that takes time.
        promotion = [] if self.peak is None else [Command("promote")]
        if self.peak is not None:
            commands = self._end_with(self.peak, ending)
        else:
            commands = self._end_without(ending)
        end = note(
            "cycle_end",
            cycle=self.cycle,
            reason=reason,
            update=self.updates,
            ending=ending,
            miou=self.mu,
            peak=self.peak,
            peak_miou=None if self.peak is None else self.mu_p,
            psi=self.psi,
            buffer_before=before,
            buffer_after=list(self.buffer),
        )
        self.peak = None
        if self.psi == self.settings.cycles:
            self.stopped = True
            stop = {"updates": self.updates, "cycles": self.cycle}
            last = note("stop", **stop, model=self.start, miou=self.mu_s)
            return [*promotion, end, *commands, last, Command("stop")]
        return [*promotion, end, *commands, Command("train"), *self._cycle()]

    def _end_with(self, peak: str, ending: str) -> list[Command]:
        """A peak: it becomes the start; the buffer holds its maps and the ending model's."""
        keep: list[int] = []
        if self.settings.on_peak == "retain":
            peaks = 1 + self.retained
            keep = list(range(min(peaks, self.settings.retained_peaks)))
        self.retained = len(keep)
        self.buffer = [peak, *(self.buffer[place] for place in keep), ending]
        self.start, self.mu_s, self.mu_0 = peak, self.mu_p, self.mu_p
        self.psi = 0
        # The ending model's maps come before the roll-back, while it is the present model.
        return [
            Command("flush", {"keep": keep}),
            Command("append", {"label": ending, "position": len(keep)}),
            *self._roll_back(),
            Command("append", {"label": peak, "position": 0}),
        ]

    def _end_without(self, ending: str) -> list[Command]:
        """No peak: back to where the cycle started, the ending model's maps in the buffer."""
        commands = []
        if len(self.buffer) == self.settings.buffer_size:
            oldest = 1 + self.retained
            commands.append(Command("delete", {"position": oldest}))
            del self.buffer[oldest]
        commands.append(Command("append", {"label": ending, "position": len(self.buffer)}))
        self.buffer.append(ending)
        self.mu_s = self.mu_0
        self.psi += 1
        return [*commands, *self._roll_back()]

    def _roll_back(self) -> list[Command]:
        back = note("rollback", cycle=self.cycle, model=self.start, miou=self.mu_s)
        return [Command("restore"), back]

    # --------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Every attribute but the settings."""
        state = {key: value for key, value in vars(self).items() if key != "settings"}
        return state | {"buffer": list(self.buffer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        require_form(self.state_dict(), state, "controller")
        vars(self).update(state)
        self.buffer = list(state["buffer"])
