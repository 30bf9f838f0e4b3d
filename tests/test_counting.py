"""A dry run counts what an iteration asks for, and does none of it."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from mlseg.counting import NEEDS_NUMBERS, counted, faked, held_bytes
from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.multilevel.problem import Problem
from mlseg.segmentation.data import DataSettings, load_data
from mlseg.segmentation.data.samples import shapes_alone

BATCH, WIDTH = 8, 512


class Wide(Problem):
    """One linear layer."""

    def training_step(self, batch: Any) -> Tensor:
        return (self.module(batch[0]) ** 2).sum()


def engine(kind: type = Wide, optimizer: Any = torch.optim.Adam) -> Any:
    module = nn.Linear(WIDTH, WIDTH, bias=False)
    data = [(torch.ones(BATCH, WIDTH),)]
    level = kind("wide", module, optimizer(module.parameters(), 1e-3), data)
    return Engine([level], EngineSettings(iterations=3), device="cpu", quiet=True)


def test_flops_and_memory_are_those_of_the_formulas() -> None:
    made = engine()
    weights = WIDTH * WIDTH * 4
    assert held_bytes(made) == weights
    with faked(made):
        count = counted(made.iterate)
    # Forward, and backward to the weights; the input wants no gradient.
    assert count.flops == 2 * 2 * BATCH * WIDTH * WIDTH
    # The gradient and two moments at least; Adam's step has a few more in passing.
    assert 3 * weights <= count.peak <= 7 * weights


def test_as_many_flops_as_are_done() -> None:
    done, fake = tiny.build("supervised"), tiny.build("supervised")
    with faked(fake):
        expected = counted(fake.iterate)
    assert counted(done.iterate).flops == expected.flops > 1e6


def test_no_work_is_done() -> None:
    made = engine()
    before = made.wide.module.weight
    with faked(made):
        counted(made.iterate)
        assert not any(type(p) is nn.Parameter for p in made.wide.module.parameters())
    assert before.grad is None, "the real weights were left alone"


def test_a_step_that_looks_at_numbers_is_told() -> None:
    class Looks(Wide):
        def training_step(self, batch: Any) -> Tensor:
            loss = super().training_step(batch)
            return loss if loss.item() > 0.0 else -loss

    made = engine(Looks)
    with faked(made), pytest.raises(NEEDS_NUMBERS):
        counted(made.iterate)


def test_no_image_is_drawn_for_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*args: Any) -> Any:
        raise AssertionError("drawn")

    monkeypatch.setattr("mlseg.segmentation.data.standins.synthetic_lesions", drawn)
    settings = DataSettings(name="synthetic_lesions", image_size=64, train=5, val=3, test=1000)
    with shapes_alone():
        data = load_data(settings)
    assert data.test.images.shape == (1000, 3, 64, 64)
    assert data.test.images.untyped_storage().nbytes() == 3 * 64 * 64
    assert data.train.masks.unique().tolist() == [0, 1]
    assert len(set(data.train.ids + data.val.ids + data.test.ids)) == 1008
    with pytest.raises(AssertionError, match="drawn"):
        load_data(settings)
