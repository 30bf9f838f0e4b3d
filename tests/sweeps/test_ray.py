"""A grid on a local cluster of Ray; skipped where Ray isn't installed."""

import json
from pathlib import Path

import grids
import pytest

from mlseg import sweep

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

KILLER = '''
import os, pathlib, signal
from torch import nn

class Once(nn.Module):
    """Cross-entropy that kills its process at its third call, once in all."""

    def __init__(self, ignore_index, *, marker: str = "killed"):
        super().__init__()
        self.loss, self.marker, self.calls = nn.CrossEntropyLoss(), pathlib.Path(marker), 0

    def forward(self, logits, mask):
        self.calls += 1
        if self.calls == 3 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.loss(logits, mask.long())
'''


def test_a_killed_cell_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # at Ray's 15 they starve beside other tests
    Path("killer.py").write_text(KILLER)
    changes = {
        "axes.row.killed": {"overrides": {"loss": {"name": "killer:Once"}}},
        "axes.row.again": {"takes": {"engine.iterations": "steps"}},
        "dependencies.steps": {"cell": {"row": "killed"}, "result": "steps"},
        "resources": {"cpus": 0.5},
    }
    more = {"engine.iterations": 4, "engine.checkpoint_every": 1, "engine.samples": 0}
    grids.write(tmp_path, changes, more)
    assert sweep.main(["grid.yaml", "--out", "out", "--ray", "local"]) == 0
    said = capsys.readouterr().err
    assert "8 done, 0 running, 0 failed" in said
    assert Path("killed").exists()
    assert "Resuming after step 2" in Path("out/logs/killed_0.log").read_text() + (
        Path("out/logs/killed_1.log").read_text()
    )
    steps = json.loads(Path("out/again/seed_0/results.json").read_text())["steps"]
    assert steps == 4
    assert "| killed | 2 |" in Path("out/table.md").read_text()
