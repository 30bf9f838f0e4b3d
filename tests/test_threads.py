"""How many threads a command takes, and how long those that wait spin."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mlseg import compare, config, evaluate, run, threads
from mlseg.problems.systems import RunSettings, parse_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", *threads.SPINNING)

UP_TO_TORCH = """
import os, runpy, sys

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(*(f"{k}={os.environ[k]}" for k in sorted(os.environ) if k in KEYS), flush=True)
            os._exit(0)

KEYS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")
sys.meta_path.insert(0, Torch())
_, name, *sys.argv[1:] = sys.argv
runpy.run_module(name, run_name="__main__", alter_sys=True)
sys.exit("torch was never asked for")
"""
"""Runs a module with arguments until it imports torch."""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment that says nothing, on four cores; torch's number is put back."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """What a Python of its own says, on both streams."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k not in VARIABLES} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class TestSpinning:
    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, "GOMP_SPINCOUNT=10000 KMP_BLOCKTIME=1"),
            ({"OMP_NUM_THREADS": "2"}, "GOMP_SPINCOUNT=10000 KMP_BLOCKTIME=1"),
            ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY=ACTIVE"),
            ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT=7"),
            ({"KMP_BLOCKTIME": "infinite"}, "KMP_BLOCKTIME=infinite"),
        ],
    )
    def test_it_is_bounded_unless_the_user_has_said_how(
        self, environment: Mapping[str, str], expected: str, tmp_path: Path
    ) -> None:
        code = "from mlseg import threads as t; t.bound_spinning(); print(t.spinning())"
        assert python("-c", code, cwd=tmp_path, **environment).strip() == expected

    def test_nothing_is_set_behind_a_loaded_torch(self) -> None:
        before = dict(os.environ)
        threads.bound_spinning()
        assert dict(os.environ) == before
        assert threads.spinning() == "unbounded"

    @pytest.mark.parametrize(
        "name", ["run", "evaluate", "predict", "calibrate", "compare", "export"]
    )
    def test_every_command_bounds_it_before_torch_is_loaded(
        self, name: str, tmp_path: Path
    ) -> None:
        """What the environment is when torch is asked for, where each of them ends here."""
        for module, arguments in ((f"mlseg.{name}", []), ("mlseg", [name])):
            said = python("-c", UP_TO_TORCH, module, *arguments, "--help", cwd=tmp_path)
            assert said.strip() == "GOMP_SPINCOUNT=10000 KMP_BLOCKTIME=1"

    def test_openmp_heeds_it(self, tmp_path: Path) -> None:
        """It says itself, when it is loaded, what it goes by."""
        said = python("-m", "mlseg.run", "--help", cwd=tmp_path, OMP_DISPLAY_ENV="verbose")
        if "GOMP_SPINCOUNT" not in said:
            pytest.skip("this torch doesn't come with GNU's OpenMP")
        assert f"GOMP_SPINCOUNT = '{threads.SPINNING['GOMP_SPINCOUNT']}'" in said

    def test_importing_a_command_leaves_the_environment_alone(self, tmp_path: Path) -> None:
        code = "import os; before = dict(os.environ); import mlseg.run; print(before == os.environ)"
        assert python("-c", code, cwd=tmp_path).strip() == "True"

    def test_a_run_says_what_bounds_it(self, tmp_path: Path) -> None:
        given = tiny.write_config(tmp_path / "tiny.yaml", "supervised")
        python("-m", "mlseg.run", given, "--out", "out", cwd=tmp_path)
        record = json.loads((tmp_path / "out" / "results.json").read_text())["threads"]
        assert record["spinning"] == "GOMP_SPINCOUNT=10000 KMP_BLOCKTIME=1"


class TestNumber:
    @pytest.mark.parametrize(
        ("work", "jobs", "number"),
        [(0, 1, 1), (1, 1, 1), (2, 1, 2), (3, 1, 3), (100, 1, 4), (100, 2, 2), (100, 9, 1)],
    )
    def test_by_size_as_there_are_cores(self, work: int, jobs: int, number: int) -> None:
        found = threads.choose(work * threads.WORK_PER_THREAD, jobs)
        assert found == threads.Threads(number, "size")

    @pytest.mark.parametrize(
        ("environment", "number", "by"),
        [
            ({"OMP_NUM_THREADS": "3"}, 3, "OMP_NUM_THREADS"),
            ({"OMP_NUM_THREADS": "9"}, 9, "OMP_NUM_THREADS"),
            ({"OMP_NUM_THREADS": "2,1"}, 2, "OMP_NUM_THREADS"),
            ({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "3"}, 3, "MKL_NUM_THREADS"),
            ({"OMP_NUM_THREADS": "0"}, 1, "size"),
            ({"OMP_NUM_THREADS": ""}, 1, "size"),
            ({"OMP_NUM_THREADS": "many"}, 1, "size"),
        ],
    )
    def test_the_environment_goes_first(
        self,
        environment: Mapping[str, str],
        number: int,
        by: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        assert threads.choose(0) == threads.Threads(number, by)

    def test_torch_heeds_the_same_variable(self, tmp_path: Path) -> None:
        code = (
            "import torch; from mlseg import threads\n"
            "assert torch.get_num_threads() == threads.choose(0).number, torch.get_num_threads()\n"
        )
        environments = ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "1"})
        for environment in environments:
            python("-c", code, cwd=tmp_path, **environment)

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_small_configs_take_one_and_those_of_the_papers_more(self, path: Path) -> None:
        tree = config.load(path)
        if "system" not in tree.values:
            pytest.skip("no run's config")
        number = threads.choose(parse_run(tree)[0].work()).number
        assert number == (1 if "_small" in path.stem else 4)

    def test_work_is_that_of_the_widest_features(self) -> None:
        """Against a count of the multiply-adds of a U-Net's last 3x3 convolution."""
        tree = config.load(CONFIGS / "supervised_isic.yaml", ["problems.segmentor.batch_size=3"])
        settings, _ = parse_run(tree)
        per_pixel = 3 * 3 * 64 * 64
        assert settings.work() * 9 == 3 * 256 * 256 * per_pixel

    def test_a_system_without_images_takes_one(self) -> None:
        assert threads.choose(RunSettings(system="mine").work()).number == 1


class TestCores:
    @pytest.fixture(autouse=True)
    def real(self, clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
    def test_affinity_bounds_them(self, tmp_path: Path) -> None:
        code = (
            "import os; from mlseg import threads\n"
            "allowed = os.sched_getaffinity(0)\n"
            "assert 1 <= threads.cores() <= len(allowed)\n"
            "os.sched_setaffinity(0, {min(allowed)})\n"
            "assert threads.cores() == 1\n"
        )
        python("-c", code, cwd=tmp_path)

    @pytest.mark.parametrize(
        ("files", "cores"),
        [
            ({}, 8),
            ({"cpu.max": "max 100000"}, 8),
            ({"cpu.max": "350000 100000"}, 3),
            ({"cpu.max": "50000 100000"}, 1),
            ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
            ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ],
    )
    def test_a_quota_bounds_them(
        self, files: Mapping[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        monkeypatch.setattr(
            threads, "_read", lambda path: files.get(path.removeprefix("/sys/fs/cgroup/"), "")
        )
        assert threads.cores() == cores

    def test_the_threads_of_a_core_count_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

        def read(path: str) -> str:
            _, found, rest = path.partition("/cpu/cpu")
            cpu = rest.partition("/")[0]
            return f"{int(cpu) % 4},{int(cpu) % 4 + 4}" if found and cpu.isdecimal() else ""

        monkeypatch.setattr(threads, "_read", read)
        assert threads.cores() == 4


class TestRun:
    def results(self, out: Path) -> dict[str, Any]:
        return dict(json.loads((out / "results.json").read_text()))

    def stored(self, out: Path) -> Any:
        return config.load(out / "config.yaml").values.get("threads")

    def train(self, tmp_path: Path, *arguments: str) -> Path:
        given = tiny.write_config(tmp_path / "tiny.yaml", "supervised")
        assert run.main([str(given), "--out", str(tmp_path / "run"), *arguments]) == 0
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("arguments", "number", "by"),
        [
            ([], 1, "size"),
            (["threads=2"], 2, "config"),
            (["--threads", "3"], 3, "--threads"),
            (["threads=2", "--threads", "3"], 3, "--threads"),
            (["threads=auto"], 1, "size"),
        ],
    )
    def test_number_and_chooser_are_recorded(
        self, arguments: list[str], number: int, by: str, tmp_path: Path
    ) -> None:
        out = self.train(tmp_path, *arguments)
        results = self.results(out)
        assert results["threads"] == {"number": number, "chosen_by": by, "spinning": "unbounded"}
        assert results["device"].endswith(f"{number} threads")
        assert torch.get_num_threads() == self.stored(out) == number

    def test_the_environment_yields_to_the_config_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        out = self.train(tmp_path)
        assert self.results(out)["threads"]["chosen_by"] == "OMP_NUM_THREADS"
        assert self.stored(out) == 2
        (tmp_path / "more").mkdir()
        out = self.train(tmp_path / "more", "threads=3")
        assert self.results(out)["threads"]["number"] == 3

    @pytest.mark.parametrize("value", ["0", "many", "1.5", "-1"])
    def test_a_wrong_number_is_one_line(
        self, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = tiny.write_config(tmp_path / "tiny.yaml", "supervised")
        assert run.main([str(given), f"threads={value}", "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err.strip()
        assert "threads" in said
        assert said.count("\n") == 0
        with pytest.raises(SystemExit) as stopped:
            run.main([str(given), "--threads", value])
        assert stopped.value.code == 2

    def test_a_resumed_run_keeps_its_number(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = self.train(tmp_path, "threads=2")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        for further in ([], [str(tmp_path / "tiny.yaml")]):
            assert run.main(["--resume", str(out), *further, "engine.iterations=6"]) == 0
            assert self.results(out)["threads"]["number"] == self.stored(out) == 2
            assert self.results(out)["threads"]["chosen_by"] == "run"
        assert "digits" not in capsys.readouterr().err
        for number, arguments in ((3, ["--threads", "3"]), (1, ["threads=auto"])):
            assert run.main(["--resume", str(out), *arguments]) == 0
            assert self.results(out)["threads"]["number"] == self.stored(out) == number
            (line,) = [s for s in capsys.readouterr().err.splitlines() if "digits" in s]
            assert f"goes on with {number} threads" in line

    def test_a_run_from_before_they_were_stored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = self.train(tmp_path)
        text = (out / "config.yaml").read_text()
        (out / "config.yaml").write_text(text.replace("threads: 1\n", ""))
        assert self.stored(out) is None
        torch.set_num_threads(2)  # as torch came on that machine
        assert run.main(["--resume", str(out), "engine.iterations=6"]) == 0
        assert self.results(out)["threads"]["number"] == self.stored(out) == 2
        assert "digits" not in capsys.readouterr().err

    def test_evaluate_takes_those_of_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = self.train(tmp_path, "threads=3")

        def chosen(*arguments: str) -> tuple[int, str]:
            scores = tmp_path / "scores.json"
            assert evaluate.main([str(out), "--out", str(scores), *arguments]) == 0
            found = json.loads(scores.read_text())["threads"]
            assert torch.get_num_threads() == found["number"]
            return found["number"], found["chosen_by"]

        assert chosen() == (3, "run")
        assert chosen("--threads", "2") == (2, "--threads")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert chosen() == (1, "OMP_NUM_THREADS")
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(threads, "cores", lambda: 2)
        assert chosen() == (2, "run")


class TestCompare:
    def threads(self, tmp_path: Path, *arguments: str) -> Any:
        given = tmp_path / "compare.yaml"
        given.write_text(
            "tasks: {small: {name: quadratic, lower: 6, upper: 2}}\n"
            "methods: {identity: {linearise: before_step}}\n"
            "seeds: [0]\n"
            "accuracy: {repeats: 1}\n"
        )
        out = tmp_path / "out"
        where = [] if "--resume" in arguments else ["--out", str(out)]
        assert compare.main([str(given), *where, *arguments]) == 0
        head = json.loads((out / "compare.json").read_text())["head"]
        assert head["spinning"] == "unbounded"
        stored = config.load(out / "config.yaml").values["threads"]
        assert head["threads"] == str(stored)
        return stored

    def test_each_process_takes_one_unless_something_says_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.threads(tmp_path) == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert self.threads(tmp_path, "--resume", str(tmp_path / "out")) == 1, "as it began"
        for folder, arguments, number in (
            ("environment", [], 2),
            ("auto", ["threads=auto"], 2),
            ("flag", ["--threads", "3"], 3),
            ("key", ["threads=4"], 4),
        ):
            (tmp_path / folder).mkdir()
            assert self.threads(tmp_path / folder, *arguments) == number
