"""Two and three processes come to what one comes to: every method, every system."""

import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import parallel_cases
import pytest
import torch
from filelock import FileLock
from parallel_cases import CASES
from several_processes import Several

from mlseg import parallel
from mlseg.errors import UserError
from mlseg.hypergradients.registry import classes
from mlseg.multilevel.sharing import own_share
from mlseg.parallel import processes

pytestmark = pytest.mark.slow

COUNTS = (2, 3)


Answers = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What each of so many processes came to: every case within the same processes, which run once
    though pytest may share the cases out among its own."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @cache
    def found(count: int) -> list[dict[str, Any]]:
        folder = base / f"of{count}"
        with FileLock(base / f"of{count}.lock"):
            if not (folder / "0.pt").exists():
                with Several(count, [str(folder)], folder, parallel_cases.main) as running:
                    assert running.wait() == [0] * count, running.said()
        return [torch.load(folder / f"{rank}.pt") for rank in range(count)]

    return found


ADAPTIVE = ("system ", "chain of three", "Adam")
"""Cases whose optimizers divide a gradient by its size."""


@cache
def alone(case: str) -> dict[str, Any]:
    return CASES[case]()


def bound(case: str) -> float:
    """Some hundred operations a step, over ten steps, each with a rounding unit of 1e-16 or 6e-8;
    differences divide by an epsilon of 1e-2. Adam and RMSprop divide a gradient by its own size, or
    by their eps of 1e-8 where it is smaller: of a rounding of 1e-14 that leaves 1e-6 of a rate of
    5e-2 at most."""
    if "float32" in case:
        return 1e-5
    return 1e-7 if case.startswith(ADAPTIVE) and "SGD" not in case else 1e-10


@pytest.mark.parametrize(
    ("count", "case"), [(n, case) for n in COUNTS for case in parallel_cases.cases(n)]
)
def test_as_one(case: str, count: int, answers: Answers) -> None:
    first, *others = (answer[case] for answer in answers(count))
    assert isinstance(first, dict), first
    expected = alone(case)
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        assert all(torch.equal(first[name], other[name]) for other in others), name
        distance = float((first[name] - value).double().norm())
        assert distance <= bound(case) * max(1.0, float(value.double().norm())), name


VALUES = {"K": 3, "P": 2, "R": 5, "T": 2, "N": 15}
"""Of the symbols in docstrings, in these cases."""


@pytest.mark.parametrize("method", classes())
def test_collectives_of_a_hop(method: str, answers: Answers) -> None:
    said = re.search(
        r"Collectives per hop, in several processes: ``(.+?)``", classes()[method].__doc__ or ""
    )
    assert said is not None
    product = re.sub(r"(?<=\w) (?=\w)", " * ", said[1])
    for count in COUNTS:
        assert answers(count)[0]["hops"][method] == eval(product, dict(VALUES))


def test_alone_nothing_is_done() -> None:
    tensors, values = [torch.ones(2)], {"a": 1.0}
    assert parallel.average(tensors) is tensors
    assert parallel.average_some(tensors, tensors) is tensors
    assert parallel.averaged(tensors) is tensors
    assert parallel.summed(tensors[0]) is tensors[0]
    assert parallel.as_mean(tensors[0]) is tensors[0]
    assert parallel.from_first(values) is values
    assert parallel.gather(values) == [values]
    assert parallel.part(7) == (0, 7, 7)
    assert parallel.collectives() == 0


@pytest.mark.parametrize("said", [{"RANK": "2"}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": "-1"}])
def test_a_place_that_cannot_be(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    for name, value in {**whole, **said}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="no place among several processes"):
        parallel.launch()


def test_shares_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    second = processes.Group(processes.Launch(1, 2, 1, 2), None, None)
    monkeypatch.setattr(processes, "_group", second)
    x = torch.arange(4)
    assert own_share({"x": x, "names": ["a", "b", "c", "d"]}, None, "low") == {
        "x": pytest.approx(x[2:]),
        "names": ["c", "d"],
    }
    ragged = (x, torch.arange(3))
    assert own_share(ragged, None, "low") is ragged
    with pytest.raises(UserError, match="problem 'low': a batch of 3 can't be shared equally by 2"):
        own_share(torch.arange(3), None, "low")
