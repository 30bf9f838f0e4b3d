"""The command ``compare``, as a user types it: what it leaves, what it says, what it survives."""

import csv
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import waiting
import yaml
from commanding import one_line
from PIL import Image

from mlseg import compare
from mlseg.comparison import cells, measuring, memory
from mlseg.comparison.tasks.base import Conditions, load_task
from mlseg.files import writing
from mlseg.hypergradients import resolve

pytestmark = pytest.mark.slow  # trains for seconds

CONFIG: dict[str, Any] = {
    "tasks": {"small": {"name": "quadratic", "lower": 6, "upper": 2, "condition": 10.0}},
    "methods": {
        "identity": {"linearise": "before_step"},
        "secant": {"method": "finite_difference", "epsilon": [1e-4, 1e-2]},
    },
    "seeds": [0, 1],
    "accuracy": {"dtypes": ["float64", "float32"], "repeats": 1},
    "training": {"iterations": 4, "evaluate_every": 2, "rates": [0.1, 0.01]},
}
ACCURACY, TUNING, TRAINING = 3 * 2 * 2, 3 * 2, 3 * 2
TIMES = {
    "milliseconds", "seconds", "machine", "curve", "traceback", "cell_seconds", "memory_bytes",
}  # fmt: skip
"""What may differ between two computations of one cell; memory by the bytes of a scalar or two."""

OWN_TASK = '''
import math
import torch
from mlseg.comparison.tasks.quadratic import Quadratic, QuadraticSettings

class Odd(Quadratic):
    def outer(self, low, top, batch):
        loss = super().outer(low, top, batch)
        if self.conditions.seed == 1:
            raise RuntimeError("no such thing\\nas a second line")
        return loss * (math.nan if self.conditions.seed == 2 else 1.0)

def build(settings: QuadraticSettings, conditions):
    """Odd on purpose."""
    return Odd(settings, conditions)
'''


@pytest.fixture(autouse=True)
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, and modules of a test's own forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    known = set(sys.modules)
    yield
    for name in {"own_task"} & (set(sys.modules) - known):
        del sys.modules[name]


def write(changes: dict[str, Any] | None = None) -> str:
    Path("config.yaml").write_text(yaml.safe_dump({**CONFIG, **(changes or {})}))
    return "config.yaml"


def run(*arguments: str, changes: dict[str, Any] | None = None) -> int:
    return compare.main([write(changes), *arguments])


def rows(directory: str = "out") -> list[dict[str, str]]:
    """Of ``compare.csv``, without what depends on the clock."""
    with Path(directory, "compare.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def differences(directory: str, other: str) -> list[str]:
    """What two comparisons give differently, beyond rounding in float64.

    LAPACK's solves round by where in memory their arguments lie: a score in closed form, which is
    a difference of two losses, may be off by a hundred units in the last place or so.
    """

    def same(a: str, b: str) -> bool:
        try:
            return a == b or math.isclose(float(a), float(b), rel_tol=1e-12, abs_tol=1e-12)
        except ValueError:
            return False

    return [
        f"{a['phase']}, {a['method']}, seed {a['seed']}: {key} is {a[key]} and {b[key]}"
        for a, b in zip(rows(directory), rows(other), strict=True)
        for key in a
        if not same(a[key], b[key])
    ]


def whole(directory: str = "out") -> Any:
    return json.loads(
        Path(directory, "compare.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )


def test_it_leaves_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", "out") == 0
    found = rows()
    phases = [row["phase"] for row in found]
    assert [phases.count(p) for p in ("accuracy", "tuning", "training")] == [
        ACCURACY, TUNING, TRAINING,
    ]  # fmt: skip
    assert {row["method"] for row in found} == {
        "identity", "secant epsilon=0.0001", "secant epsilon=0.01",
    }  # fmt: skip
    assert {row["status"] for row in found} == {"ok"}
    for name in ("accuracy_small_float64", "accuracy_small_float32", "training_small"):
        with Image.open(Path("out", f"{name}.png")) as image:
            assert min(image.size) > 400
    report = Path("out/report.md").read_text()
    for words in (
        "compare config.yaml --out out", "torch 2.", "seeds: 0, 1", "condition 10.0",
        "| secant epsilon=0.0001 | 1 step |", "(accuracy_small_float32.png)",
        "(training_small.png)",
        "**implicit**", "tuning seeds (1000)", "epsilon: [0.0001, 0.01]",
    ):  # fmt: skip
        assert words in report, words
    said = capsys.readouterr()
    assert "small, float64" in said.out
    assert "secant epsilon=0.01" in said.out
    data = whole()
    assert data["config"]["seeds"] == [0, 1]
    curves = [c["curve"] for c in data["cells"] if c["phase"] == "training"]
    assert all([point["step"] for point in curve] == [0, 2, 4] for curve in curves)


def test_its_figures_are_right() -> None:
    assert run("--out", "out", "training=null") == 0
    for row in rows():
        exact = {"float64": 1e-12, "float32": 1e-4}[row["dtype"]]
        # A quadratic's difference has no error but rounding's, at any step.
        assert float(row["aim_error"]) < exact * (1e3 if "secant" in row["method"] else 1)
        assert row["aim"] == "1 step"
        assert 0.5 < float(row["error"]) < 1.0, "one step of ten or more that it would take"
        assert 0.5 < float(row["cosine"]) < 1.0
    for cell in whole()["cells"]:
        assert cell["milliseconds"] > 0
        assert cell["memory_bytes"] > 100


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "exact"},
        {"method": "cg", "iterations": 60, "tolerance": 1e-12},
        {"method": "minres", "iterations": 60, "tolerance": 1e-12},
        {"method": "neumann", "terms": 1500},
        {"method": "fixed_point", "iterations": 1000},
        {"method": "unrolled", "steps": 1000},
    ],
    ids=lambda spec: str(spec["method"]),
)
def test_patience_is_rewarded(spec: dict[str, Any]) -> None:
    """At condition number 100 these come within 1e-6 of the implicit hypergradient."""
    task = load_task("quadratic")
    settings = task.settings.model_validate({"name": "quadratic", "lower": 12, "upper": 3})
    assert settings.condition == 100.0
    found = measuring.accuracy(task, settings, Conditions(resolve(spec)), 1)
    assert found["exact"] == "implicit"
    assert found["error"] < 1e-6
    assert found["aim_error"] < 1e-6
    assert found["status"] == "ok"


def test_the_rate_with_the_lowest_loss_is_taken() -> None:
    assert run("--out", "out", "accuracy=null", "methods.secant=null") == 0
    data = whole()
    tuned = {c["rate"]: c["objective"] for c in data["cells"] if c["phase"] == "tuning"}
    (chosen,) = data["rates"]
    assert chosen["rate"] == min(tuned, key=lambda rate: tuned[rate])
    assert {c["rate"] for c in data["cells"] if c["phase"] == "training"} == {chosen["rate"]}
    assert {c["seed"] for c in data["cells"] if c["phase"] == "tuning"} == {1000}


class TestResume:
    def test_finished_cells_are_kept(self) -> None:
        assert run("--out", "out") == 0
        before = rows()
        files = sorted(Path("out/cells").iterdir())
        assert len(files) == ACCURACY + TUNING + TRAINING
        files[0].unlink()
        files[1].write_text("{")  # a disk that lied
        kept = {file: file.stat().st_mtime_ns for file in files[2:]}
        assert compare.main(["--resume", "out"]) == 0
        assert rows() == before
        assert {file: file.stat().st_mtime_ns for file in files[2:]} == kept
        assert sorted(Path("out/cells").iterdir()) == files

    def test_after_an_interruption(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--out", "whole") == 0
        measure, calls = measuring.accuracy, 0

        def interrupted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return measure(*arguments)

        monkeypatch.setattr(measuring, "accuracy", interrupted)
        capsys.readouterr()
        assert run("--out", "out") == 130
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"SIGINT: stopped, 3 of {ACCURACY} cells kept; go on with --resume"
        assert len(list(Path("out/cells").iterdir())) == 3
        assert compare.main(["--resume", "out"]) == 0
        assert calls == ACCURACY, "none of the three again"
        assert differences("out", "whole") == []

    def test_another_config_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--out", "out", "training=null") == 0
        capsys.readouterr()
        assert run("--resume", "out") == 2
        assert one_line(capsys).startswith("error: --resume: training differs from out/config.yaml")
        assert compare.main(["--resume", "out", "seeds=[5]"]) == 2
        assert "--resume: seeds differs" in one_line(capsys)

    def test_the_same_config_is_not(self) -> None:
        assert run("--out", "out", "training=null") == 0
        assert run("--resume", "out", "training=null") == 0


def test_processes_give_the_same_figures() -> None:
    changes = {"accuracy": {"repeats": 1}, "seeds": [0]}
    assert run("--out", "one", changes=changes) == 0
    assert run("--out", "two", "--jobs", "2", changes=changes) == 0
    assert differences("one", "two") == []


def test_parts_make_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"accuracy": {"repeats": 1}, "seeds": [0]}
    assert run("--out", "one", changes=changes) == 0
    assert run("--out", "two", "--shard", "0/2", changes=changes) == 0
    assert "cells of other parts are missing" in capsys.readouterr().err
    assert not Path("two/report.md").exists()
    assert not any("training" in file.name for file in Path("two/cells").iterdir())
    assert run("--out", "two", "--shard", "1/2", changes=changes) == 0
    assert run("--resume", "two", "--shard", "0/2", changes=changes) == 0
    assert differences("one", "two") == []
    assert not Path("two/.locks").exists()
    capsys.readouterr()
    assert run("--out", "two", "--shard", "0/2", "seeds=[5]", changes=changes) == 2
    assert "seeds differs" in one_line(capsys)
    assert run("--shard", "0/2", changes=changes) == 2
    assert "--shard: all parts need one directory" in one_line(capsys)
    assert run("--out", "two", "--shard", "2/2", changes=changes) == 2
    assert "--shard: '2/2' is no part" in one_line(capsys)


class TestFailure:
    def test_it_is_a_row(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("own_task.py").write_text(OWN_TASK)
        changes = {
            "tasks": {"odd": {"name": "own_task:build", "lower": 4, "upper": 2}},
            "methods": {"identity": {}},
            "seeds": [0, 1, 2],
        }
        assert run("--out", "out", "training.tuning_seeds=[3]", changes=changes) == 0
        found = {(row["phase"], row["seed"]): row for row in rows() if row["dtype"] == "float32"}
        assert found["accuracy", "0"]["status"] == "ok"
        assert found["accuracy", "1"]["status"] == "failed"
        assert found["accuracy", "1"]["reason"] == "no such thing"
        assert found["accuracy", "2"]["status"] == "not finite"
        assert [found["training", seed]["status"] for seed in "012"] == [
            "ok", "failed", "diverged",
        ]  # fmt: skip
        report = Path("out/report.md").read_text()
        assert "- accuracy, odd, identity, float64, seed 1: failed: no such thing" in report
        assert "1 ok, 1 failed, 1 not finite" in report
        traced = [c["traceback"] for c in whole()["cells"] if "traceback" in c]
        assert all("own_task.py" in text for text in traced)
        assert "failed: no such thing" in capsys.readouterr().out

    def test_no_rate_that_stays_finite(self) -> None:
        changes = {
            "training": {"iterations": 3, "rates": [1e30], "optimizer": "sgd"},
            "methods": {"identity": {}},
        }
        assert run("--out", "out", "accuracy=null", changes=changes) == 0
        assert {row["phase"] for row in rows()} == {"tuning"}
        assert "| identity | none |" in Path("out/report.md").read_text()
        assert "at every rate: diverged" in Path("out/report.md").read_text()

    def test_a_failed_cell_is_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measure = measuring.accuracy

        def failing(*arguments: Any) -> Any:
            raise MemoryError("not now")

        monkeypatch.setattr(measuring, "accuracy", failing)
        assert run("--out", "out", "training=null") == 0
        assert {row["status"] for row in rows()} == {"failed"}
        monkeypatch.setattr(measuring, "accuracy", measure)
        assert compare.main(["--resume", "out"]) == 0
        assert {row["status"] for row in rows()} == {"ok"}

    def test_a_full_disk(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refusing(path: Path, value: Any) -> None:
            with writing(path):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(cells, "write_json", refusing)
        assert run("--out", "out") == 1
        assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tasks.small.name=quadratik"], "tasks.small: no task 'quadratik'; did you mean 'quadra"),
        (
            ["tasks.small.conditoin=3"],
            "tasks.small.conditoin: unknown key; did you mean 'con",
        ),
        (["tasks.small.condition=0.5"], "tasks.small.condition: "),
        (["methods.cgg={}"], "methods.cgg: no hypergradient method 'cgg'"),
        (["methods.identity.epsilon=1"], "methods.identity.epsilon: unknown key; valid here: "),
        (["methods.secant.epsilon=[]"], "methods.secant.epsilon: an empty list"),
        (["methods.identity=null", "methods.secant=null"], "methods: none is left"),
        (["sedes=[1]"], "sedes: unknown key; did you mean 'seeds'?"),
        (["seeds=[1, 1]"], "seeds: one of them comes twice"),
        (["training.tuning_seeds=[1]"], "training.tuning_seeds: 1 is among the seeds"),
        (["training.methods=[cg]"], "training.methods.0: the string 'cg' is none of identity, se"),
        (["accuracy=null", "training=null"], "accuracy and training are both null"),
        (["imports=[nowhere_at_all]"], "imports.0: can't import 'nowhere_at_all'"),
        (["device=tpu"], "device: 'tpu' is none"),
        (["--jobs", "0"], "--jobs: 0 processes; give 1 or more"),
        (["--resume", "nowhere"], "--resume: nowhere is no comparison's directory"),
        (["--resume", "x", "--out", "y"], "--out: a resumed comparison stays in its directory"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = [] if "--resume" in arguments else ["--out", "out"]
    assert run(*arguments, *out) == 2
    assert said in one_line(capsys)
    assert not Path("out").exists(), "before any work"


def test_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([]) == 2
    assert "name a config, such as configs/compare_quadratic.yaml" in one_line(capsys)
    assert compare.main(["nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such file" in one_line(capsys)


def test_a_directory_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", "out", "training=null") == 0
    capsys.readouterr()
    assert run("--out", "out") == 2
    assert "go on with it by --resume out" in one_line(capsys)


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    assert run("--out", "out") == 2
    said = one_line(capsys)
    assert said.startswith("error: mlseg compare needs scikit-learn; install what is missing: ")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=waiting.needs_gpu)])
def test_peak_memory_is_that_of_the_largest_moment(device: str) -> None:
    x = torch.zeros(1000, dtype=torch.float64, device=device)

    def function() -> torch.Tensor:
        for _ in range(3):
            y = x + 1.0  # one at a time, and the old one until the new one is bound
        z = y * 2.0
        del y
        return z

    result, peak = memory.peak(function, device)
    assert float(result[0]) == 2.0
    assert 16_000 <= peak < 17_000


def test_every_config_is_valid() -> None:
    from mlseg import config
    from mlseg.comparison.settings import parse

    folder = Path(__file__).parents[2] / "configs"
    found = sorted(folder.glob("compare_*.yaml"))
    assert len(found) >= 1
    for path in found:
        assert parse(config.load(path)).methods
