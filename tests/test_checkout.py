"""The parts of mlseg come from one checkout or install; a mixture is refused at import."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mlseg._checkout import require_part

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("mlseg", "problems", "engines")
SHOW = "import mlseg, mlseg.problems, mlseg.engines as e; print(mlseg.__file__, e.__file__)"


def checkout(folder: Path) -> Path:
    """A copy of what is installed from a checkout."""
    for name in FOLDERS:
        shutil.copytree(
            REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that is installed as an editable one, in ``site`` beside it."""
    folder = tmp_path_factory.mktemp("installed")
    made = checkout(folder / "checkout")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-deps"]
    command += ["--no-build-isolation", "--python", sys.executable]
    command += ["--target", str(folder / "site"), "--editable", str(made)]
    subprocess.run(command, check=True, cwd=folder)
    return made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that isn't installed."""
    return checkout(tmp_path_factory.mktemp("other"))


def python(code: str, cwd: Path, site: Path | None = None, path: Path | None = None) -> str:
    """What a fresh Python prints, or the last line of its error.

    The environment's own install of mlseg is out of sight, the packages beside it are not.

    Args:
        site: holds an install, as site-packages does.
        path: for PYTHONPATH.
    """
    head = f"import site, sys; site.addsitedir({str(site)!r}); " if site else "import sys; "
    head += f"sys.path.append({sysconfig.get_path('purelib')!r}); "
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-S", "-c", head + code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]


class TestMixtures:
    @pytest.mark.parametrize("how", ["PYTHONPATH", "started there"])
    def test_two_checkouts(self, installed: Path, other: Path, tmp_path: Path, how: str) -> None:
        site = installed.parent / "site"
        if how == "PYTHONPATH":
            said = python("import mlseg", tmp_path, site, path=other)
        else:
            said = python("import mlseg", other, site)
        assert said == (
            f"ImportError: two copies of mlseg are mixed: mlseg comes from {other / 'mlseg'}, but "
            f"mlseg.engines from {installed / 'engines'}; take {other} off PYTHONPATH and start "
            f"Python elsewhere, or install it: uv pip install --editable {other}"
        )

    def test_a_checkout_that_is_not_installed(self, other: Path, tmp_path: Path) -> None:
        said = python("import mlseg", tmp_path, path=other)
        assert said == (
            f"ImportError: mlseg was found at {other / 'mlseg'}, mlseg.engines nowhere: a checkout "
            f"has to be installed; take {other} off PYTHONPATH and start Python elsewhere, or "
            f"install it: uv pip install --editable {other}"
        )

    def test_nothing_heavy_is_loaded_before(self, other: Path, tmp_path: Path) -> None:
        code = (
            "\ntry:\n    import mlseg\nexcept ImportError:\n    pass\n"
            "print({'torch', 'betty'} & set(sys.modules))"
        )
        assert python(code, tmp_path, path=other) == "set()"

    def test_a_part_by_the_name_of_its_folder(self, installed: Path) -> None:
        said = python("import engines", installed, installed.parent / "site")
        assert said == (
            "ImportError: 'import engines' makes every class of it a second time; "
            "write 'import mlseg.engines'"
        )
        with pytest.raises(ImportError, match=r"write 'import mlseg\.problems'"):
            require_part("problems", str(installed / "problems" / "__init__.py"))

    def test_a_part_that_comes_later(self, tmp_path: Path) -> None:
        place = tmp_path / "problems"
        with pytest.raises(ImportError, match=f"but mlseg.problems from {place}; take "):
            require_part("mlseg.problems", str(place / "__init__.py"))


class TestOnePlace:
    @pytest.mark.parametrize("where", ["in it", "elsewhere"])
    def test_an_editable_install(self, installed: Path, tmp_path: Path, where: str) -> None:
        cwd = installed if where == "in it" else tmp_path
        shown = python(SHOW, cwd, installed.parent / "site")
        files = (installed / "mlseg" / "__init__.py", installed / "engines" / "__init__.py")
        assert [Path(cwd, file) for file in shown.split()] == [*files]

    def test_links_in_one_folder(self, other: Path, tmp_path: Path) -> None:
        """As `make types` lays them. A wheel's own files: ``tests/test_packaging.py``."""
        package = tmp_path / "site" / "mlseg"
        package.mkdir(parents=True)
        for source in (*(other / "mlseg").iterdir(), other / "problems", other / "engines"):
            (package / source.name).symlink_to(source)
        shown = python(SHOW, tmp_path, path=tmp_path / "site")
        files = (package / "__init__.py", package / "engines" / "__init__.py")
        assert shown.split() == [str(file) for file in files]
