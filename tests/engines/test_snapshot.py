"""Copies of a model and its optimizer, however its state comes and goes."""

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from mlseg.engines.snapshot import Snapshot

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))


class Training:
    """A network that steps on random numbers."""

    def __init__(self, name: str) -> None:
        self.module = network()
        self.optimizer = OPTIMIZERS[name](self.module.parameters())

    def step(self, times: int = 1, first_alone: bool = False) -> None:
        for _ in range(times):
            self.optimizer.zero_grad()
            self.module(torch.randn(3, 1, 6, 6)).square().mean().backward()
            if first_alone:
                for parameter in list(self.module.parameters())[1:]:
                    parameter.grad = None
            self.optimizer.step()

    def state(self) -> Any:
        return copy.deepcopy([self.module.state_dict(), self.optimizer.state_dict()])


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_put_back_any_number_of_times(name: str, before: int) -> None:
    training = Training(name)
    snapshot = Snapshot(training.module, training.optimizer)
    for _ in range(3):
        training.step(before)
        snapshot.take()
        expected = training.state()
        for times in (1, 2):
            training.step(times)
            assert not tiny.same(training.state(), expected)
            snapshot.restore()
            assert tiny.same(training.state(), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_whose_state_was_replaced(name: str) -> None:
    """Loading a state makes new tensors: a plan for the old ones mustn't be followed."""
    training = Training(name)
    training.step()
    snapshot = Snapshot(training.module, training.optimizer)
    for _ in range(2):
        snapshot.take()
        expected = training.state()
        training.step()
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
        snapshot.restore()
        assert tiny.same(training.state(), expected)
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
        training.step()
        snapshot.take()
        expected = training.state()
        training.step()
        snapshot.restore()
        assert tiny.same(training.state(), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_not_all_parameters_have(name: str) -> None:
    training = Training(name)
    training.step(first_alone=True)
    snapshot = Snapshot(training.module, training.optimizer)
    for _ in range(2):
        snapshot.take()
        expected = training.state()
        training.step()
        snapshot.restore()
        assert tiny.same(training.state(), expected)
        training.step(2)


def test_settings_of_the_optimizer_come_back() -> None:
    training = Training("adam")
    snapshot = Snapshot(training.module, training.optimizer)
    snapshot.take()
    for _ in range(2):
        training.optimizer.param_groups[0]["lr"] = 5.0
        snapshot.restore()
        assert training.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_that_was_saved(name: str) -> None:
    training = Training(name)
    training.step(2)
    snapshot = Snapshot(training.module, training.optimizer)
    snapshot.take()
    expected, saved = training.state(), copy.deepcopy(snapshot.state_dict())
    training.step()
    snapshot.take()
    snapshot.load_state_dict(saved)
    for _ in range(2):
        training.step()
        snapshot.restore()
        assert tiny.same(training.state(), expected)


def test_one_that_was_saved_in_another_memory_layout() -> None:
    """Fused optimizers step through weights and moments side by side; a fresh one has none yet."""
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=memory_format))
        module = nn.ParameterList([weight])
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        weight.grad = torch.randn(weight.shape).to(memory_format=memory_format)
        optimizer.step()
        before = Snapshot(module, optimizer)
        before.take()
        other = nn.Parameter(torch.zeros(4, 3, 3, 3))
        later = torch.optim.Adam([other], lr=0.1, fused=True)
        snapshot = Snapshot(nn.ParameterList([other]), later)
        snapshot.load_state_dict(before.state_dict())
        snapshot.restore()
        other.grad = weight.grad.contiguous()
        later.step()
        found.append(other.detach())
    torch.testing.assert_close(found[1], found[0])
