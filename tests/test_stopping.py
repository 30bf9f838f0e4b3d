"""Commands that a signal or a full disk stops: one line, the code, and nothing half-written."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from children import Child, limit_files, signal_at
from commanding import train
from PIL import Image

from mlseg import calibrate, evaluate, export, predict, report, run, signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

Command = Callable[[list[str]], int]

COMMANDS: dict[str, tuple[Command, str, int]] = {
    "report": (report.main, "RUN --out out/page.html", 1),
    "masks": (predict.main, "RUN PLACE/image.png --out out/masks --csv out/areas.csv", 2),
    "table": (predict.main, "RUN PLACE/image.png --out out/masks --csv out/areas.csv", 3),
    "npz": (predict.main, "RUN PLACE/image.png --out out/masks --probabilities npz", 3),
    "png": (predict.main, "RUN PLACE/image.png --out out/masks --probabilities png", 3),
    "torchscript": (export.main, "RUN --format torchscript --out out/model.ts", 1),
    "torch": (export.main, "RUN --format torch --out out/model.pt", 2),
    "sidecar": (export.main, "RUN --format torchscript --out out/model.ts", 3),
    "evaluate": (evaluate.main, "RUN --out out/scores.json", 1),
    "calibrate": (calibrate.main, "RUN --k 1 0.5 --thresholds 0.4 0.5", 2),
    "graph": (run.main, "PLACE/tiny.yaml --dry-run --graph out/levels.svg", 1),
}
"""By name: the command, its arguments, and the file at which a signal comes."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    train(place)
    Image.effect_noise((300, 200), 80).convert("RGB").save(place / "image.png")
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, an image, and the working directory, with a folder ``out``."""
    copy = Path(shutil.copytree(trained, tmp_path / "place"))
    monkeypatch.chdir(copy)
    (copy / "out").mkdir()
    return copy


def words(name: str, place: Path) -> list[str]:
    text = COMMANDS[name][1].replace("RUN", str(place / "run")).replace("PLACE", str(place))
    return text.split()


def stopped(name: str, place: Path, before: Callable[[], None], stderr: Path) -> tuple[int, str]:
    """The exit code, and what was said; fails where a rest or a traceback was left."""
    known = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    child = Child(words(name, place), stderr, before, COMMANDS[name][0])
    code, said = child.wait(), "\n".join(child.lines())
    assert "Traceback" not in said, said
    rests = [path for path in place.rglob("*") if path.name.endswith(".partial")]
    assert not rests
    changed = [path for path, data in known.items() if path.read_bytes() != data]
    assert {path.name for path in changed} <= {"calibration_grid.csv"}, "whole, and written first"
    return code, said


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param("torchscript", signal.SIGTERM),
        pytest.param("sidecar", signal.SIGTERM),
        pytest.param("report", signal.SIGINT),
        pytest.param("masks", signal.SIGTERM),
        *(
            pytest.param(name, number, marks=pytest.mark.slow)
            for name, number in [
                ("table", signal.SIGINT),
                ("npz", signal.SIGTERM),
                ("png", signal.SIGINT),
                ("torch", signal.SIGINT),
                ("evaluate", signal.SIGTERM),
                ("calibrate", signal.SIGINT),
                ("graph", signal.SIGTERM),
            ]
        ),
    ],
)
def test_a_signal(name: str, number: int, place: Path, tmp_path: Path) -> None:
    before = partial(signal_at, number, COMMANDS[name][2])
    code, said = stopped(name, place, before, tmp_path / "said.txt")
    assert (code, said.splitlines()[-1]) == {
        signal.SIGINT: (130, "interrupted"),
        signal.SIGTERM: (143, "SIGTERM: interrupted"),
    }[signal.Signals(number)]
    if name in ("torchscript", "torch", "sidecar"):
        both = ["model.ts", "model.ts.json"] if name == "sidecar" else []
        assert sorted(path.name for path in (place / "out").iterdir()) == both
    assert COMMANDS[name][0](words(name, place)) == 0, "what was left is in nobody's way"


QUICK = ("torch", "report", "masks")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in COMMANDS
        if name not in ("sidecar", "table")
    ],
)
def test_a_full_disk(name: str, place: Path, tmp_path: Path) -> None:
    """Files may have so few bytes that something of the command's doesn't fit."""
    size = {"calibrate": 8000, "masks": 8000, "graph": 2500}.get(name, 3000)
    code, said = stopped(name, place, partial(limit_files, size), tmp_path / "said.txt")
    assert code == 1, said
    assert "failed: can't write" in said
    assert "File too large" in said
    if name in ("torchscript", "torch"):
        assert not list((place / "out").iterdir())
    assert COMMANDS[name][0](words(name, place)) == 0


def test_signals_are_as_they_were_afterwards() -> None:
    former = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals.raised():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "under nohup"
            with pytest.raises(signals.Stopped) as caught:
                os.kill(os.getpid(), signal.SIGTERM)
        assert signals.exit_code(caught.value) == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_ctrl_c_while_a_command_loads_is_no_traceback(tmp_path: Path) -> None:
    """Torch takes seconds to load, in which people change their minds."""
    program = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "runpy.run_module(sys.argv[1], run_name='__main__')\n"
    )
    for module in ("mlseg.export", "mlseg.data"):
        ended = subprocess.run(
            [sys.executable, "-c", program, module, "x"], cwd=tmp_path, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
