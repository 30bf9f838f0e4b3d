"""Stage 1 until it has converged: the start that published models are, and the lookahead needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from mlseg.checkpoint import require_form
from mlseg.config import Settings
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks, Work
from mlseg.engines.lookahead.hold_out import HoldOut
from mlseg.engines.snapshot import Snapshot
from mlseg.errors import RunError
from mlseg.multilevel.problem import Problem

CROSS_ENTROPY = "cross_entropy"


class ConvergenceSettings(Settings):
    """When stage 1 is over, beyond its own epochs.

    Attributes:
        epochs: further ones in which the mIoU on the validation split has to gain.
        gain: as a fraction; with less it has converged.
    """

    epochs: PositiveInt = 100
    gain: Annotated[float, Field(ge=1e-4, le=1.0)] = 0.001

    def longest(self) -> int:
        """Epochs at most: an mIoU of 1 is the end of any gain."""
        return self.epochs * (math.ceil(1 / self.gain) + 1)


class Convergence(Hooks):
    """Ends stage 1 when a number of further epochs has gained too little, at the best model.

    After each epoch the mIoU on all validation images is taken. A gain is measured from the best
    model that last gained enough.

    Args:
        problem: of stage 1.
        validation: its images.
        epoch: steps of one.
        least: steps of stage 1 in any case.
        settings: when it is over.
    """

    name = "convergence"

    def __init__(
        self,
        problem: Problem,
        validation: HoldOut,
        epoch: int,
        least: int,
        settings: ConvergenceSettings,
    ) -> None:
        self.problem = problem
        self.validation = validation
        self.epoch = epoch
        self.least = least
        self.settings = settings
        self.best = Snapshot(problem.module, problem.optimizer)
        self._highest = -math.inf
        self._mark = -math.inf
        """What the last gain that was enough led to."""
        self._since = 0
        """Epochs after that."""
        self._epochs = 0
        """Epochs of stage 1, once it is over."""

    def start(self, engine: Engine) -> None:
        """End a stage again that had ended when its checkpoint was written."""
        if self._epochs and engine._stage.name == CROSS_ENTROPY:
            engine._stage.iterations = engine._stage_step

    def stepped(self, engine: Engine) -> None:
        """Look, at the end of an epoch."""
        step = engine._stage_step
        if engine._stage.name != CROSS_ENTROPY or step % self.epoch:
            return
        miou = self.validation.miou(self.problem.module)
        if not math.isfinite(miou):
            raise RunError(
                f"the validation mIoU of stage 1 is {miou} after {step} steps; try a lower "
                "problems.pretraining.optimizer.lr"
            )
        engine._recorder.log(engine.global_step, {"convergence": {"miou": miou}}, {})
        if miou > self._highest:
            self._highest = miou
            self.best.take({"miou": miou, "step": engine.global_step})
        if step <= self.least or miou >= self._mark + self.settings.gain:
            self._mark, self._since = self._highest, 0
        else:
            self._since += 1
        if self._since >= self.settings.epochs:
            self._end(engine, step)

    def _end(self, engine: Engine, step: int) -> None:
        self._epochs = step // self.epoch
        assert self.best.about is not None
        figures = {"epochs": self._epochs, "best_step": self.best.about["step"]}
        engine._recorder.event("converged", engine.global_step, miou=self._highest, **figures)
        self.best.restore()
        engine._stage.iterations = step

    def work(self, engine: Engine) -> list[Work] | None:
        """Stage 1 as long as it is at least."""
        if engine._stage.name != CROSS_ENTROPY:
            return None
        steps = self.least + self.settings.epochs * self.epoch
        return [Work("cross_entropy, at least", steps, engine.iterate, whole=True)]

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """How long stage 1 was."""
        found = {"epochs": self._epochs, "miou": self._highest} if self._epochs else None
        return {"convergence": found}

    def state_dict(self) -> dict[str, Any]:
        """What it has seen; the best model as long as stage 1 goes on."""
        return {
            "highest": self._highest,
            "mark": self._mark,
            "since": self._since,
            "epochs": self._epochs,
            "best": {} if self._epochs else self.best.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        own = {key: value for key, value in self.state_dict().items() if key != "best"}
        for key, value in own.items():
            require_form(value, state[key], key)
        self._highest, self._mark = state["highest"], state["mark"]
        self._since, self._epochs = state["since"], state["epochs"]
        if not self._epochs:
            self.best.load_state_dict(state["best"])
