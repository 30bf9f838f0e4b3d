"""A few trials of each kind, and that a failure would be seen, counted and kept."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
import torch
from trials import mutations
from trials.child import Task, call
from trials.fixtures import Fixtures
from trials.judge import Failure, Outcome, clean, files, unchanged

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux"),
    pytest.mark.slow,
]

NUMBERS = {"kills": 3, "together": 1, "commands": 2, "disks": 3}
"""Trials by kind; the others start a command or two."""


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fixtures]:
    threads = torch.get_num_threads()
    yield Fixtures(tmp_path_factory.mktemp("fixtures"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_few_of_each_kind(kind: str, tmp_path: Path, fixtures: Fixtures) -> None:
    for number in range(NUMBERS.get(kind, 8)):
        outcome = faults.attempt(kind, 1, number, tmp_path, fixtures)
        assert outcome.verdict != "failed", f"--only {kind} --seed 1 --number {number}: {outcome}"


def test_a_failure_is_counted_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
        (folder / "given").write_text("bad")
        if draw.random() < 0.5:
            raise Failure("the run is gone")
        return Outcome("refused")

    monkeypatch.setattr(faults, "KINDS", {"gone": trial})
    keep = ["--keep", str(tmp_path / "kept"), "--out", str(tmp_path / "table.md")]
    assert faults.main(["--only", "gone", "--trials", "20", *keep]) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| gone ")]
    tried, right, refused, failed, kills = (int(cell) for cell in rows[0].split("|")[2:-1])
    assert (tried, right, kills) == (20, 0, 0)
    assert refused + failed == 20
    assert 0 < failed < 20
    kept = sorted((tmp_path / "kept").iterdir())
    assert len(kept) == failed
    assert (kept[0] / "given").read_text() == "bad"
    why, again = (kept[0] / "again.sh").read_text().splitlines()
    assert "the run is gone" in why
    number = kept[0].name.rpartition("_")[2]
    assert again.endswith(f"--only gone --seed 0 --number {number}")
    assert rows[0] in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    assert faults.main(["--only", "gone", "--number", number, *keep]) == 1
    assert "| gone | 1 | 0 | 0 | 1 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "traceback: KeyError"),
        ("hangs", "hangs"),
        ("grows", "MiB, 64 are allowed"),
        ("silent", "0 lines of failure"),
        ("dies", "exit code -9"),
    ],
)
def test_what_goes_wrong_is_seen(tmp_path: Path, function: str, words: str) -> None:
    task = Task(f"wrong:{function}", (), tmp_path / "place", seconds=1.0, memory=64)
    with pytest.raises(Failure, match=words):
        clean(call(task))


def test_what_is_touched_is_seen(tmp_path: Path) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    for folder in (own, theirs):
        folder.mkdir()
        (folder / "file").write_text("1")
    before = files(tmp_path, but=[own])
    (own / "file").write_text("2")
    unchanged(before, files(tmp_path, but=[own]))
    os.utime(theirs / "file", ns=(0, 0))
    (tmp_path / "new").mkdir()
    with pytest.raises(Failure, match="new, theirs/file"):
        unchanged(before, files(tmp_path, but=[own]))


def test_damage_is_damage_and_repeats_by_its_seed() -> None:
    data = bytes(range(256)) * 4
    made = [mutations.damaged(random.Random(seed), data) for seed in range(200)]
    assert data not in made
    assert len(set(made)) > 190
    assert made == [mutations.damaged(random.Random(seed), data) for seed in range(200)]
    assert mutations.damaged(random.Random(0), b"") is not None


def test_changes_reach_every_place_and_leave_the_original() -> None:
    value = {"a": {"b": [1, 2.5, "x"], "c": None}, "d": (True, {"e": 0})}
    text = json.dumps(value)
    reached = set()
    for seed in range(400):
        _, said = mutations.changed(random.Random(seed), value)
        reached |= {words[1] for words in (change.split(" ") for change in said) if len(words) > 1}
    wanted = {".".join(map(str, place)) for place in mutations.places(value)}
    assert wanted <= reached
    assert json.dumps(value) == text
