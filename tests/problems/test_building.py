"""What systems build alike: the same parts for the same name, and levels that are checked."""

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from mlseg.multilevel.config import Config
from mlseg.problems.building import Builder
from mlseg.problems.supervised import Segmentor, SupervisedSettings
from mlseg.segmentation.data import load_data
from mlseg.segmentation.losses import LossSettings, build_loss


@pytest.fixture(scope="module")
def settings() -> SupervisedSettings:
    return SupervisedSettings.model_validate(tiny.values())


@pytest.fixture(scope="module")
def make(settings: SupervisedSettings) -> Builder:
    return Builder(settings, load_data(settings.data).spec)


def test_a_level_is_complete_when_made(make: Builder, settings: SupervisedSettings) -> None:
    setup = make.level("segmentor", settings.problems.segmentor, make.segmentor())
    criterion = build_loss(LossSettings())
    level = Segmentor(setup, criterion=criterion)
    assert (level.name, level.module, level.optimizer) == (
        setup.name,
        setup.module,
        setup.optimizer,
    )
    image, mask = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    torch.testing.assert_close(
        level.training_step((image, mask)), criterion(setup.module(image), mask)
    )
    with pytest.raises(TypeError, match="criterion"):
        Segmentor(setup)  # type: ignore[call-arg]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_networks_are_channels_last_on_a_gpu_alone(
    make: Builder, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "device", torch.device(device))
    networks = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 4, 3)
    make.lay_out(*networks)
    for network in networks:
        last = network.weight.is_contiguous(memory_format=torch.channels_last)
        assert (last, network.weight.is_contiguous()) == (device == "cuda", device == "cpu")


def test_changes_to_a_levels_config_are_checked(
    make: Builder, settings: SupervisedSettings
) -> None:
    def config(**changes: Any) -> Config:
        made = make.level("a", settings.problems.segmentor, nn.Linear(1, 1), **changes).config
        assert made is not None
        return made

    assert config().retain_graph is False
    changed = config(retain_graph=True)
    assert changed.retain_graph is True
    assert changed.hypergradient == config().hypergradient
    with pytest.raises(TypeError, match="unroll_step"):
        config(unroll_step=7)
    with pytest.raises(ValueError, match="unroll_steps 0: at least 1"):
        config(unroll_steps=0)


def test_parts_of_one_name_are_the_same_at_one_seed(
    make: Builder, settings: SupervisedSettings
) -> None:
    data, level = load_data(settings.data), settings.problems.segmentor
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = make.segmentor(), make.segmentor()
    assert tiny.same(first.state_dict(), second.state_dict())
    a, b, other = (make.loader(name, level, data.train) for name in ("x", "x", "y"))
    orders = [torch.cat([image for image, _ in loader]) for loader in (a, b, other)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(torch.get_rng_state(), before), "training's own draws notice nothing"


def test_a_second_segmentor_has_a_name_of_its_own(make: Builder) -> None:
    first = make.segmentor().state_dict()
    other = make.segmentor("teacher").state_dict()
    assert not tiny.same(first, other)
    with pytest.warns(UserWarning, match=r"a second segmentor 'segmentor' starts from the same w"):
        again = make.segmentor().state_dict()
    assert tiny.same(first, again)
