"""LoAd's engine: scripted evaluations, real (tiny) networks."""

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transitions import TABLE, UNIT, loop, numbers

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.lookahead.loop import LookaheadLoop
from mlseg.engines.segmentation import Segmentation
from mlseg.errors import RunError

pytestmark = pytest.mark.slow  # trains for seconds

AT_ONCE = {"pretraining.weighted_epochs": 0, "pretraining.epochs": 1}


def build(out: Path | None = None, **changes: Any) -> Engine:
    """A tiny engine with 1 epoch of stage 1; keywords have ``__`` for the dot."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    engine = tiny.build("load", {**AT_ONCE, **named}, out)
    assert isinstance(engine, Engine)
    return engine


def scripted(engine: Engine, script: str) -> Engine:
    """Replace the mIoU, after it has been measured, by ``script``'s; it starts from 50 per cent.

    What is answered depends on the number of updates alone, so that it survives an interruption.
    """
    answers = [mu for cycle in numbers(script) for mu in cycle]
    measure = loop(engine).hold_out.miou

    def miou(module: Any) -> float:
        assert 0 <= measure(module) <= 1
        if not loop(engine).controller.cycle:
            return 50 / UNIT
        return answers[loop(engine).controller.updates]

    loop(engine).hold_out.miou = miou
    return engine


def play(script: str, out: Path | None = None, **changes: Any) -> Engine:
    """An engine under a script with the table's thresholds."""
    table = {"lookahead__beta_l": 5 / UNIT, "lookahead__beta_u": 1 / UNIT}
    return scripted(build(out, **{**table, **changes}), script)


def under(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}__{key}": value for key, value in values.items()}


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "events.jsonl").open()]
    return [event for event in found if event["event"] == kind]


class Watch:
    """Notes the model at every update, and what restores bring back."""

    def __init__(self, engine: Engine) -> None:
        self.models: dict[str, Any] = {}
        self.restored: list[tuple[str, Any]] = []
        self.engine = engine
        self._originals = LookaheadLoop._AT_ONCE
        watched = {"note": self._note, "restore": self._restore}
        vars(loop(engine))["_AT_ONCE"] = {**self._originals, **watched}

    def _model(self) -> dict[str, Any]:
        generator = self.engine.generator
        return copy.deepcopy(
            {"module": generator.module.state_dict(), "optimizer": generator.optimizer.state_dict()}
        )

    def _note(self, hook: LookaheadLoop, engine: Engine, values: Any) -> None:
        if values["event"] in ("start", "update"):
            self.models[f"g{values.get('update', 0)}"] = self._model()
        self._originals["note"](hook, engine, values)

    def _restore(self, hook: LookaheadLoop, engine: Engine, values: Any) -> None:
        before = copy.deepcopy(engine.discriminator.module.state_dict())
        self._originals["restore"](hook, engine, values)
        assert tiny.same(before, engine.discriminator.module.state_dict()), "never rolled back"
        self.restored.append((loop(engine).controller.start, self._model()))


@pytest.mark.parametrize("case", TABLE)
def test_transitions_and_rollbacks(case: str, tmp_path: Path) -> None:
    """The controller's table, carried out: what is rolled back is what there was, bit for bit."""
    changes, script, buffers = TABLE[case]
    engine = play(script, tmp_path, **under("lookahead", changes), augmentation="off")
    watch = Watch(engine)
    engine.run()
    ends = events(tmp_path, "cycle_end")
    assert [",".join(end["buffer_after"]) for end in ends] == buffers
    assert loop(engine).buffer is not None
    assert ",".join(loop(engine).buffer.labels) == buffers[-1]
    assert len(watch.restored) == len(ends)
    for name, restored in watch.restored:
        assert tiny.same(restored, watch.models[name]), name
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")["problems"]["generator"]["module"]
    name = watch.restored[-1][0]
    assert tiny.same(best, dict(watch.models[name]["module"]))
    assert tiny.same(dict(engine.generator.module.state_dict()), best)
    # The buffer holds the maps of the models that it names.
    images = torch.cat(
        [
            engine.hook(Segmentation).data.train.images,
            loop(engine).hold_out.samples.images,
        ]
    )
    for position, label in enumerate(loop(engine).buffer.labels):
        engine.generator.module.load_state_dict(watch.models[label]["module"])
        expected = loop(engine).hold_out.maps(engine.generator.module, images)
        everything = torch.arange(len(images))
        found = loop(engine).buffer.gather(torch.full_like(everything, position), everything)
        assert torch.equal(found, expected), label


def test_updates_move_the_generator_and_its_momentum(tmp_path: Path) -> None:
    engine = play("49,49,49 / 49,49,49", tmp_path)
    watch = Watch(engine)
    engine.run()
    names = list(watch.models)
    assert names == [f"g{n}" for n in range(7)]
    for one, other in pairwise(names):
        assert not tiny.same(watch.models[one], watch.models[other])
    assert not watch.models["g0"]["optimizer"]["state"], "stage 2 starts with no momentum"
    assert watch.models["g1"]["optimizer"]["state"]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad"])
def test_every_optimizer_is_rolled_back(name: str, tmp_path: Path) -> None:
    optimizer = {"name": name, "lr": 1e-2}
    engine = play("49,49,49 / 49,49,49", tmp_path, problems__generator__optimizer=optimizer)
    watch = Watch(engine)
    engine.run()
    for start, restored in watch.restored:
        assert tiny.same(restored, watch.models[start])


def test_snapshots_use_their_memory_again(tmp_path: Path) -> None:
    engine = play("52,51,50 / 54,53,50 / 53,53,53 / 53,53,53")
    places: dict[int, set[int]] = {}

    def note(*_: Any) -> None:
        for snapshot in loop(engine).snapshots.values():
            tensors: list[Tensor] = list(snapshot.module_state().values())
            tensors += [t for slot in snapshot._slots for t in slot.values()]
            if tensors:
                places.setdefault(id(snapshot), set()).update(t.data_ptr() for t in tensors)

    vars(loop(engine))["_AT_ONCE"] = {**loop(engine)._AT_ONCE, "note": note}
    engine.run()
    sizes = len(engine.generator.module.state_dict()) + len(
        list(engine.generator.module.parameters())
    )
    assert len(places) == 2
    assert all(len(found) <= sizes for found in places.values())


def test_batch_norm_statistics_stand_still_unless_asked(tmp_path: Path) -> None:
    for frozen in (True, False):
        engine = play(
            "49,49,49 / 49,49,49", tmp_path / str(frozen), adversarial__freeze_batch_norm=frozen
        )
        watch = Watch(engine)
        engine.run()
        key = "encoder.0.1.running_mean"
        first, later = (watch.models[name]["module"][key] for name in ("g0", "g3"))
        assert torch.equal(first, later) == frozen


def test_the_discriminator_stands_still_while_the_generator_steps() -> None:
    engine = play("49,49,49 / 49,49,49")
    module = engine.discriminator.module
    engine.train()
    engine.enter_stage(1)
    loop(engine).buffer.open("g0", 0)
    loop(engine).training.begin()
    engine.discriminator.step_normal()
    before = copy.deepcopy(module.state_dict())
    engine.generator.step_normal()
    assert tiny.same(before, dict(module.state_dict()))
    assert all(p.grad is None for p in module.parameters())
    engine.discriminator.step_normal()
    after = module.state_dict()
    assert all(not torch.equal(before[k], v) for k, v in after.items() if "running" in k)


def test_a_nan_in_mid_cycle_keeps_the_best_model(tmp_path: Path) -> None:
    engine = play("52,51,51 / 54,51,51 / 52,52,52 / 52,52,52", tmp_path)
    original = loop(engine).hold_out.miou

    def miou(module: Any) -> float:
        return math.nan if loop(engine).controller.updates == 4 else original(module)

    loop(engine).hold_out.miou = miou
    watch = Watch(engine)
    with pytest.raises(RunError, match=r"is nan after update 5 \(cycle 2\); the best .*, g4 with"):
        engine.run()
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert tiny.same(best["problems"]["generator"]["module"], dict(watch.models["g4"]["module"]))


@pytest.mark.parametrize("peak_patience", [None, 1])
def test_the_best_model_is_kept_wherever_it_stops(
    peak_patience: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every piece of work: ``best.pt`` has the weights of the model that it names."""
    engine = play(
        "52,51,50 / 54,55,53 / 53,53,53 / 53,53,53",
        tmp_path,
        lookahead__peak_patience=peak_patience,
    )
    watch = Watch(engine)
    original, named = engine.train_step, []

    def step() -> None:
        original()
        loop(engine).stop(engine)
        if engine.best is None:
            return
        best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
        name = best["engine"]["best"]["model"]
        module = best["problems"]["generator"]["module"]
        assert tiny.same(module, dict(watch.models[name]["module"])), name
        named.append((name, best["engine"]["best"]["step"]))

    monkeypatch.setattr(engine, "train_step", step)
    engine.run()
    found = list(dict.fromkeys(named))
    assert [name for name, _ in found] == ["g0", "g1", "g4", "g5"]
    steps = {f"g{e['update']}": e["step"] for e in events(tmp_path, "peak")}
    assert all(steps[name] == step for name, step in found[1:]), "where it was found"


@pytest.mark.parametrize("place", ["metrics", "update", "peak", "cycle_end", "rollback", "cycle"])
@pytest.mark.parametrize("peak", [1, 4])
def test_a_record_that_cannot_be_written_keeps_the_peak(
    place: str, peak: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever writing fails from a peak on, ``best.pt`` is that peak."""
    engine = play("52,51,50 / 54,53,53 / 53,53,53 / 53,53,53", tmp_path)
    watch, recorder = Watch(engine), engine.recorder
    event, log = recorder.event, recorder.log

    def full(what: str) -> None:
        if loop(engine).controller.updates >= peak and what == place:
            raise RunError("No space left on device")

    def written_event(kind: str, step: int, **values: Any) -> None:
        full(kind)
        event(kind, step, **values)

    def written_log(*given: Any) -> Any:
        full("metrics")
        return log(*given)

    monkeypatch.setattr(recorder, "event", written_event)
    monkeypatch.setattr(recorder, "log", written_log)
    with pytest.raises(RunError, match="No space left"):
        engine.run()
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert best["engine"]["best"]["model"] == f"g{peak}"
    assert tiny.same(
        best["problems"]["generator"]["module"], dict(watch.models[f"g{peak}"]["module"])
    )


def test_a_copy_that_was_interrupted_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C may come in the middle of copying a peak."""
    engine = play("52,51,50 / 54,53,53 / 53,53,53 / 53,53,53", tmp_path)
    watch = Watch(engine)
    snapshot = LookaheadLoop._AT_ONCE["snapshot"]

    def torn(hook: LookaheadLoop, engine: Engine, values: Any) -> None:
        if values["model"] == "g4":
            monkeypatch.setattr(loop(engine).snapshots["peak"], "_copied_by_plan", interrupt)
        snapshot(hook, engine, values)

    def interrupt(back: bool) -> bool:
        raise KeyboardInterrupt

    vars(loop(engine))["_AT_ONCE"] = {**loop(engine)._AT_ONCE, "snapshot": torn}
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert best["engine"]["best"]["model"] == "g1"
    assert tiny.same(best["problems"]["generator"]["module"], dict(watch.models["g1"]["module"]))


def test_a_disk_that_fills_up_keeps_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = play("52,51,50 / 51,51,51 / 51,51,51", tmp_path, buffer_limit_mib=0.0)
    watch, opened = Watch(engine), loop(engine).buffer.open

    def full(label: str, position: int) -> None:
        if label == "g3":
            raise RunError("can't write maps: No space left on device")
        opened(label, position)

    monkeypatch.setattr(loop(engine).buffer, "open", full)
    with pytest.raises(RunError, match="No space left"):
        engine.run()
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert best["engine"]["best"]["model"] == "g1"
    assert tiny.same(best["problems"]["generator"]["module"], dict(watch.models["g1"]["module"]))


def test_the_first_error_is_the_one_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = play("52,51,50 / 51,51,51 / 51,51,51")
    original = loop(engine).hold_out.miou

    def miou(module: Any) -> float:
        if loop(engine).controller.updates < 2:
            return original(module)
        monkeypatch.setattr(loop(engine), "_keep_best", full)
        raise RunError("the first")

    def full(engine: Engine) -> None:
        raise RunError("can't write best.pt")

    loop(engine).hold_out.miou = miou
    with pytest.raises(RunError, match="the first"):
        engine.run()


def test_weights_that_are_nan_give_an_miou_that_is(tmp_path: Path) -> None:
    """An argmax over NaN is a class like any other: the number alone wouldn't tell."""
    engine = build()
    module = engine.generator.module
    assert math.isfinite(loop(engine).hold_out.miou(module))
    with torch.no_grad():
        module.head.weight[0, 0] = math.nan
    assert math.isnan(loop(engine).hold_out.miou(module))


def test_the_lookahead_may_be_cut_short_and_go_on(tmp_path: Path) -> None:
    script = "52,51,50 / 53,53,52 / 52,52,52 / 52,52,52"
    through = play(script, tmp_path / "a")
    through.run()
    short = play(script, tmp_path / "b", engine__iterations=30)
    short.run()
    assert not short.stopped_early
    longer = play(script, tmp_path / "b")
    longer.resume(tmp_path / "b")
    longer.run()
    assert longer.stopped_early
    assert tiny.same(tiny.weights(longer), tiny.weights(through))


def test_label_maps_in_files_change_nothing(tmp_path: Path) -> None:
    script = "52,51,50 / 51,51,51 / 52,52,52"
    engines = []
    for name, limit in (("memory", 100.0), ("files", 0.0)):
        engines.append(play(script, tmp_path / name, buffer_limit_mib=limit))
        engines[-1].run()
    assert not loop(engines[0]).buffer.mapped
    assert loop(engines[1]).buffer.mapped
    assert tiny.same(tiny.weights(engines[0]), tiny.weights(engines[1]))
    read = [(tmp_path / name / "events.jsonl").read_text() for name in ("memory", "files")]
    assert read[0] == read[1]
    files = sorted(p.name for p in (tmp_path / "files" / "buffer").iterdir())
    assert len(files) == len(loop(engines[1]).buffer.labels)
