"""Label maps before and after, across the cycles, and of a share of the training images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from resuming import Killed, stop_after
from transitions import loop

from mlseg import checkpoint
from mlseg.engines.segmentation import Segmentation
from mlseg.problems.load.cycles import STAGES, stages_of
from mlseg.problems.load.maps import pixels
from mlseg.segmentation.data import to_float

# A cycle that falls, one with a peak, two that find nothing.
SCORES = [0.5, 0.4, 0.53, 0.52, 0.51, 0.4, 0.4, 0.4]
QUICK = {
    "pretraining": {"weighted_epochs": 0, "epochs": 1},
    "lookahead": {"cycles": 2, "patience": 3},
    "discriminator_training.max_epochs": 1,
    "pictures": 2,
    "engine.validate_every": 3,
}


def scripted(out: Path, **changes: Any) -> Any:
    engine: Any = tiny.build("load", {**QUICK, **changes}, out)
    hold_out, controller = loop(engine).hold_out, loop(engine).controller
    hold_out.miou = lambda module: SCORES[controller.updates + (controller.cycle > 0)]
    return engine


def test_what_became_right_is_not_what_changed() -> None:
    samples = tiny.build("load", QUICK).hook(Segmentation).data.val.subset([0, 1])
    samples.masks[:] = 1
    samples.masks[0, 0] = samples.spec.ignore_index or 1
    before = torch.full_like(samples.masks, 2)
    after = before.clone()
    after[0, :2] = 1  # a row that is ignored (if anything is), and one that becomes right
    after[1, :3] = 3  # wrong before and after
    after[1, 5] = 1
    before[1, 6] = 1
    after[1, 6] = 2
    width = samples.masks.shape[-1]
    ignored = samples.spec.ignore_index is not None
    changed, gained = pixels(before, after, samples)
    assert changed.tolist() == [(2 - ignored) * width, 5 * width]
    assert gained.tolist() == [(2 - ignored) * width, 0]


@pytest.mark.slow
def test_maps_across_cycles_are_those_of_their_models(tmp_path: Path) -> None:
    engine = scripted(tmp_path / "all")
    engine.run()
    engine.results()
    folder = tmp_path / "all" / "samples" / "cycles"
    names = json.loads((folder / "images.json").read_text())["images"]
    held = loop(engine).hold_out.samples
    module = engine.generator.module.eval()
    found: dict[str, Any] = {}
    for label, file in (("g0", "start"), ("g2", "best")):
        state = checkpoint.load(tmp_path / "all" / "checkpoints" / f"{file}.pt")
        module.load_state_dict(state["problems"]["generator"]["module"])
        with torch.no_grad():
            found[label] = module(to_float(held.images)).argmax(1)
        places = [held.ids.index(name) for name in names]
        stack = np.asarray(Image.open(folder / f"{label}.png"))
        expected = found[label][places].flatten(0, 1).numpy()
        assert np.array_equal(stack, expected), label
    wrong = (found["g0"] != held.masks).flatten(1).sum(1)
    most = sorted(wrong.tolist(), reverse=True)[:2]
    assert [int(wrong[held.ids.index(name)]) for name in names] == most
    with Image.open(tmp_path / "all" / "samples" / "cycles.png") as picture:
        assert picture.size[0] > 5 * 256, "image, truth, start, an end, a peak"
    # Killed where no checkpoint was, and taken up: the same files.
    stopped = scripted(tmp_path / "killed")
    stop_after(stopped, 14, "killed")
    with pytest.raises(Killed):
        stopped.run()
    again = scripted(tmp_path / "killed")
    again.resume(tmp_path / "killed")
    again.run()
    again.results()
    files = sorted(path.relative_to(tmp_path / "all") for path in folder.rglob("*"))
    assert len(files) > 4
    for made in files:
        assert (tmp_path / "killed" / made).read_bytes() == (tmp_path / "all" / made).read_bytes()


def test_which_stages_are_shown() -> None:
    start = [{"event": "start"}]

    def end(cycle: int, peak: str | None = None) -> dict[str, Any]:
        ending = {"ending": f"g{10 * cycle}", "reason": "divergence"}
        return {"event": "cycle_end", "cycle": cycle, "peak": peak, **ending}

    shown = stages_of([*start, end(1), end(2, "g15"), end(3)])
    words = ["start", "cycle 1: divergence", "cycle 2: divergence", "cycle 2: peak"]
    assert shown == list(zip(["g0", "g10", "g20", "g15"], words, strict=True))
    none = stages_of([*start, end(1), end(2)])
    assert [label for label, _ in none] == ["g0", "g10", "g20"]
    many = stages_of([*start, *(end(n) for n in range(1, 30)), end(30, "g295")])
    assert len(many) == STAGES + 2
    assert (many[0][0], many[-1][0]) == ("g0", "g295")
    assert len(set(many)) == len(many)
    assert stages_of([]) == []


def test_fakes_of_a_share_of_the_training_images(tmp_path: Path) -> None:
    engine = tiny.build("load", {**QUICK, "fakes.fraction": 0.5})
    hook = loop(engine)
    batches, buffer = hook.training.batches, hook.buffer
    train = engine.hook(Segmentation).data.train
    held = len(hook.hold_out)
    assert buffer.shape[0] == len(train) // 2 + held
    faked = [train.ids.index(name) for name in hook.train.ids]
    for position, label in enumerate(("g0", "g1")):
        buffer.open(label, position)
        # An image's map says which image and entry it is of.
        rows = torch.arange(buffer.shape[0], dtype=torch.uint8) + 100 * (position + 1)
        shape = (buffer.shape[0], *buffer.shape[1:])
        buffer.write(position, 0, rows[:, None, None].expand(shape))
    ignore = train.spec.ignore_index
    for part, samples, number, offset in (
        ("train", train, len(faked), 0),
        ("hold_out", hook.hold_out.samples, held, len(faked)),
    ):
        everything = torch.arange(batches._maps(part))
        off = type(batches._augmentation)(batches._window.settings)
        _, labels, real, weights = batches._batch(part, everything, off, torch.Generator())
        assert (real == 1).sum() == len(samples)
        assert (real == 0).sum() == 2 * number
        torch.testing.assert_close(weights[real == 1].sum(), weights[real == 0].sum())
        torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
        wanted = {row + offset + 100 * entry for row in range(number) for entry in (1, 2)}
        seen = set(labels[real == 0].unique().tolist()) - {ignore}
        assert seen == wanted
        truths = labels[real == 1].flatten(1).tolist()
        assert sorted(truths) == sorted(samples.masks.flatten(1).tolist())


def test_all_fakes_are_what_they_were() -> None:
    """The numbers of a pass: image by image the truth, then each entry's map."""
    engine = tiny.build("load", QUICK)
    hook = loop(engine)
    train = engine.hook(Segmentation).data.train
    assert hook.train is train
    hook.buffer.open("g0", 0)
    batches = hook.training.batches
    chosen = torch.tensor([0, 1, 2, 5])
    images, _, real, weights = batches._batch("train", chosen, batches._window, torch.Generator())
    assert real.tolist() == [1, 0, 1, 0]
    assert weights.tolist() == [1, 1, 1, 1]
    assert torch.equal(images, to_float(train.images[[0, 0, 1, 2]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"fakes.fraction": 0.5},
        {"lookahead": {"cycles": 2, "patience": 2, "on_peak": "retain", "buffer_size": 4,
                       "retained_peaks": 2}},
    ],
)  # fmt: skip
def test_they_train_on_real_images(
    changes: dict[str, Any], real: Callable[[str], Path], tmp_path: Path
) -> None:
    data = {"name": "camvid", "image_size": [40, 56], "train": 6, "val": 8, "test": 4}
    common = {"data": {**data, "root": str(real("camvid"))}, "hold_out.fraction": 1.0}
    engine: Any = tiny.build("load", {**QUICK, **common, **changes}, tmp_path)
    hold_out, controller = loop(engine).hold_out, loop(engine).controller
    hold_out.miou = lambda module: 0.5 + 0.01 * min(controller.updates, 4)
    engine.run()
    assert engine.results()["provenance"] == "real"
    assert (tmp_path / "samples" / "cycles.png").exists()
