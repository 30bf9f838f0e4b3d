"""The command in several processes: one directory, one voice, one end; killed, stopped, resumed."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from several_processes import Several

from mlseg import checkpoint, evaluate, run, sweep
from mlseg.errors import UserError

CHANGES = {
    "problems.segmentor.batch_size": 4,
    "engine.iterations": 12,
    "engine.validate_every": 4,
    "engine.log_every": 3,
    "augmentation": "combine",
    "data.train": 10,
}
PAUSE = 0.1


def config(folder: Path, changes: dict[str, Any] | None = None) -> str:
    return str(tiny.write_config(folder / "tiny.yaml", changes={**CHANGES, **(changes or {})}))


def ending(out: Path) -> dict[str, Any]:
    """What must not depend on whether the run was interrupted."""
    state = checkpoint.load(out / "checkpoints" / "last.pt")
    del state["engine"]["seconds"]
    state["records"].pop("offsets")
    results = json.loads((out / "results.json").read_text())
    return {
        "state": state,
        "metrics": tiny.untimed((out / "metrics.jsonl").read_text()),
        "scores": results["scores"],
        "best": results["best"],
    }


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nobody touched; its directory."""
    folder = tmp_path_factory.mktemp("through")
    arguments = [config(folder), "--out", str(folder / "run")]
    with Several(2, arguments, folder) as running:
        assert running.wait() == [0, 0], running.said()
        assert running.ranks[1].lines() == []
        assert any(line.startswith("Writing to") for line in running.ranks[0].lines())
    return folder / "run"


def test_one_writes(through: Path) -> None:
    results = json.loads((through / "results.json").read_text())
    assert results["world_size"] == 2
    steps = [json.loads(line)["step"] for line in (through / "metrics.jsonl").open()]
    assert steps == [3, 4, 6, 8, 9, 12, 12]
    assert set(results["scores"]) == {"last", "best"}
    images = json.loads((through / "splits.json").read_text())
    assert len(images["splits"]["val"] if "splits" in images else images["val"]) == 4
    state = checkpoint.load(through / "checkpoints" / "last.pt")
    places = [tuple(place) for place, _ in state["processes"][1]]
    assert state["processes"][0] == []
    assert ("random_state",) in places


def test_stopped_by_a_signal_to_one_and_resumed(through: Path, tmp_path: Path) -> None:
    """Saved once, by all at the same step; then to the end that nobody has touched."""
    out = tmp_path / "run"
    arguments = [config(tmp_path), "--out", str(out)]
    with Several(2, arguments, tmp_path / "a", pause=PAUSE) as running:
        running.until((out / "checkpoints" / "last.pt").exists)
        running.ranks[1].kill(signal.SIGTERM)
        assert running.wait() == [143, 143], running.said()
        (line,) = [line for line in running.said() if "SIGTERM" in line]
    step = checkpoint.load(out / "checkpoints" / "last.pt")["engine"]["global_step"]
    assert line == f"SIGTERM: stopped and saved after step {step}; go on with --resume"
    assert 4 <= step < 12
    assert run.main(["--resume", str(out)]) == 2  # by itself
    with Several(2, ["--resume", str(out)], tmp_path / "b") as running:
        assert running.wait() == [0, 0], running.said()
    found, expected = ending(out), ending(through)
    found["state"].pop("config", None), expected["state"].pop("config", None)
    for key, value in expected["state"].items():
        assert tiny.same(found["state"][key], value), key
    for key in ("metrics", "scores", "best"):
        assert found[key] == expected[key], key


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_dies_ends_the_others(victim: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [config(tmp_path, {"engine.iterations": 1000}), "--out", str(out)]
    with Several(2, arguments, tmp_path / "a", pause=PAUSE) as running:
        last = out / "checkpoints" / "last.pt"
        running.until(last.exists)
        running.ranks[victim].kill()
        assert running.ranks[1 - victim].wait() == 1, running.said()
        (line,) = [line for line in running.said() if line.startswith("failed: ")]
        assert f"the last good checkpoint is {last}" in line
        assert not any("Traceback" in line for line in running.said())
    assert checkpoint.whole(last)


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    """What all find, and what the first alone finds."""
    for number, (changes, said) in enumerate(
        [
            ({"problems.segmentor.batch_size": 3}, "problems.segmentor.batch_size: 3 can't be"),
            ({"engine.iteration": 3}, "engine.iteration"),
            ({}, "isn't empty"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        out = folder / "run"
        out.mkdir()
        if not changes:
            (out / "somebody's").touch()
        arguments = [config(folder, changes), "--out", str(out)]
        with Several(2, arguments, folder) as running:
            assert running.wait() == [2, 2], running.said()
            (line,) = running.said()
        assert said in line


@pytest.mark.parametrize("command", [evaluate.main, sweep.main])
def test_other_commands_are_refused(
    command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (0, 1):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": 1}
        for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
        assert command(["somewhere"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 - rank
        assert rank == 1 or "2 processes were started for a command that one does" in said


def test_another_number_of_processes_is_refused(through: Path) -> None:
    engine = tiny.build("supervised", CHANGES)
    saved = checkpoint.load(through / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match="saved by 2 processes, and this run has 1; go on under"):
        engine.load_state_dict(saved)


@pytest.mark.slow
def test_torchrun_itself(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "mlseg.run"),
        *(config(tmp_path, {"engine.iterations": 2}), "--out", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "results.json").read_text())["world_size"] == 2
