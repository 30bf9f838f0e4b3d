"""Alternating descent and ascent in place of the lookahead: what steps on what, in which order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from resuming import check

from mlseg.engines.engine import Engine
from mlseg.engines.segmentation import Segmentation

QUICK = {"pretraining": {"weighted_epochs": 0, "epochs": 1}, "pictures": 0}


def alternating(out: Path | None = None, **changes: Any) -> Any:
    return tiny.build("load", {**QUICK, "descent_ascent": 5, **changes}, out)


def test_half_of_a_batch_is_what_the_generator_makes_now() -> None:
    engine = alternating()
    generator, discriminator = engine.generator, engine.discriminator
    generator.module.train()
    images, labels, real, weights = discriminator.get_batch()
    half = len(real) // 2
    assert len(real) == engine.hook(Segmentation).data.train.images[:4].shape[0]
    assert real.tolist() == [1.0] * half + [0.0] * half
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(images[:half], images[half:])
    with torch.no_grad():
        maps = generator.module.eval()(images[:half]).argmax(1)
    ignore = discriminator.ignore_index
    truth = labels[:half]
    expected = maps if ignore is None else torch.where(truth == ignore, truth, maps)
    assert torch.equal(labels[half:], expected)


def test_pixels_that_are_ignored_tell_nothing() -> None:
    engine = alternating()
    discriminator = engine.discriminator
    discriminator.ignore_index = 1
    _, labels, _, _ = discriminator.get_batch()
    half = len(labels) // 2
    there = labels[:half] == 1
    assert there.any()
    assert (labels[half:][there] == 1).all()


def test_the_discriminator_steps_first_and_no_step_is_taken_back(tmp_path: Path) -> None:
    engine = alternating(tmp_path)
    order: list[str] = []
    for name in ("discriminator", "generator"):
        problem = getattr(engine, name)
        problem.grad_callback = lambda name=name: order.append(name)
    engine.run()
    assert order == ["discriminator", "generator"] * 5
    results = engine.results()
    assert results["updates"] == 5
    assert results["stopped_early"]
    assert not (tmp_path / "buffer").exists()
    assert (tmp_path / "convergence.png").exists()
    best, start = (results["scores"][name]["val_hold_out"]["miou"] for name in ("best", "start"))
    assert best >= start


def test_two_things_in_the_lookaheads_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"descent_ascent: control takes .*drop one of them"):
        alternating(control=3)
    with pytest.raises(ValueError, match=r"discriminator.batch_size: half .*give 2 or more"):
        alternating(None, **{"problems.discriminator.batch_size": 1})


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_it_goes_on_bit_for_bit(tmp_path: Path, weight: float) -> None:
    def made(out: Path) -> Engine:
        changes: dict[str, Any] = {
            "adversarial.cross_entropy": weight,
            "discriminator.dropout": 0.2,
            "engine.validate_every": 2,
        }
        engine: Engine = alternating(out, **changes)
        return engine

    check(made, tmp_path, [2, 5, 6], "saved")


@pytest.mark.slow
def test_it_trains_on_real_images(real: Callable[[str], Path], tmp_path: Path) -> None:
    data = {"name": "camvid", "image_size": [40, 56], "train": 6, "val": 8, "test": 4}
    changes = {"data": {**data, "root": str(real("camvid"))}, "hold_out.fraction": 1.0}
    engine = alternating(tmp_path, **changes)
    before = tiny.weights(engine)
    engine.run()
    assert engine.results()["provenance"] == "real"
    after = tiny.weights(engine)
    for name in ("generator", "discriminator"):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(name))
