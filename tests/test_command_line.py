"""Options and KEY=VALUE in any order, by every command and script that takes both."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import pytest

from mlseg import calibrate, command_line, compare, data, evaluate, predict, run, sweep

ROOT = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("config", nargs="?")
    made.add_argument("overrides", nargs="*")
    made.add_argument("--seeds", type=int, nargs="+")
    made.add_argument("--only", action="append", default=[])
    made.add_argument("--out")
    made.add_argument("--keys", nargs="?", const="")
    made.add_argument("--dry-run", action="store_true")
    return made


PIECES = (
    ["a.yaml"],
    ["x.y=1", "data.test=[a, b]"],
    ["--seeds", "0", "1"],
    ["--only", "row=ours,vanilla"],
    ["--dry-run"],
)


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(PIECES)))))
def test_in_any_order(order: tuple[int, ...]) -> None:
    """But for the config behind an option of several values, which is one of them."""
    if (2, 0) in itertools.pairwise(order):
        return
    if (2, 1) in itertools.pairwise(order) and order.index(0) == order.index(1) + 1:
        return
    found = command_line.parse(parser(), [w for index in order for w in PIECES[index]])
    assert found.config == "a.yaml"
    assert found.overrides == ["x.y=1", "data.test=[a, b]"]
    assert (found.seeds, found.only, found.dry_run) == ([0, 1], ["row=ours,vanilla"], True)


def test_whose_a_word_with_an_equals_sign_is() -> None:
    found = command_line.parse(
        parser(), ["--out", "a=b", "c=d", "--onl", "e=f", "g=", "--keys", "h=--i", "--only=j=k"]
    )
    assert (found.out, found.only, found.keys) == ("a=b", ["e=f", "j=k"], "")
    assert (found.config, found.overrides) == (None, ["c=d", "g=", "h=--i"])
    found = command_line.parse(parser(), ["runs/row=ours/config.yaml", "--", "a=b"])
    assert (found.config, found.overrides) == ("runs/row=ours/config.yaml", ["a=b"])


def test_behind_two_dashes() -> None:
    for given in (["--", "a=b", "c.yaml", "d=e"], ["a=b", "--", "c.yaml", "d=e"]):
        found = command_line.parse(parser(), given)
        assert (found.config, found.overrides) == ("c.yaml", ["a=b", "d=e"])


@pytest.mark.parametrize("number", ["x", "", "1.5", "seed=1", "-1", "0", "\u00b2"])
def test_no_number(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said names no function of ours."""
    with pytest.raises(SystemExit) as end:
        run.main(["a.yaml", f"--threads={number}"])
    assert end.value.code == 2
    assert f"--threads: {number} isn't 1 to" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        calibrate.main(["runs/a", "--k", number.replace("1.5", "y")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "invalid" not in said


def test_overrides_are_never_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sweep.main([])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("arguments are required: grid\n")


def test_what_is_no_override_is_refused_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["a.yaml", "--seeds", "x=1"], ["a.yaml", "--seeds", "0", "b.yaml"]):
        with pytest.raises(SystemExit) as end:
            command_line.parse(parser(), given)
        assert end.value.code == 2
    assert "--seeds: invalid int value: 'b.yaml'" in capsys.readouterr().err


def test_commands() -> None:
    found = command_line.parse(sweep.parser(), ["g.yaml", "--seeds", "0", "1", "a.b=2"])
    assert (found.seeds, found.overrides) == ([0, 1], ["a.b=2"])
    for command in (run, compare):
        found = command_line.parse(command.parser(), ["--resume", "DIR", "engine.iterations=9"])
        assert (found.config, found.overrides) == (None, ["engine.iterations=9"])


def test_whoever_takes_overrides_reads_them_so() -> None:
    takers = 0
    for folder in ("mlseg", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if '"overrides", nargs=' in text:
                takers += 1
                assert "command_line.parse(" in text, path
    assert takers > 10


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (evaluate, ["runs/a", "--data", "folder", "--root", ""]),
        (evaluate, ["runs/a", "--data", ""]),
        (evaluate, ["runs/a", "--masks", " "]),
        (evaluate, [""]),
        (predict, ["runs/a", "", "--out", "out"]),
        (predict, ["runs/a", "images", "--out", ""]),
        (data, ["kvasir", "--root", ""]),
        (calibrate, [""]),
        (sweep, [""]),
    ],
)
def test_an_empty_name_is_not_the_working_folder(
    command: Any, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(given)
    assert end.value.code == 2
    assert "an empty name" in capsys.readouterr().err
    assert run.main([""]) == 2
    assert "an empty name" in capsys.readouterr().err
