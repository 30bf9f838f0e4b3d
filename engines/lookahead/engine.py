"""The engine that carries LoAd's commands out on problems: update, score, roll back, aggregate."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mlseg import checkpoint
from mlseg.engines.lookahead.controller import Command, Controller
from mlseg.engines.lookahead.discriminator_training import DiscriminatorTraining
from mlseg.engines.lookahead.hold_out import HoldOut
from mlseg.engines.lookahead.map_buffer import MapBuffer
from mlseg.engines.segmentation import SegmentationEngine
from mlseg.engines.settings import EngineSettings, Work
from mlseg.engines.snapshot import Snapshot
from mlseg.errors import RunError
from mlseg.multilevel.problem import Problem
from mlseg.segmentation.data import Samples
from mlseg.segmentation.metrics import SegmentationMetrics

LOOKAHEAD = "lookahead"
METRIC = "miou"
START, BEST = "start", "best"


class LookaheadEngine(SegmentationEngine):
    """Runs a controller's commands in the stage ``lookahead``; other stages as every engine.

    An iteration of that stage is one piece of work: an update of the model with its evaluation, a
    batch of label maps, a batch of the discriminator's training or the evaluation after its pass.
    Between any two of them a run can be interrupted and resumed.

    ``best.pt`` is the best model accepted so far, ``start.pt`` the one that the stage began with.

    Args:
        problems, config: as for :class:`SegmentationEngine`; ``config.iterations`` bounds the
            pieces of work of the stage, which normally ends before, by the controller.
        controller: decides what is to be done.
        stepper: the problem that updates the model; its module is the segmentor's.
        hold_out: scores the model.
        buffer, training: of the discriminator; None for a controller that never asks for them.
        start_state: gives what ``start.pt`` holds beside the model.
        on_results: is given the scores and both models at the end; writes tables and pictures.
    """

    end_is_known = False  # the controller ends the run

    def __init__(
        self,
        problems: Sequence[Problem],
        config: EngineSettings,
        *,
        controller: Controller,
        stepper: Problem,
        hold_out: HoldOut,
        buffer: MapBuffer | None,
        training: DiscriminatorTraining | None,
        start_state: Callable[[], Mapping[str, Any]] = dict,
        on_results: Sequence[Callable[[LookaheadEngine, Mapping[str, Any]], None]] = (),
        **options: Any,
    ) -> None:
        super().__init__(problems, config, **options)
        self.controller = controller
        self.stepper = stepper
        self.hold_out = hold_out
        self.buffer = buffer
        self.discriminator_training = training
        self.start_state = start_state
        self.on_results = list(on_results)
        self.snapshots = {
            slot: Snapshot(stepper.module, stepper.optimizer) for slot in ("start", "peak")
        }
        self._queue: deque[Command] = deque()
        self._written: int | None = None
        """Maps of the entry that is being made; None between entries."""

    # ------------------------------------------------------------------ the loop

    @property
    def looking_ahead(self) -> bool:
        """Whether the controller is in charge."""
        return self.stage.name == LOOKAHEAD

    def run(self, iterations: int | None = None) -> None:
        """Train until the controller stops.

        Raises:
            RunError: a loss or the mIoU isn't finite; ``best.pt`` holds the best model so far.
            Interrupted: SIGINT or SIGTERM came; the run has been saved.
        """
        try:
            super().run(iterations)
        except BaseException:
            with suppress(RunError):  # of the two, the first is the one to tell
                self._keep_best_of_lookahead()
            raise
        self._keep_best_of_lookahead()

    def _keep_best_of_lookahead(self) -> None:
        if self.looking_ahead:
            self._keep_best()

    def train_step(self) -> None:
        """One piece of work, and what follows from it at once."""
        if not self.looking_ahead:
            super().train_step()
            return
        if not self._queue:
            self._queue.extend(self.controller.begin())
        command = self._queue[0]
        if self._WORK[command.action](self, command.values):
            assert self._queue[0] is command
            self._queue.popleft()
        while self._queue and self._queue[0].action not in self._WORK:
            command = self._queue.popleft()
            self._AT_ONCE[command.action](self, command.values)

    # -------------------------------------------------------- commands that take time

    def _evaluate(self, _: Mapping[str, Any]) -> bool:
        self._queue.extend(self.controller.observe(self.hold_out.miou(self.stepper.module)))
        return True

    def _step(self, values: Mapping[str, Any]) -> bool:
        self.stepper.step_normal(global_step=self.global_step)
        return self._evaluate(values)

    def _append(self, values: Mapping[str, Any]) -> bool:
        """A batch of maps; True with the last."""
        assert self.buffer is not None
        if self._written is None:
            self.buffer.open(values["label"], values["position"])
            self._written = 0
        source, start = self._images(self._written)
        maps = self.hold_out.maps(self.stepper.module, source.images[start : self._end(start)])
        self.buffer.write(values["position"], self._written, maps)
        self._written += len(maps)
        if self._written < self.buffer.shape[0]:
            return False
        self._written = None
        return True

    def _images(self, index: int) -> tuple[Samples, int]:
        """Where image ``index`` of an entry is: training images first, then the hold-out."""
        train = len(self.data.train)
        return (self.data.train, index) if index < train else (self.hold_out.samples, index - train)

    def _end(self, start: int) -> int:
        return start + self.hold_out.batch_size

    def _train(self, _: Mapping[str, Any]) -> bool:
        """A piece of the discriminator's training; True with the last."""
        training = self.discriminator_training
        assert training is not None
        if not training.running:
            training.begin()
        report = training.advance()
        if report is None:
            return False
        assert self.buffer is not None
        self.recorder.event("discriminator", self.global_step, **report, buffer=self.buffer.labels)
        return True

    _WORK: Mapping[str, Callable[[LookaheadEngine, Mapping[str, Any]], bool]] = {
        "evaluate": _evaluate,
        "step": _step,
        "append": _append,
        "train": _train,
    }

    # ----------------------------------------------------- commands carried out at once

    def _snapshot(self, values: Mapping[str, Any]) -> None:
        about = {"metric": METRIC, "value": values["miou"], "step": self.global_step}
        self.snapshots[values["slot"]].take({**about, "model": values["model"]})
        if self.best is None:
            self._keep_best()
            if self.recorder.directory is not None:
                state = {**self.best_state_dict(), **self.start_state()}
                checkpoint.save(self._checkpoint(START), state)

    def _promote(self, _: Mapping[str, Any]) -> None:
        start, peak = self.snapshots["start"], self.snapshots["peak"]
        self.snapshots.update(start=peak, peak=start)  # the memory of either is used again
        self._keep_best()

    def _restore(self, _: Mapping[str, Any]) -> None:
        self.snapshots["start"].restore()

    def _flush(self, values: Mapping[str, Any]) -> None:
        assert self.buffer is not None
        self.buffer.flush(values["keep"])

    def _delete(self, values: Mapping[str, Any]) -> None:
        assert self.buffer is not None
        self.buffer.delete(values["position"])

    def _note(self, values: Mapping[str, Any]) -> None:
        rest = {key: value for key, value in values.items() if key != "event"}
        self.recorder.event(values["event"], self.global_step, **rest)
        if values["event"] in ("start", "update"):
            kept = {"miou", "update", "cycle"}
            figures = {key: value for key, value in rest.items() if key in kept}
            self.recorder.log(self.global_step, {"hold_out": figures}, {})

    def _stop(self, _: Mapping[str, Any]) -> None:
        self.stopped_early = True

    _AT_ONCE: Mapping[str, Callable[[LookaheadEngine, Mapping[str, Any]], None]] = {
        "snapshot": _snapshot,
        "promote": _promote,
        "restore": _restore,
        "flush": _flush,
        "delete": _delete,
        "note": _note,
        "stop": _stop,
    }

    def work(self) -> list[Work]:
        """The lookahead's pieces, as often as the longest run without a peak has them."""
        if not self.looking_ahead:
            return super().work()
        updates, cycles = self.controller.longest
        held = self.hold_out
        held.find_batch_size(self.stepper.module)
        batch = held.samples.images[: held.batch_size]
        batches = math.ceil(len(held) / held.batch_size)
        module = self.stepper.module
        pieces = [
            Work("update", updates, self.stepper.step_normal),
            Work("hold-out, a batch", (updates + 1) * batches, lambda: held.maps(module, batch)),
        ]
        buffer, training = self.buffer, self.discriminator_training
        if buffer is not None and training is not None:
            entry = math.ceil(buffer.shape[0] / held.batch_size)
            once = "label maps, a batch"
            pieces.append(Work(once, (cycles + 1) * entry, lambda: held.maps(module, batch)))
            buffer.open("g0", 0)
            epochs = cycles * training.settings.max_epochs
            per_epoch = training.batches_per_epoch * (buffer.size + 1) // (len(buffer) + 1)
            pieces.append(Work("discriminator, a batch", epochs * per_epoch, training.batch))
        return pieces

    # ---------------------------------------------------------------- what is kept

    def _keep_best(self) -> None:
        """Write ``best.pt`` if a better model has been accepted since it was written."""
        found = self._best_snapshot()
        if found is None or (self.best and self.best["value"] >= _about(found)["value"]):
            return
        if self.recorder.directory is not None:
            checkpoint.save(self._checkpoint(BEST), self.best_state_dict())
        self.best = dict(_about(found))

    def _best_snapshot(self) -> Snapshot | None:
        """That of the best model: what has been copied counts, not what the controller has asked
        for, which an interruption may have prevented. All that is copied has been accepted; of
        equals the controller prefers the first.
        """
        whole = [snapshot for snapshot in self.snapshots.values() if snapshot.taken]
        return max(whole, key=lambda s: (_about(s)["value"], -_about(s)["step"]), default=None)

    def best_state_dict(self) -> dict[str, Any]:
        """The best model accepted so far, and its description."""
        found = self._best_snapshot()
        assert found is not None, "the start model has been scored"
        best = dict(_about(found))
        return {
            **self.meta,
            "problems": {self.segmentor_problem.name: {"module": found.module_state()}},
            "engine": {"global_step": best["step"], "best": best},
        }

    def _validate_if_due(self) -> None:
        """Save when it is time; the controller has its own evaluation."""
        if not self.looking_ahead:
            super()._validate_if_due()
            return
        due = self.settings.checkpoint_every is None and self._is_due(self.settings.validate_every)
        if due and not self._is_over():
            self.save()

    def save(self, name: str = "last") -> None:
        """Write a checkpoint; label maps that no checkpoint needs any more are then removed."""
        super().save(name)
        if self.buffer is not None and self.recorder.directory is not None:
            self.buffer.collect()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        buffer, training = self.buffer, self.discriminator_training
        return {
            **super().state_dict(),
            "lookahead": {
                "controller": self.controller.state_dict(),
                "queue": [[command.action, dict(command.values)] for command in self._queue],
                "written": self._written,
                "snapshots": {key: value.state_dict() for key, value in self.snapshots.items()},
                "hold_out_batch": self.hold_out.batch_size,
                "buffer": None if buffer is None else buffer.state_dict(),
                "training": None if training is None else training.state_dict(),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state)
        mine = state["lookahead"]
        self.controller.load_state_dict(mine["controller"])
        self._queue = deque(Command(action, values) for action, values in mine["queue"])
        self._written = mine["written"]
        for key, value in mine["snapshots"].items():
            self.snapshots[key].load_state_dict(value)
        self.hold_out.batch_size = mine["hold_out_batch"]
        if self.buffer is not None:
            self.buffer.load_state_dict(mine["buffer"])
        if self.discriminator_training is not None:
            self.discriminator_training.load_state_dict(mine["training"])

    # -------------------------------------------------------------------- the end

    def _count_splits(self) -> dict[str, SegmentationMetrics]:
        """Besides the splits of every run the two parts of the validation split.

        The model was chosen on ``val_hold_out``; ``val_rest`` and ``test`` it has never met.
        """
        counted = super()._count_splits()
        held = set(self.hold_out.samples.ids)
        counted["val_hold_out"] = counted["val"].only(held)
        if rest := set(self.data.val.ids) - held:
            counted["val_rest"] = counted["val"].only(rest)
        return counted

    def results(self) -> dict[str, Any]:
        """Scores of the start and of the best model on every split, and how it came to be.

        ``stopped_early`` tells whether the controller has ended the run, not ``engine.iterations``.
        """
        scores: dict[str, Any] = {}
        shown: dict[str, list[str]] = {}
        prints: dict[str, str] = {}
        for name in (START, BEST):
            with self.weights(name) as found:
                if found:
                    prints[name] = checkpoint.fingerprint(self.segmentor_module.state_dict())
                    counted = self._count_splits()
                    scores[name] = {split: m.compute() for split, m in counted.items()}
                    shown = {split: m.shown() for split, m in counted.items()}
        report = {
            **self._report(scores),
            "classes": shown,
            "models": prints,
            "hold_out": self.hold_out.samples.ids,
            "updates": self.controller.updates,
            "cycles": self.controller.cycle,
        }
        for write in self.on_results:
            write(self, report)
        return report


def _about(snapshot: Snapshot) -> Mapping[str, Any]:
    assert snapshot.about is not None
    return snapshot.about
