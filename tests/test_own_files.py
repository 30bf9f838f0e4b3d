"""What belongs to whom: run directories, results of commands, files that were there before."""

import errno
import json
import os
from pathlib import Path

import pytest
import tiny
from commanding import one_line, trained

from mlseg import compare, evaluate, run
from mlseg.errors import UserError
from mlseg.files import claimed


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a lock that would outlive its process."""
    fcntl = pytest.importorskip("fcntl")

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(UserError, match="no locks") as caught, claimed(tmp_path / "run", tmp_path):
        pass
    assert "\n" not in str(caught.value)


def test_a_directory_is_one_runs_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained(tmp_path)
    with claimed(out, tmp_path):
        for arguments in (["--resume", str(out)], [str(tmp_path / "tiny.yaml"), "--out", str(out)]):
            capsys.readouterr()
            assert run.main(arguments) == 2
            assert f"process {os.getpid()} on " in one_line(capsys)
    assert run.main(["--resume", str(out)]) == 0, "the lock ends with its holder"

    monkeypatch.setattr("time.strftime", lambda form: "now")
    with claimed(None, tmp_path / "runs") as first, claimed(None, tmp_path / "runs") as second:
        assert [path.name for path in (first, second)] == ["now", "now-2"]
        (second / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["now-2"], "the other is empty"


def test_a_directory_that_cannot_be_made_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml")
    for out in (config, config / "run"):
        assert run.main([str(config), "--out", str(out)]) == 2
        assert "can't write there" in one_line(capsys)


def test_a_directory_with_somebodys_files_is_no_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "results.json").write_text("precious")
    for command in (run.main, compare.main):
        assert command([str(config), "--out", str(theirs)]) == 2
        assert "isn't empty (results.json is in it)" in one_line(capsys)
    assert [path.read_text() for path in theirs.iterdir()] == ["precious"]
    killed = tmp_path / "killed"  # before its config was whole
    killed.mkdir()
    (killed / ".config.yaml.partial").write_text("system: super")
    assert run.main([str(config), "--out", str(killed)]) == 0
    assert not (killed / ".config.yaml.partial").exists()
    with pytest.raises(SystemExit) as stopped:
        run.main([str(config), "--out", ""])
    assert stopped.value.code == 2


def test_evaluate_overwrites_nothing_but_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scores = trained(tmp_path), tmp_path / "scores.json"
    for text in ("precious", "[]", "{}", "[" * 10**5):
        scores.write_text(text)
        capsys.readouterr()
        assert evaluate.main([str(out), "--out", str(scores)]) == 2
        assert "is there already, and not by evaluate" in one_line(capsys)
        assert scores.read_text() == text
    for bad, said in ((tmp_path, "is a folder"), (scores / "x.json", "can't write there")):
        assert evaluate.main([str(out), "--out", str(bad)]) == 2
        assert said in one_line(capsys)
    for more in (["--overwrite"], []):
        assert evaluate.main([str(out), "--out", str(scores), *more]) == 0
    assert json.loads(scores.read_text())["scores"]
