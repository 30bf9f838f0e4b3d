"""The page itself: one file, which needs nothing beside it and no network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from mlseg._version import __version__
from mlseg.errors import UserError
from mlseg.files import is_marked, require_writable, write_text
from mlseg.reports import comparing, sections, systems
from mlseg.reports.parts import Section
from mlseg.reports.reading import Run, read_run, require_run

PAGE = "report.html"
MARK = '<meta name="generator" content="mlseg report">'
_HEAD = 4096
"""Bytes within which a page of ours has its mark."""


def page(directories: Sequence[Path]) -> str:
    """HTML of one run, or of several side by side.

    Raises:
        UserError: a directory is no run's.
    """
    runs = [read_run(directory) for directory in directories]
    _tell_apart(runs)
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    system = runs[0].recorded.config.get("system", "")
    made: str = _template().render(
        title=title,
        about=f"{system}, {runs[0].recorded.directory}" if len(runs) == 1 else "side by side",
        mark=MARK,
        made=f"mlseg {__version__}, {time.strftime('%Y-%m-%d %H:%M')}",
        together=comparing.sections(runs) if len(runs) > 1 else [],
        runs=[(run.label, _of_run(run, f"run-{i}-")) for i, run in enumerate(runs)],
        css=_part("page.css"),
        js=_part("page.js"),
    )
    return made.encode("utf-8", "replace").decode("utf-8")  # names of files may be no text


def write_page(directories: Sequence[Path], path: Path, overwrite: bool = False) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: something else is there, a directory is no run's, or nothing can be written.
        RunError: it couldn't be written after all.
    """
    for directory in directories:
        require_run(directory)
    require_ours(path, overwrite)
    write_text(path, page(directories))


def require_ours(path: Path, overwrite: bool = False) -> None:
    """Check that a page may be written at a path: there is nothing, or an earlier page.

    Raises:
        UserError: there is something else, or nothing can be written there.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file by --out")
    if (path.exists() or path.is_symlink()) and not overwrite and not is_marked(path, MARK, _HEAD):
        raise UserError(
            f"{path} is there already, and no page of mlseg's; name another file by --out, or give "
            "--overwrite"
        )
    require_writable(path)


def _of_run(run: Run, prefix: str) -> list[Section]:
    found = [*sections.every(run, prefix), *systems.sections(run), sections.how(run)]
    ended = sections.events(run)
    return [*found, *([ended] if ended is not None else [])]


def _tell_apart(runs: Sequence[Run]) -> None:
    """Labels are the directories' names, or more of their paths where these are the same."""
    names = [run.label for run in runs]
    for index, run in enumerate(runs):
        if names.count(names[index]) > 1:
            run.label = str(run.recorded.directory)
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.label] = seen.get(run.label, 0) + 1
        if seen[run.label] > 1:
            run.label = f"{run.label} ({seen[run.label]})"


@cache
def _template() -> Any:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_part("page.html"))


@cache
def _part(name: str) -> str:
    return resources.files("mlseg.reports").joinpath(name).read_text(encoding="utf-8")
