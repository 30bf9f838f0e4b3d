"""The wheel: what it holds, what it leaves out, and that it works far from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from mlseg.__main__ import COMMANDS, main
from mlseg._distribution import NAME

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("mlseg", "problems", "engines")

TINY = (
    "device=cpu",
    "data.train=4",
    "data.val=2",
    "data.test=2",
    "data.image_size=32",
    "segmentor.channels=2",
    "engine.iterations=1",
    "engine.validate_every=1",
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves a build/ that a later wheel picks up."""
    source = tmp_path_factory.mktemp("source")
    for folder in SOURCES:
        shutil.copytree(
            REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("setup.py", "setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    built = tmp_path_factory.mktemp("wheel")
    # The setuptools that is installed: an isolated build would ask the network for one.
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, source,
        cwd=source,
    )  # fmt: skip
    (path,) = built.glob("mlseg_betty-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but mlseg from the wheel, for PYTHONPATH."""
    target = tmp_path_factory.mktemp("site")
    run(
        sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-deps",
        "--python", sys.executable, "--target", target, wheel,
        cwd=target,
    )  # fmt: skip
    return target


def test_it_holds_every_module_and_nothing_generic(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mlseg"}
    expected = set()
    for folder in SOURCES:
        for module in (REPOSITORY / folder).rglob("*.py"):
            path = module.relative_to(REPOSITORY).as_posix()
            expected.add(path if folder == "mlseg" else f"mlseg/{path}")
    assert {name for name in names if name.endswith(".py")} == expected
    assert "mlseg/py.typed" in names
    assert {f"mlseg/reports/page.{kind}" for kind in ("html", "css", "js")} <= set(names)


def test_its_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    for line in (
        "Name: mlseg-betty",
        "License-Expression: Apache-2.0",
        "Requires-Python: <3.14,>=3.11",
        "Requires-Dist: betty-ml<0.3,>=0.2.1",
        "Requires-Dist: torch>=2.11",
    ):
        assert line in metadata.splitlines()


def test_it_is_imported_from_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, mlseg.run\n"
        "for name, module in sys.modules.items():\n"
        "    if name.split('.')[0] == 'mlseg': print(module.__file__)\n"
    )
    files = run(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)
    ).splitlines()  # fmt: skip
    assert len(files) > 10
    assert {Path(file).is_relative_to(installed) for file in files} == {True}


def test_it_trains_from_a_config(installed: Path, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(REPOSITORY / "configs", configs)
    command = (sys.executable, "-m", "mlseg.run")
    environment = {"PYTHONPATH": str(installed), "MLSEG_DATA": str(tmp_path / "no_data")}
    assert "supervised" in run(*command, "--help", cwd=tmp_path, **environment)
    run(
        *command, configs / "supervised_isic_small.yaml", *TINY, "--out", "run",
        cwd=tmp_path, **environment,
    )  # fmt: skip
    results = (tmp_path / "run" / "results.json").read_text()
    assert '"synthetic"' in results
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()


class TestConsole:
    def test_it_is_named_mlseg(self) -> None:
        (script,) = distribution(NAME).entry_points.select(group="console_scripts")
        assert script.name == "mlseg"
        assert script.load() is main

    def test_help_lists_the_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in COMMANDS)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_command_is_there(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert "usage:" in capsys.readouterr().out

    def test_an_unknown_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evalate"]) == 2
        assert capsys.readouterr().err == "mlseg: no command 'evalate'; did you mean 'evaluate'?\n"

    def test_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        assert "usage: mlseg COMMAND" in capsys.readouterr().err
