"""What stands in several files says the same in all of them."""

import re
from configparser import ConfigParser
from pathlib import Path

import yaml

import mlseg

ROOT = Path(__file__).resolve().parents[1]


def pythons() -> list[str]:
    """The versions that the package claims to support, by its classifiers."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])


def test_ci_runs_every_python_that_is_claimed() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == pythons()
    required = re.search(
        r'requires-python = ">=(3\.\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    assert required is not None
    assert [required[1], f"3.{int(required[2]) - 1}"] == [pythons()[0], pythons()[-1]]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mlseg.__version__
    assert citation["license"] == "Apache-2.0"
