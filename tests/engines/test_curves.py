"""TensorBoard's curves and the lines of a run that goes on: each step once, wherever it stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mlseg.engines.curves import KEPT, cut_off
from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import RunError
from mlseg.testing import programs


def write(folder: Path, steps: range, clock: float, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of events, as a run writes it whose clock says so."""
    before = set(folder.glob("*"))
    with monkeypatch.context() as patched:
        patched.setattr("time.time", lambda: clock)
        with SummaryWriter(str(folder)) as writer:
            for step in steps:
                writer.add_scalar("loss", 1.0 / step, step)
                writer.add_scalar("rate", 0.1, step)
    (made,) = set(folder.glob("*")) - before
    return made


def steps(folder: Path, tag: str = "loss") -> list[int]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


@pytest.mark.parametrize("clock", [2000.0, 500.0], ids=["later", "went back"])
def test_a_run_goes_on_with_the_step_after(
    tmp_path: Path, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path, range(1, 8), 1000.0, monkeypatch)
    first.write_bytes(first.read_bytes()[:-5])  # killed while it wrote
    cut_off(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == [KEPT]
    write(tmp_path, range(5, 10), clock, monkeypatch)
    assert steps(tmp_path) == steps(tmp_path, "rate") == list(range(1, 10))
    cut_off(tmp_path, 6)
    write(tmp_path, range(7, 9), clock - 100, monkeypatch)
    assert steps(tmp_path) == list(range(1, 9))


def test_a_run_that_starts_anew_removes_the_curves_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(1, 4), 1000.0, monkeypatch)
    (tmp_path / "notes.txt").write_text("a user's")
    cut_off(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_steps_that_stand_there_twice_are_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older runs have them, or one that was killed between keeping and removing."""
    write(tmp_path, range(1, 5), 1000.0, monkeypatch)
    write(tmp_path, range(3, 7), 1001.0, monkeypatch)
    cut_off(tmp_path, 5)
    assert steps(tmp_path) == list(range(1, 6))


def make(out: Path, iterations: int) -> Engine:
    made: Any = programs.small(
        programs.GRAPHS["two levels"],
        {"method": "identity", "linearise": "before_step", "scale": "optimizer"},
        lambda params: torch.optim.SGD(params, 0.01),
        settings=EngineSettings(
            iterations=iterations, validate_every=0, log_every=1, checkpoint_every=2
        ),
        out=out,
    )
    return made


@pytest.mark.parametrize("lost", [0, 3, 40], ids=["nothing", "a part of a line", "lines"])
def test_lines_are_whole_after_a_power_cut(tmp_path: Path, lost: int) -> None:
    """Files may be shorter than the checkpoint says: what was cut in the middle is left out."""
    make(tmp_path, 4).run()
    for name in ("metrics.jsonl", "events.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size - lost])
    engine = make(tmp_path, 6)
    engine.resume(tmp_path)
    engine.run()
    for name in ("metrics.jsonl", "events.jsonl"):
        found = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        entries = [(e["step"], e.get("problem"), e.get("event")) for e in found]
        assert len(set(entries)) == len(entries)
        assert found[-1]["step"] == 6
    assert sorted(set(steps(tmp_path / "tensorboard", "low/loss"))) == list(range(1, 7))
    assert len(steps(tmp_path / "tensorboard", "low/loss")) == 6


def test_a_run_killed_before_its_first_checkpoint_leaves_no_curves(tmp_path: Path) -> None:
    engine = make(tmp_path, 6)

    def save(name: str = "last") -> None:
        raise KeyboardInterrupt

    engine.save = save  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert steps(tmp_path / "tensorboard", "low/loss") == [1, 2]
    make(tmp_path, 6).run()
    assert steps(tmp_path / "tensorboard", "low/loss") == list(range(1, 7))


@pytest.mark.parametrize("room", [0, 200])
def test_a_disk_without_room_for_curves_is_one_line(
    tmp_path: Path, room: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether TensorBoard's file can't be begun, or its thread finds the disk full later."""
    resource = pytest.importorskip("resource")
    engine = make(tmp_path, 6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(RunError, match=r"can't write .*: \[Errno 27\] File too large"):
            engine.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Traceback" not in capfd.readouterr().err
