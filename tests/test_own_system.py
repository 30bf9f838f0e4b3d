"""``docs/own-system.md``: its files, in a folder of their own, do what the page says."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlseg import evaluate, run
from mlseg.problems.systems import SYSTEMS

PAGE = Path(__file__).parents[1] / "docs" / "own-system.md"
BLOCK = re.compile(r"^```(\w+)\n(?:# (\S+)\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall(PAGE.read_text())
FILES = {name: text for _, name, text in BLOCKS if name}
COMMANDS = next(text for language, _, text in BLOCKS if language == "sh")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, as working directory; its modules are forgotten afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLSEG_DATA", raising=False)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "my_system"]:
        del sys.modules[name]
    if "trusted" in SYSTEMS.registered():
        SYSTEMS.remove("trusted")


def test_its_commands_one_after_the_other(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in COMMANDS.splitlines():
        _, _, module, *arguments = shlex.split(line, comments=True)
        command = {"mlseg.run": run.main, "mlseg.evaluate": evaluate.main}[module]
        assert command(arguments) == 0, capsys.readouterr().err
    results = json.loads((project / "runs/trusted/results.json").read_text())
    assert (results["steps"], results["provenance"]) == (40, "synthetic")
    figures = [json.loads(line) for line in (project / "runs/trusted/metrics.jsonl").open()]
    # At once: the validation loss reaches level 2 through level 1 alone.
    norms = [f["hypergradient/via_segmentor"] for f in figures if f["problem"] == "trust"]
    assert norms, "level 2 learns through level 1"
    assert all(norm > 0 for norm in norms)


def test_its_keys_are_printed_and_held(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--keys", "my_system.wiring:build"]) == 0
    assert "width: integer > 0 (8)\n    of the network of level 2.\n" in capsys.readouterr().out
    assert run.main(["trusted.yaml", "width=0", "--out", "x"]) == 2
    assert "width" in capsys.readouterr().err
