"""LoAd through the command: what it leaves, its control, its traps, bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commanding import one_line
from PIL import Image
from torch import Tensor
from transitions import loop

from mlseg import checkpoint, config, evaluate, run
from mlseg.engines.segmentation import Segmentation
from mlseg.problems.load.records import class_changes, markdown, read_events
from mlseg.problems.load.settings import LoadSettings
from mlseg.problems.systems import parse_run
from mlseg.segmentation.data.entry import data_set
from mlseg.segmentation.nets import build_segmentor
from mlseg.segmentation.pictures import GAP, LINE, SIDE
from mlseg.segmentation.scoring import evaluating, score

pytestmark = pytest.mark.slow  # trains for seconds

QUICK = {"pretraining.weighted_epochs": 0, "pretraining.epochs": 2}


def train(tmp_path: Path, *overrides: str, name: str = "run", **changes: Any) -> Path:
    """A tiny run by command; its directory."""
    path = tiny.write_config(tmp_path / f"{name}.yaml", "load", {**QUICK, **changes})
    assert run.main([str(path), *overrides, "--out", str(tmp_path / name)]) == 0
    return tmp_path / name


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


# ----------------------------------------------------------------------------- a whole run


def test_a_run_leaves_its_whole_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate that moves label maps, and a floor so low that no cycle diverges.
    out = train(tmp_path, "problems.generator.optimizer.lr=0.3", "lookahead.beta_l=1")
    found = results(out)
    assert found["cycles"] >= 2
    assert set(found["scores"]) == {"start", "best"}
    assert set(found["scores"]["best"]) == {"val", "val_hold_out", "val_rest", "test"}
    ids = json.loads((out / "splits.json").read_text())
    assert len(found["hold_out"]) == 4
    assert set(found["hold_out"]) < set(ids["val"])
    assert not set(found["hold_out"]) & set(ids["test"])
    events = read_events(out)
    kinds = [event["event"] for event in events]
    assert kinds.count("update") == found["updates"]
    assert kinds.count("cycle") == kinds.count("cycle_end") == found["cycles"]
    assert kinds.count("rollback") == found["cycles"]
    assert kinds.count("discriminator") == found["cycles"], "not after the last cycle"
    trained = next(event for event in events if event["event"] == "discriminator")
    assert {"epochs", "loss", "accuracy", "reason", "buffer"} <= set(trained)
    best = found["scores"]["best"]["val_hold_out"]["miou"]
    assert best == pytest.approx(events[kinds.index("stop")]["miou"], rel=1e-9)
    assert best == pytest.approx(found["best"]["value"], rel=1e-9)
    with Image.open(out / "convergence.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    table = (out / "classes.md").read_text()
    assert "## test" in table
    assert "| mIoU |" in table
    said = capsys.readouterr()
    assert "IoU on test, per cent, by gain" in said.out
    assert "cycle end" in said.err


def test_evaluate_scores_the_best_model(tmp_path: Path) -> None:
    out = train(tmp_path)
    scores = tmp_path / "scores.json"
    assert evaluate.main([str(out), "--out", str(scores)]) == 0
    evaluated = json.loads(scores.read_text())["scores"]["test"]
    del evaluated["per_image"]
    assert evaluated == results(out)["scores"]["best"]["test"]


def test_what_is_cut_off_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = results(train(tmp_path, name="whole"))
    assert whole["stopped_early"]
    assert "cut the lookahead off" not in capsys.readouterr().out
    cut = results(train(tmp_path, "engine.iterations=12", name="cut"))
    assert not cut["stopped_early"]
    said = " ".join(capsys.readouterr().out.split())
    assert "engine.iterations has cut the lookahead off" in said
    assert "no peak was found" not in said


def test_the_scores_of_a_part_are_those_of_its_images(tmp_path: Path) -> None:
    """Validation images are predicted once; the hold-out and the rest are parts of them."""
    engine: Any = tiny.build("load", QUICK, tmp_path)
    engine.run()
    found = engine.results()["scores"]["best"]
    with engine.hook(Segmentation).weights(engine, "best"):
        held = loop(engine).hold_out.samples
        rest = [
            n
            for n, name in enumerate(engine.hook(Segmentation).data.val.ids)
            if name not in held.ids
        ]
        for split, samples in (
            ("val_hold_out", held),
            ("val_rest", engine.hook(Segmentation).data.val.subset(rest)),
        ):
            with evaluating(engine.hook(Segmentation).problem.module):
                alone = score(
                    engine.hook(Segmentation).predict, samples, engine.device, distances=True
                ).compute()
            assert found[split] == pytest.approx(alone, abs=1e-12), split


def test_weights_of_classes_count_what_a_window_shows() -> None:
    """Of a window of a quarter of the image a quarter of the pixels: else its loss is four times
    too large."""
    wide: Any = tiny.build("load", {**QUICK, "augmentation": "off"})
    cut: Any = tiny.build("load", {**QUICK, "augmentation": {"window": [16, 16]}})
    assert torch.equal(cut.pretraining.mean_pixels * 4, wide.pretraining.mean_pixels)
    assert float(wide.pretraining.mean_pixels.sum()) == pytest.approx(32 * 32)


def test_an_epoch_of_one_batch_can_be_tried_out(tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "tiny.yaml", "load", {**QUICK, "data.train": 3})
    assert run.main([str(path), "--dry-run"]) == 0


def test_a_run_goes_on_without_the_file_it_started_from(tmp_path: Path) -> None:
    start = train(tmp_path, name="first") / "checkpoints" / "start.pt"
    out = train(tmp_path, f"start={start}", name="second")
    start.unlink()
    before = results(out)["scores"]
    assert run.main(["--resume", str(out)]) == 0
    assert results(out)["scores"] == before


def test_the_picture_shows_what_changed(tmp_path: Path) -> None:
    engine: Any = tiny.build("load", QUICK, tmp_path)
    answers = iter([0.3, 0.9, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3])
    loop(engine).hold_out.miou = lambda module: next(answers)
    engine.run(10)
    with torch.no_grad():
        for parameter in engine.hook(Segmentation).problem.module.head.parameters():
            parameter.neg_()
    state = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    module = engine.hook(Segmentation).problem.module.state_dict()
    state["problems"]["generator"]["module"] = {k: v.clone() for k, v in module.items()}
    del state["format"]
    checkpoint.save(tmp_path / "checkpoints" / "best.pt", state)
    engine.results()
    with Image.open(tmp_path / "samples" / "changed.png") as picture:
        pixels = np.asarray(picture)
    top, step = LINE + 2 * GAP + LINE + GAP // 2, SIDE + GAP
    before, after = (pixels[top : top + SIDE, GAP + i * step :][:, :SIDE] for i in (2, 3))
    assert before.shape == after.shape == (SIDE, SIDE, 3)
    assert (before != after).any()


def test_classes_are_ordered_by_gain() -> None:
    start = {"iou_a": 0.5, "iou_b": 0.5, "miou": 0.5}
    best = {"iou_a": 0.4, "iou_b": 0.8, "miou": 0.6}
    absent = {"iou_c": 1.0}
    scores = {"start": {"test": start | absent}, "best": {"test": best | absent}}
    changes = class_changes(scores, {"test": ["a", "b"]})
    assert list(changes["test"]["classes"]) == ["b", "a"]
    assert "| b | 50.00 | 80.00 | +30.00 |\n| a | 50.00 | 40.00 | -10.00 |" in markdown(changes)


def test_the_control_makes_as_many_updates_from_the_same_start(tmp_path: Path) -> None:
    first = train(tmp_path, name="first")
    start = first / "checkpoints" / "start.pt"
    out = train(tmp_path, f"start={start}", "control=5", name="second")
    found = results(out)
    assert found["updates"] == 5
    assert found["scores"]["start"] == results(first)["scores"]["start"]
    best = found["scores"]["best"]["val_hold_out"]["miou"]
    assert best >= found["scores"]["start"]["val_hold_out"]["miou"]
    assert not (out / "buffer").exists()
    kinds = {event["event"] for event in read_events(out)}
    assert not kinds & {"discriminator", "rollback", "cycle_end"}


def test_the_control_goes_on_with_the_optimizer_and_the_rate_of_stage_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = {
        "pretraining": {"weighted_epochs": 0, "epochs": 3},
        "data.train": 6,
        "problems.pretraining.scheduler": {"name": "linear", "length": 4, "end": 0.1},
    }
    first: Any = tiny.build("load", {**still, "problems.pretraining.batch_size": 6}, tmp_path)
    while not loop(first).in_charge(first) or first.best is None:
        assert first._advance_stage()
        first.global_step += 1
        first._stage_step += 1
        first.train_step()
    start = str(tmp_path / "checkpoints" / "start.pt")
    control: Any = tiny.build(
        "load", {**still, "start": start, "control": 1, "augmentation": "off"}
    )
    mine, saved = (e.pretraining.optimizer.state_dict() for e in (control, first))
    assert saved["state"]
    assert tiny.same(mine, saved)
    rates = [control.pretraining.optimizer.param_groups[0]["lr"]]
    assert rates[0] < 0.5 * 1e-2  # three steps of stage 1 on the way to a tenth
    for _ in range(2):
        control.pretraining.step_normal()
        rates.append(control.pretraining.optimizer.param_groups[0]["lr"])
    assert rates[1:] == pytest.approx([1e-3, 1e-3])
    path = tiny.write_config(tmp_path / "c.yaml", "load", {**still, "start": start, "control": 1})
    others = (("optimizer", "{name: sgd, lr: 0.1}"), ("scheduler", "null"), ("accumulate", "2"))
    for key, value in others:
        other = f"problems.pretraining.{key}={value}"
        assert run.main([str(path), other, "--out", str(tmp_path / "c")]) == 2
        assert f"problems.pretraining.{key}" in one_line(capsys)


@pytest.mark.parametrize("relaxation", ["softmax", "gumbel", "straight_through"])
@pytest.mark.parametrize("loss", ["saturating", "non_saturating"])
def test_a_step_fools_the_discriminator_more(relaxation: str, loss: str) -> None:
    changes = {
        **QUICK,
        "adversarial": {"relaxation": relaxation, "loss": loss},
        # At 1e-2 Adam goes past a minimum and back, when depends on roundings.
        "problems.generator.optimizer": {"name": "adam", "lr": 3e-3},
        "problems.generator.batch_size": 6,
        "augmentation": "off",
    }
    engine: Any = tiny.build("load", changes)
    with torch.no_grad():
        engine.discriminator.module.network[-1].weight.mul_(30)  # one that minds
    engine.train()
    engine.enter_stage(1)
    losses: list[Tensor] = []
    for _ in range(30):
        engine.generator.step_normal()
        losses.append(engine.generator.metrics["loss"])
    assert torch.stack(losses).isfinite().all()
    assert torch.stack(losses[-5:]).mean() < losses[0] - 0.001


def test_a_batch_without_a_label_teaches_nothing() -> None:
    """As windows of padded images may be, whole."""
    engine: Any = tiny.build("load", QUICK)
    engine.pretraining.ignore_index = 255
    engine.train()
    image, mask = engine.pretraining.get_batch()
    engine.pretraining.weighted_steps = -1  # none
    with torch.no_grad():
        loss = engine.pretraining.training_step((image, mask))
        logits = engine.pretraining.module(image)
        none = engine.pretraining.training_step((image, torch.full_like(mask, 255)))
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, mask)))
    assert float(none) == 0


def test_ignored_pixels_are_zero_on_both_sides() -> None:
    """The discriminator can't tell real from fake by what nobody has labelled."""
    engine: Any = tiny.build("load", QUICK)
    seen: list[Tensor] = []
    network = engine.discriminator.module
    network.register_forward_hook(lambda m, inputs, output: seen.append(inputs[1].detach()))
    given = engine.hook(Segmentation).data.train
    samples = replace(given, spec=replace(given.spec, ignore_index=255))
    samples.masks[:, :5] = 255
    engine.generator.ignore_index = 255
    engine.generator.train_data_loader[0].samples = samples
    loop(engine).training.batches._parts["train"] = (samples, 0)
    engine.train()
    engine.enter_stage(1)
    engine.generator.step_normal()
    loop(engine).buffer.open("g0", 0)
    loop(engine).training.begin()
    for _ in range(3):
        engine.discriminator.step_normal()
    assert len(seen) == 4
    for maps in seen:
        assert not maps[:, :, :5].any()
        assert torch.allclose(maps[:, :, 5:].sum(1), torch.ones(len(maps), 27, 32))


def test_real_and_fake_have_half_of_the_weight_each() -> None:
    engine: Any = tiny.build("load", QUICK)
    batches = loop(engine).training.batches
    for entries in (1, 2, 3):
        loop(engine).buffer.flush()
        for position in range(entries):
            loop(engine).buffer.open(f"g{position}", position)
        everything = torch.arange(6 * (entries + 1))
        _, _, real, weight = batches._batch("train", everything, batches._window, torch.Generator())
        assert float(weight[real > 0].sum()) == pytest.approx(float(weight[real == 0].sum()))
        assert float(weight.mean()) == pytest.approx(1.0)
        assert real.sum() == 6
        assert weight[real > 0].unique().tolist() == [(entries + 1) / 2]


def test_an_image_and_its_maps_are_flipped_together() -> None:
    engine: Any = tiny.build("load", {**QUICK, "augmentation": {"flip_horizontal": 1.0}})
    batches, samples = loop(engine).training.batches, engine.hook(Segmentation).data.train
    loop(engine).buffer.open("g0", 0)
    maps = torch.randint(7, (10, 32, 32), dtype=torch.uint8)
    loop(engine).buffer.write(0, 0, maps)
    pair = torch.tensor([2, 3])
    image, label, real, _ = batches._batch("train", pair, batches._augmentation, batches._generator)
    assert real.tolist() == [1.0, 0.0]
    assert torch.equal(label[0], samples.masks[1].long().flip(1))
    assert torch.equal(label[1], maps[1].long().flip(1))
    plain = samples.images[1].float() / 127.5 - 1
    assert torch.allclose(image[0], plain.flip(2), atol=1e-5)
    assert torch.allclose(image[1], plain.flip(2), atol=1e-5)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("lookahead.buffer_size=1", "lookahead.buffer_size"),
        ("lookahead.beta_l=-0.1", "lookahead.beta_l"),
        ("lookahead.beta_u=-0.1", "lookahead.beta_u"),
        ("lookahead.beta_l=5", "lookahead.beta_l"),
        ("lookahead.psi=3", "lookahead.psi"),
        ("hold_out.fraction=0.1", "no pixel of"),
        ("start=nowhere.pt", "nowhere.pt: no such checkpoint"),
        ("pretraining={weighted_epochs: 0, epochs: 0}", "an untrained model"),
        ("problems.generator.scheduler={name: exponential, factor: 0.9}", "generator.scheduler"),
        ("problems.pretraining.scheduler={name: reduce_on_plateau}", "stage 1 isn't validated"),
        ("discriminator.name=mobilenet_v3", "discriminator.name"),
        ("adversarial.relaxation=hard", "adversarial.relaxation"),
        ("discriminator.input_size=8", "discriminator.input_size: 8 pixels are too few for 'cnn'"),
        ("augmentation={window: [12, 30]}", "discriminator.input_size: 12 pixels"),
        ("engine.metric=dice", "engine: metric: the mIoU on the hold-out chooses"),
        ("engine.mode=min", "engine: mode"),
        ("engine.patience=3", "engine: patience: lookahead.patience"),
        ("engine.samples=2", "engine: samples"),
        ("lookahead.peak_rule=reach", "set peak_patience as well"),
    ],
)
def test_mistakes_are_one_line(
    override: str, names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_config(tmp_path / "tiny.yaml", "load")
    out = tmp_path / "run"
    assert run.main([str(path), override, "--out", str(out)]) == 2
    assert names in one_line(capsys)
    assert not out.exists(), "nothing was done"


def test_a_start_model_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_config(tmp_path / "two.yaml", "supervised", {"engine.iterations": 1})
    assert run.main([str(path), "--out", str(tmp_path / "two")]) == 0
    other = train(tmp_path, **{"segmentor.channels": 6}, name="wide")
    path = tiny.write_config(tmp_path / "tiny.yaml", "load")
    for run_directory, said in ((tmp_path / "two", "has 2 classes, the data have 7"),
                                (other, "doesn't fit the segmentor")):  # fmt: skip
        capsys.readouterr()
        start = run_directory / "checkpoints" / "best.pt"
        assert run.main([str(path), f"start={start}", "--out", str(tmp_path / "run")]) == 2
        assert said in one_line(capsys)


def test_a_rate_that_destroys_the_model_keeps_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_config(tmp_path / "tiny.yaml", "load", QUICK)
    out = tmp_path / "run"
    code = run.main([str(path), "problems.generator.optimizer.lr=1e38", "--out", str(out)])
    assert code == 1
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("failed: ")]
    assert "after update 1" in line
    state = checkpoint.load(out / "checkpoints" / "best.pt")
    tensors = state["problems"]["generator"]["module"].values()
    assert all(t.isfinite().all() for t in tensors if t.is_floating_point())


# -------------------------------------------------------------------------------- configs

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[3] / "configs").glob("load_*.yaml")
    if "rows:" not in path.read_text()
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_what_their_names_say(path: Path) -> None:
    settings, _ = parse_run(config.load(path))
    assert isinstance(settings, LoadSettings)
    assert settings.data.when_missing == "synthetic", "a fresh machine can try it"
    if path.stem == "load_camvid_small":
        return
    values = settings.lookahead
    assert (values.cycles, values.patience, values.buffer_size) == (50, 50, 3)
    assert (values.beta_l, values.beta_u) == (0.05, 0.001)
    spec = data_set(settings.data.name).spec
    with torch.device("meta"):
        network = build_segmentor(settings.segmentor, spec.channels, spec.num_classes)
    million = sum(p.numel() for p in network.parameters()) / 1e6
    segmentor: Any = settings.segmentor
    mobile = segmentor.encoder == "mobilenet_v2"
    assert million == pytest.approx(4.4 if mobile else 41.0, rel=0.01)


def test_a_dry_run_bounds_what_the_controller_may_ask_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "load")
    assert run.main([str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "at most" in said
    # Two cycles of three updates; the start model has label maps too; 6 + 4 images by threes.
    for piece, times in (("update", 6), ("hold-out, a batch", 14), ("label maps, a batch", 12)):
        (line,) = [s for s in said.splitlines() if f" {piece} " in s and "stage" not in s]
        assert line.split("\u2502")[2].strip() == str(times), line
