"""The other project's distribution `mlseg`, and old ones of ours, are refused in one line."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from mlseg._distribution import NAME, require_own_distribution

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = "Summary: Multilevel optimization\nRequires-Dist: torch>=2\nRequires-Dist: betty-ml<0.3\n"
STRANGERS = "Summary: A segmenter of words\nRequires-Dist: mlnormalize>=0.4\n"


def put(site: Path, name: str, file: str, text: str) -> None:
    """Metadata of a distribution, as an installer or a build leaves it."""
    (site / name).mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {re.split('[-.]', name)[0]}\nVersion: 0.1.0\n"
    (site / name / file).write_text(head + text, encoding="utf-8")


def refusal(site: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What is said where ``site`` is on the path."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(site)
        try:
            require_own_distribution()
        except ImportError as error:
            return str(error)
    return None


def test_its_name_is_that_of_the_project() -> None:
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert setup["metadata"]["name"] == NAME != "mlseg"
    assert f'\nname = "{NAME}"\n' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def test_the_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "mlseg-0.1.0.dist-info", "METADATA", STRANGERS)
    assert refusal(tmp_path, monkeypatch) == (
        "a distribution mlseg 0.1.0 of another project is installed here (A segmenter of words), "
        "and its files lie among those of mlseg-betty; in the checkout run: "
        "uv pip uninstall mlseg && uv pip install --reinstall ."
    )


def test_an_old_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "mlseg-0.1.0.dist-info", "METADATA", OURS)
    said = refusal(tmp_path, monkeypatch)
    assert said is not None
    assert said.startswith("mlseg is installed under its old name")
    assert said.endswith("uv pip uninstall mlseg && uv pip install --editable . (or make)")


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("mlseg.egg-info", "PKG-INFO", OURS),  # what a build of old left in a checkout
        ("mlseg_betty-0.1.0.dist-info", "METADATA", OURS),
        ("mlseg_extras-0.1.0.dist-info", "METADATA", STRANGERS),
    ],
)
def test_what_is_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, text: str
) -> None:
    put(tmp_path, name, file, text)
    assert refusal(tmp_path, monkeypatch) is None


def test_the_import_refuses_before_it_loads_anything_heavy(tmp_path: Path) -> None:
    put(tmp_path / "site", "mlseg-0.1.0.dist-info", "METADATA", STRANGERS)
    code = (
        f"import sys; sys.path.insert(1, {str(tmp_path / 'site')!r})\n"
        "try:\n"
        "    import mlseg\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print({'torch', 'betty'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    line, loaded = done.stdout.splitlines()
    assert line.startswith("a distribution mlseg 0.1.0 of another project")
    assert loaded == "set()"
