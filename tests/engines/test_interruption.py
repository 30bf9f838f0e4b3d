"""Signals, kills, full disks and damaged files, through the command in a process of its own."""

import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import pytest
import tiny
import torch
from children import Child

from mlseg import checkpoint, run
from mlseg.engines.interruption import Interruption

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")

LONG = {"engine.iterations": 100_000, "engine.checkpoint_every": 1_000}


def config(tmp_path: Path, changes: dict[str, Any]) -> str:
    return str(tiny.write_config(tmp_path / "config.yaml", changes=changes))


def until(condition: Callable[[], bool], child: Child) -> None:
    """Wait for something that a running child does."""
    limit = time.monotonic() + 60
    while not condition():
        code = child.poll()
        assert code is None, (code, child.lines())
        assert time.monotonic() < limit
        time.sleep(0.02)


def logged(out: Path) -> Callable[[], bool]:
    path = out / "metrics.jsonl"
    return lambda: path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_exits(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    # 40 lines or so fill the file's buffer and reach the disk.
    child = Child([config(tmp_path, LONG), "--out", str(out)], tmp_path / "err")
    until(logged(out), child)
    child.kill(number)
    assert child.wait() == 128 + number
    step = checkpoint.load(out / "checkpoints" / "last.pt")["engine"]["global_step"]
    assert step > 0
    assert child.lines()[-1] == (
        f"{number.name}: stopped and saved after step {step}; go on with --resume"
    )
    assert not any("Traceback" in line for line in child.lines())
    logged_steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert logged_steps[-1] == step  # nothing was lost
    assert json.loads((out / "events.jsonl").read_text().splitlines()[-1])["event"] == "interrupted"


@pytest.mark.parametrize(
    ("number", "before", "heard"),
    [
        (signal.SIGHUP, signal.SIG_DFL, True),
        (signal.SIGHUP, signal.SIG_IGN, False),  # nohup
        (signal.SIGINT, signal.SIG_IGN, True),  # as shells start what runs behind a script
    ],
)
def test_what_is_heard_of_a_signal(
    number: signal.Signals, before: signal.Handlers, heard: bool
) -> None:
    former = signal.signal(number, before)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.requested == heard
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, former)


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    """For who can't wait for the step: the default action, here KeyboardInterrupt."""
    out = tmp_path / "run"
    arguments = [config(tmp_path, LONG), "--out", str(out)]
    child = Child(arguments, tmp_path / "err", children.slow_steps)
    until(
        lambda: (out / "events.jsonl").exists() and (out / "events.jsonl").stat().st_size > 0, child
    )
    started = time.monotonic()
    child.kill(signal.SIGINT)
    time.sleep(0.1)
    child.kill(signal.SIGINT)
    child.wait()
    assert time.monotonic() - started < 10


# ------------------------------------------------------------------------------ SIGKILL

RUN = {
    "engine.iterations": 60,
    "engine.validate_every": 10,
    "engine.checkpoint_every": 3,
}


def final(out: Path) -> dict[str, Any]:
    """What a run leaves, apart from how long it took."""
    state = checkpoint.load(out / "checkpoints" / "last.pt")
    best = checkpoint.load(out / "checkpoints" / "best.pt")
    results = json.loads((out / "results.json").read_text())
    del state["engine"]["seconds"], results["seconds"], state["records"]
    del results["threads"]["chosen_by"]  # a resumed run takes those that it began with
    files = ("events.jsonl", "config.yaml", "splits.json")
    return {
        "metrics": tiny.untimed((out / "metrics.jsonl").read_text()),
        "last": state,
        "best": best["problems"],
        "results": results,
        **{name: (out / name).read_text() for name in files},
    }


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Three SIGKILLs: the end is that of a run which nobody touched."""
    path = config(tmp_path, RUN)
    through = Child([path, "--out", str(tmp_path / "through")], tmp_path / "err")
    started = time.monotonic()
    assert through.wait() == 0, through.lines()
    length = time.monotonic() - started
    expected = final(tmp_path / "through")

    out = tmp_path / "killed"
    draw, kills, arguments = random.Random(0), 0, [path, "--out", str(out)]
    while kills < 3:
        child = Child(arguments, tmp_path / "err")
        until((out / "config.yaml").exists, child)
        time.sleep(draw.uniform(0.0, 0.4 * length))
        child.kill()
        if child.wait() == -signal.SIGKILL:
            kills += 1
        arguments = ["--resume", str(out)]
    child = Child(arguments, tmp_path / "err")
    assert child.wait() == 0, child.lines()
    found = final(out)
    for key, value in expected.items():
        assert tiny.same(found[key], value), key
    assert not list(out.rglob("*.partial"))


# ------------------------------------------------------------------------------ full disk


@pytest.mark.parametrize("tensorboard", [False, True])
@pytest.mark.parametrize(
    ("size", "file"),
    [
        (20_000, "run/checkpoints/last.pt"),
        # The records fill up first: checkpoints come later.
        (6_000, "run"),
    ],
)
def test_a_full_disk_is_one_line_and_exit_code_1(
    tmp_path: Path, size: int, file: str, tensorboard: bool
) -> None:
    out = tmp_path / "run"
    changes = {
        "engine.iterations": 1000,
        "engine.validate_every": 0,
        "engine.checkpoint_every": 20 if "last.pt" in file else 1000,
        "engine.tensorboard": tensorboard,
    }
    path = config(tmp_path, changes)
    limit = functools.partial(children.limit_files, size)
    child = Child([path, "--out", str(out)], tmp_path / "err", limit)
    assert child.wait() == 1, child.lines()
    failures = [line for line in child.lines() if line.startswith("failed: ")]
    assert len(failures) == 1
    assert f"{tmp_path / file}: " in failures[0]
    assert "File too large" in failures[0]
    assert not any("Traceback" in line for line in child.lines()), child.lines()
    assert not list(out.rglob("*.partial"))


def test_a_disk_that_fills_up_later_keeps_the_former_checkpoint(tmp_path: Path) -> None:
    """And the run goes on from there once there is room."""
    out = tmp_path / "run"
    path = config(tmp_path, {"engine.iterations": 6, "engine.checkpoint_every": 2})
    arguments = [path, "--out", str(out), "engine.validate_every=0"]
    child = Child(arguments, tmp_path / "err", children.fill_up_later)
    assert child.wait() == 1
    (failure,) = [line for line in child.lines() if line.startswith("failed: ")]
    assert failure.endswith("; the one written before it is kept")
    assert checkpoint.load(out / "checkpoints" / "last.pt")["engine"]["global_step"] == 2
    child = Child(["--resume", str(out)], tmp_path / "err")
    assert child.wait() == 0, child.lines()


# ------------------------------------------------------------------------- damaged files


def test_a_truncated_checkpoint_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    changes = {"engine.iterations": 1, "data.train": 2, "data.val": 1, "data.test": 1}
    assert run.main([config(tmp_path, changes), "--out", str(out)]) == 0
    last = out / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    capsys.readouterr()
    assert run.main(["--resume", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {last}: truncated or not a checkpoint")
    assert torch.get_num_threads() >= 1


def test_a_nan_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"problems.segmentor.optimizer": {"name": "sgd", "lr": 1e30}, "engine.log_every": 1}
    path = config(tmp_path, changes)
    assert run.main([path, "--out", str(tmp_path / "run")]) == 1
    failures = [s for s in capsys.readouterr().err.splitlines() if s.startswith("failed: ")]
    assert len(failures) == 1
    assert "'segmentor'" in failures[0]
