"""Loaders that share their passes, and loaders without batches."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scaled import Lower, X, Y, program
from torch.utils.data import DataLoader, TensorDataset

from mlseg import EngineSettings
from mlseg.errors import RunError, UserError

STOCHASTIC = {"method": "stochastic", "iterations": 2}
INDEX = torch.arange(6)
BATCHES = [(X[i : i + 2], Y[i : i + 2], INDEX[i : i + 2]) for i in range(0, 6, 2)]


class Seeing(Lower):
    def training_step(self, batch: Any) -> Any:
        if not self.replaying:
            self.seen = [*getattr(self, "seen", []), batch[2].tolist()]
        return super().training_step(batch)


def seen(method: Any, loader: Any) -> list[list[int]]:
    torch.manual_seed(0)
    engine = program(
        method, loader=loader, lower=Seeing, rate=1e-4, settings=EngineSettings(iterations=6)
    )
    engine.run()
    return engine.lower.seen


def test_persistent_workers_see_every_example_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def loader() -> Any:
        data = TensorDataset(X, Y, INDEX)
        return DataLoader(data, 2, shuffle=True, num_workers=1, persistent_workers=True)

    found = seen(STOCHASTIC, loader())
    passes = [sorted(i for batch in part for i in batch) for part in (found[:3], found[3:])]
    assert passes == [list(range(6))] * 2
    assert found == seen("identity", loader())
    # Garbage doesn't tell its workers to end: torch waits so many seconds, then ends them.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    gc.collect()


class Shared:
    """``iter`` gives one iterator."""

    def __init__(self) -> None:
        self.iterator = iter(BATCHES * 9)

    def __iter__(self) -> Iterator[Any]:
        return self.iterator


class Cursor:
    """Its place is its own attribute."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        self.at = 0
        while self.at < len(BATCHES):
            self.at += 1
            yield BATCHES[self.at - 1]


class Keeping(list[Any]):
    """Keeps its place for checkpoints, as torchdata's."""

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("loader", [Shared(), Cursor(), Keeping(BATCHES), iter(BATCHES * 9)])
def test_loaders_with_one_pass_at_a_time_are_refused(loader: Any) -> None:
    with pytest.raises(UserError, match="'lower': its loader can be walked through only once"):
        seen(STOCHASTIC, loader)


def test_they_are_fine_for_others() -> None:
    expected = [i.tolist() for _, _, i in BATCHES * 2]
    for loader in (Shared(), Cursor(), Keeping(BATCHES)):
        assert seen("identity", loader) == expected


@pytest.mark.parametrize(
    "loader", [[], DataLoader(TensorDataset(X), 8, drop_last=True)], ids=["list", "DataLoader"]
)
def test_an_empty_loader_is_refused_before_any_work(loader: Any) -> None:
    with pytest.raises(UserError, match=r"'lower': its loader gives no batch; .*drop_last"):
        program("identity", loader=loader)


def test_one_that_turns_out_to_be_empty() -> None:
    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(UserError, match="'lower': its loader gives no batch"):
        program("identity", loader=Unsized()).iterate()


def test_one_that_is_used_up() -> None:
    engine = program("identity", loader=iter(BATCHES[:1]))
    engine.iterate()
    with pytest.raises(RunError, match=r"'lower': .* is used up; give it one that starts anew"):
        engine.iterate()


def test_batches_of_ones_own_that_are_used_up() -> None:
    class Own(Lower):
        batches = iter(BATCHES[:1])

        def get_batch(self) -> Any:
            return next(self.batches)

    engine = program("identity", lower=Own)
    engine.iterate()
    with pytest.raises(RunError, match="'lower': its get_batch raised StopIteration"):
        engine.iterate()


@pytest.mark.parametrize(
    ("loader", "what"),
    [
        (5, "of type int"),
        (torch.utils.data.DataLoader, "the class DataLoader"),
        (lambda: [(X, Y)], "of type function, which can't be iterated over; call it"),
        (([(X, Y)], None), "of type NoneType"),
    ],
)
def test_what_no_batches_can_come_from(loader: Any, what: str) -> None:
    with pytest.raises(UserError, match=f"'lower': its loader is {what}"):
        program("identity", loader=loader)
