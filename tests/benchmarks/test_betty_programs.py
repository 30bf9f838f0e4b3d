"""Programs written for Betty come to the same numbers on our engine; the script says so."""

from collections.abc import Callable

import betty_programs
import pytest
import torch
from betty_parts import ON, PROGRAMS
from betty_programs import REPLAYED, TOLERANCE, difference, main


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_the_same_numbers(name: str) -> None:
    theirs, ours, derived = (betty_programs.run(name, on) for on in ON.values())
    assert difference(ours, theirs) <= TOLERANCE
    if name == REPLAYED:
        assert difference(derived, theirs) > 1e-3, "replayed: another gradient than Betty's"
    else:
        assert difference(derived, theirs) <= TOLERANCE


def test_the_script(script: Callable[..., str]) -> None:
    head, line = script("betty_programs", "graph").splitlines()
    assert head.split() == ["program", "Betty", "ours", "mlseg.Problem", "difference"]
    name, *numbers, worst, verdict = line.split()
    assert (name, len(set(numbers)), float(worst), verdict) == ("graph", 1, 0.0, "same")


def test_another_number_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = iter([1.0, 1.0, 1.0 + 1e-6])
    monkeypatch.setitem(PROGRAMS, "graph", lambda on: {"x": torch.tensor(next(drawn))})
    assert main(["graph"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    assert difference({"x": torch.ones(2)}, {}) == float("inf")
    assert difference({"x": torch.tensor(float("nan"))}, {"x": torch.tensor(1.0)}) == float("inf")
