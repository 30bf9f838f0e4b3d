"""Shell commands of every page: they parse, name files that are there and keys that exist.

What they do is tried on the pages that have tests of their own, at a smaller size.
"""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from commanding import parsed

from mlseg import command_line, config
from mlseg.__main__ import COMMANDS
from mlseg.comparison.settings import parse as parse_comparison
from mlseg.problems.systems import parse_run
from mlseg.sweeps.grid import Grid
from mlseg.sweeps.settings import GridSettings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BESIDE = {"make", "sbatch", "uv", "cd", "tensorboard"}
"""Programs that aren't ours."""


def commands() -> Iterator[tuple[str, list[str]]]:
    """The page of every command, and its words, without what runs it in several processes."""
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language != "sh":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split(" && "):
                    words = shlex.split(part, comments=True)
                    while words and ("=" in words[0] or words[0] in ("srun",)):
                        del words[0]
                    if words and words[0] == "torchrun":
                        words = ["python", *words[words.index("-m") :]]
                    if words and words[0] not in BESIDE:
                        yield page.name, words


ALL = list(commands())


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{p}: {' '.join(w)}" for p, w in ALL])
def test_a_command(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *rest = words
    assert program == "python"
    if rest[0] != "-m":
        script = ROOT / rest[0].removeprefix("../../")
        assert script.is_file()
        if script.parent.name == "benchmarks":
            parsed(monkeypatch, script, rest[1:])
        return
    name = rest[1].removeprefix("mlseg.")
    assert name in COMMANDS
    parser = import_module(COMMANDS[name][0]).parser()
    given = [word for word in rest[2:] if word != "--dry-run=timed"]
    found = command_line.parse(parser, given)
    if name == "sweep":
        grid = Grid(found.grid, Path("nowhere"), found.overrides, found.seeds)
        assert grid.chosen(grid.shown, found.only)
    elif name in ("run", "compare") and found.config:
        if not found.config.startswith("configs/"):
            return  # of the page's reader, in a test of its own
        tree = config.load(found.config, found.overrides)
        (parse_run if name == "run" else parse_comparison)(tree)


def test_the_grid_that_is_shown_is_one() -> None:
    text = (ROOT / "docs" / "scaling-out.md").read_text(encoding="utf-8")
    ((_, block),) = [found for found in BLOCK.findall(text) if found[0] == "yaml"]
    tree = config.Tree(yaml.safe_load(block), source="scaling-out.md")
    assert config.parse(GridSettings, tree).axes.keys() == {"row", "images"}
