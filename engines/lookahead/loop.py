"""The engine's part that obeys a controller: who steps, and what follows at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from betty.problems import Problem as BettyProblem

from mlseg.checkpoint import require_form
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks, Work
from mlseg.engines.lookahead.commands import Command, Controller
from mlseg.engines.lookahead.discriminator_training import DiscriminatorTraining
from mlseg.engines.lookahead.hold_out import HoldOut
from mlseg.engines.lookahead.map_buffer import MapBuffer
from mlseg.engines.snapshot import Snapshot
from mlseg.engines.state import write
from mlseg.multilevel.problem import Problem
from mlseg.segmentation.data import Samples

LOOKAHEAD = "lookahead"
METRIC = "miou"
START, BEST = "start", "best"


class LookaheadLoop(Hooks):
    """Has an engine carry out a controller's commands in its stage ``lookahead``.

    An iteration of that stage is one piece of work: an update of the model with its evaluation, a
    batch of label maps, a batch of the discriminator's training or the evaluation after its pass.
    The levels step as in every stage; which of them is active, if any, the controller decides.
    Between any two pieces a run can be interrupted and resumed.

    ``best.pt`` is the best model accepted so far, ``start.pt`` the one that the stage began with.

    Args:
        controller: decides what is to be done.
        stepper: the problem that updates the model; its module is the segmentor's.
        train: training images whose label maps go into the buffer.
        hold_out: scores the model.
        buffer, training: of the discriminator; None for a controller that never asks for them.
        start_state: gives what ``start.pt`` holds beside the model.
        drop_momentum: a model that is put back starts with an optimizer that has made no step.
        before: problems that step before it, each time that it does.
    """

    name = LOOKAHEAD
    shown_events: ClassVar[Sequence[str]] = (
        "start", "cycle", "peak", "restart", "cycle_end", "rollback", "discriminator", "stop",
    )  # fmt: skip

    def __init__(
        self,
        controller: Controller,
        stepper: Problem,
        train: Samples,
        hold_out: HoldOut,
        buffer: MapBuffer | None,
        training: DiscriminatorTraining | None,
        start_state: Callable[[], Mapping[str, Any]] = dict,
        drop_momentum: bool = False,
        before: Sequence[Problem] = (),
    ) -> None:
        self.controller = controller
        self.stepper = stepper
        self.train = train
        self.hold_out = hold_out
        self.buffer = buffer
        self.training = training
        self.start_state = start_state
        self.drop_momentum = drop_momentum
        self.steppers = [*before, stepper]
        self.snapshots = {
            slot: Snapshot(stepper.module, stepper.optimizer) for slot in ("start", "peak")
        }
        self._queue: deque[Command] = deque()
        self._written: int | None = None
        """Maps of the entry that is being made; None between entries."""

    @property
    def entries(self) -> list[str]:
        """Models whose maps are whole in the buffer; none while an entry is being made."""
        return [] if self.buffer is None or self._written is not None else self.buffer.labels

    # ------------------------------------------------------------------ the loop

    @staticmethod
    def in_charge(engine: Engine) -> bool:
        """Whether the controller is in charge of the present stage."""
        return engine._stage.name == LOOKAHEAD

    def active(self, engine: Engine) -> list[BettyProblem] | None:
        """Whom the present command lets step."""
        if not self.in_charge(engine):
            return None
        if not self._queue:
            self._queue.extend(self.controller.begin())
        action = self._queue[0].action
        if action == "step":
            return list(self.steppers)
        if action == "train":
            assert self.training is not None
            return [self.training.problem] if self.training.wants_step() else []
        return []

    def stepped(self, engine: Engine) -> None:
        """The rest of the piece of work, and what follows from it at once."""
        if not self.in_charge(engine):
            return
        command = self._queue[0]
        if self._WORK[command.action](self, engine, command.values):
            assert self._queue[0] is command
            self._queue.popleft()
        while self._queue and self._queue[0].action not in self._WORK:
            command = self._queue.popleft()
            self._AT_ONCE[command.action](self, engine, command.values)

    def start(self, engine: Engine) -> None:
        """Write ``best.pt`` again where a run that goes on has lost it."""
        if engine._best is None:
            self.stop(engine)

    def stop(self, engine: Engine) -> None:
        """Keep the best model, whatever has ended the run."""
        if self.in_charge(engine):
            self._keep_best(engine)

    # -------------------------------------------------------- commands that take time

    def _evaluate(self, engine: Engine, _: Mapping[str, Any]) -> bool:
        self._queue.extend(self.controller.observe(self.hold_out.miou(self.stepper.module)))
        return True

    def _append(self, engine: Engine, values: Mapping[str, Any]) -> bool:
        """A batch of maps; True with the last."""
        assert self.buffer is not None
        if self._written is None:
            self.buffer.open(values["label"], values["position"])
            self._written = 0
        self.hold_out.agree()
        source, start = self._images(self._written)
        end = start + self.hold_out.batch_size
        maps = self.hold_out.maps_of_parts(self.stepper.module, source.images[start:end])
        self.buffer.write(values["position"], self._written, maps)
        self._written += len(maps)
        if self._written < self.buffer.shape[0]:
            return False
        self._written = None
        return True

    def _images(self, index: int) -> tuple[Samples, int]:
        """Where image ``index`` of an entry is: training images first, then the hold-out."""
        train = len(self.train)
        return (self.train, index) if index < train else (self.hold_out.samples, index - train)

    def _train(self, engine: Engine, _: Mapping[str, Any]) -> bool:
        """What follows a step of the discriminator; True with the end of its training."""
        assert self.training is not None
        assert self.buffer is not None
        report = self.training.after_step()
        if report is None:
            return False
        labels = self.buffer.labels
        engine._recorder.event("discriminator", engine.global_step, **report, buffer=labels)
        return True

    _WORK: Mapping[str, Callable[[LookaheadLoop, Engine, Mapping[str, Any]], bool]] = {
        "evaluate": _evaluate,
        "step": _evaluate,
        "append": _append,
        "train": _train,
    }

    # ----------------------------------------------------- commands carried out at once

    def _snapshot(self, engine: Engine, values: Mapping[str, Any]) -> None:
        about = {"metric": METRIC, "value": values["miou"], "step": engine.global_step}
        self.snapshots[values["slot"]].take({**about, "model": values["model"]})
        if engine._best is None:
            self._keep_best(engine)
            if engine._directory is not None:
                write(engine, START, {**engine.best_state_dict(), **self.start_state()})

    def _promote(self, engine: Engine, _: Mapping[str, Any]) -> None:
        start, peak = self.snapshots["start"], self.snapshots["peak"]
        self.snapshots.update(start=peak, peak=start)  # the memory of either is used again
        self._keep_best(engine)

    def _restore(self, engine: Engine, _: Mapping[str, Any]) -> None:
        self.snapshots["start"].restore()
        if self.drop_momentum:
            self.stepper.optimizer.state.clear()

    def _flush(self, engine: Engine, values: Mapping[str, Any]) -> None:
        assert self.buffer is not None
        self.buffer.flush(values["keep"])

    def _delete(self, engine: Engine, values: Mapping[str, Any]) -> None:
        assert self.buffer is not None
        self.buffer.delete(values["position"])

    def _note(self, engine: Engine, values: Mapping[str, Any]) -> None:
        rest = {key: value for key, value in values.items() if key != "event"}
        engine._recorder.event(values["event"], engine.global_step, **rest)
        if values["event"] in ("start", "update"):
            kept = {"miou", "update", "cycle"}
            figures = {key: value for key, value in rest.items() if key in kept}
            engine._recorder.log(engine.global_step, {"hold_out": figures}, {})

    def _end(self, engine: Engine, _: Mapping[str, Any]) -> None:
        engine._stopped_early = True

    _AT_ONCE: Mapping[str, Callable[[LookaheadLoop, Engine, Mapping[str, Any]], None]] = {
        "snapshot": _snapshot,
        "promote": _promote,
        "restore": _restore,
        "flush": _flush,
        "delete": _delete,
        "note": _note,
        "stop": _end,
    }

    def work(self, engine: Engine) -> list[Work] | None:
        """The lookahead's pieces, as often as the longest run without a peak has them."""
        if not self.in_charge(engine):
            return None
        updates, cycles = self.controller.longest
        held, module = self.hold_out, self.stepper.module
        held.find_batch_size(module)
        batch = held.samples.images[: held.batch_size]
        batches = math.ceil(len(held) / held.batch_size)
        pieces = [
            Work("update", updates, self._step_once),
            Work("hold-out, a batch", (updates + 1) * batches, lambda: held.maps(module, batch)),
        ]
        buffer, training = self.buffer, self.training
        if buffer is not None and training is not None:
            entry = math.ceil(buffer.shape[0] / held.batch_size)
            once = "label maps, a batch"
            pieces.append(Work(once, (cycles + 1) * entry, lambda: held.maps(module, batch)))
            buffer.open("g0", 0)
            epochs = cycles * training.settings.max_epochs
            per_epoch = training.batches.per_epoch * (buffer.size + 1) // (len(buffer) + 1)
            pieces.append(Work("discriminator, a batch", epochs * per_epoch, training.step))
        return pieces

    def _step_once(self) -> None:
        for problem in self.steppers:
            problem.step_normal()

    # ---------------------------------------------------------------- what is kept

    def _keep_best(self, engine: Engine) -> None:
        """Write ``best.pt`` if a better model has been accepted since it was written."""
        found = self._best_snapshot()
        if found is None or (engine._best and engine._best["value"] >= _about(found)["value"]):
            return
        if engine._directory is not None:
            write(engine, BEST, engine.best_state_dict())
        engine._best = dict(_about(found))

    def _best_snapshot(self) -> Snapshot | None:
        """That of the best model: what has been copied counts, not what the controller has asked
        for, which an interruption may have prevented. All that is copied has been accepted; of
        equals the controller prefers the first.
        """
        whole = [snapshot for snapshot in self.snapshots.values() if snapshot.taken]
        return max(whole, key=lambda s: (_about(s)["value"], -_about(s)["step"]), default=None)

    def best_state(self, engine: Engine, state: dict[str, Any]) -> dict[str, Any]:
        """The best model accepted so far."""
        found = self._best_snapshot()
        assert found is not None, "the start model has been scored"
        best = dict(_about(found))
        return {
            **state,
            "problems": {name: {"module": found.module_state()} for name in state["problems"]},
            "engine": {"global_step": best["step"], "best": best},
        }

    def saved(self, engine: Engine) -> None:
        """Remove label maps that no checkpoint needs any more."""
        if self.buffer is not None:
            self.buffer.collect()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        buffer, training = self.buffer, self.training
        return {
            "controller": self.controller.state_dict(),
            "queue": [[command.action, dict(command.values)] for command in self._queue],
            "written": self._written,
            "snapshots": {key: value.state_dict() for key, value in self.snapshots.items()},
            "hold_out_batch": self.hold_out.batch_size,
            "buffer": None if buffer is None else buffer.state_dict(),
            "training": None if training is None else training.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.controller.load_state_dict(state["controller"])
        self._queue = deque(Command(action, dict(values)) for action, values in state["queue"])
        for command in self._queue:
            if command.action not in {**self._WORK, **self._AT_ONCE}:
                raise ValueError(f"there is no command {str(command.action)[:40]!r}")
        require_form(1, state["hold_out_batch"], "hold_out_batch")
        if state["hold_out_batch"] < 1:
            raise ValueError("hold_out_batch is 0")
        if state["written"] is not None:
            require_form(0, state["written"], "written")
        self._written = state["written"]
        for key, value in state["snapshots"].items():
            self.snapshots[key].load_state_dict(value)
        self.hold_out.batch_size = state["hold_out_batch"]
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])
        if self.training is not None:
            self.training.load_state_dict(state["training"])

    # -------------------------------------------------------------------- the end

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """How the best model came to be."""
        return {
            "hold_out": self.hold_out.samples.ids,
            "updates": self.controller.updates,
            "cycles": self.controller.cycle,
        }


def _about(snapshot: Snapshot) -> Mapping[str, Any]:
    assert snapshot.about is not None
    return snapshot.about
