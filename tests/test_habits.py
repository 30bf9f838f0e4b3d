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


def test_contributing_names_files_that_there_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:mlseg|problems|engines|tests|docs|configs)/[\w./-]*)`", text)
    named += re.findall(r"\]\(([\w./-]+)\)", text)
    assert len(named) > 20
    missing = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    folders = [Path(path).parent for path in named if "NAME" in path]
    assert not missing
    assert all((ROOT / folder).is_dir() for folder in folders if "NAME" not in folder.name)


def test_contributing_names_targets_that_there_are() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for name in ("CONTRIBUTING.md", ".github/workflows/ci.yml", ".github/pull_request_template.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        wanted = set(re.findall(r"(?:`|run: |^)make ([a-z-]+)", text, re.MULTILINE))
        assert wanted
        assert wanted <= targets, name
