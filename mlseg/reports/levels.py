"""A picture of a program of levels: problems, what is handed up, the paths of hypergradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from betty.problems import Problem as BettyProblem

from mlseg.engines.engine import Engine
from mlseg.engines.settings import Stage
from mlseg.errors import UserError
from mlseg.files import is_marked, replacing, require_writable, writing

KINDS = (".svg", ".png")
CREATOR = "mlseg --graph"
_HEAD = 2**14
_WIDE, _TALL = 2.5, 0.9
"""Of a box, inches."""
_ACROSS, _UP = 3.1, 1.7
"""Between the middles of boxes."""
_LINE = 0.3
"""Height of a line of words below them."""
# Okabe and Ito's, those that are dark enough for a line on white; dashes tell them apart too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_DASHES: tuple[Any, ...] = ((0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))


def require_picture(path: Path) -> None:
    """Check, before any work, that a picture may be written at a path.

    Raises:
        UserError: it has another suffix, something else is there, or nothing can be written there.
    """
    if path.suffix.lower() not in KINDS:
        raise UserError(f"--graph: {path}: a name that ends in {' or '.join(KINDS)} is needed")
    if path.is_dir() or (
        (path.exists() or path.is_symlink()) and not is_marked(path, CREATOR, _HEAD)
    ):
        raise UserError(f"--graph: {path} is there already, and not by --graph; name another file")
    require_writable(path, "--graph")


def draw_levels(engine: Engine, path: Path) -> None:
    """Draw the levels of every stage, as SVG or PNG; whole or not at all.

    Boxes are problems, each above those that it is the upper level of; grey arrows lead from a
    level to the one that learns from it. Every path of a hypergradient is a line of its own, from
    the level whose gradient it is, through those that it passes, and back.

    Raises:
        RunError: it can't be written.
    """
    # Here, since it is slow to import and only this needs it.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = []
    for index in range(len(engine.stages)):
        engine.enter_stage(index)
        shown.append(_facts(engine, engine.stages[index]))
    widths = [facts.width for facts in shown]
    rows = max(row for facts in shown for _, row in facts.places.values())
    below = _LINE * (max(len(facts.words) for facts in shown) + 1)
    tall = rows * _UP + _TALL + 0.4
    figure = Figure(figsize=(sum(widths), tall + below + 0.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False, width_ratios=widths)[0]
    for place, facts in zip(axes, shown, strict=True):
        place.set_title(_plain(facts.title), fontsize=10)
        _stage(place, facts)
        place.set_xlim(-_WIDE / 2 - 0.2, facts.width - _WIDE / 2 - 0.2)
        place.set_ylim(-_TALL / 2 - below, tall - _TALL / 2)
        place.set_axis_off()
    kind = path.suffix.lower()[1:]
    about: dict[str, Any] = {"Software": CREATOR}
    if kind == "svg":
        about = {"Creator": CREATOR, "Date": None}  # the same picture from the same program
    steady: Any = {"svg.hashsalt": "mlseg", "svg.fonttype": "none"}
    with mpl.rc_context(steady), writing(path), replacing(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=about, dpi=110)


@dataclass(frozen=True)
class _Facts:
    """What is drawn of a stage: plain values, since the next stage changes the graph.

    Attributes:
        places: column and row of each level that steps; rows count from the lowest.
        about: lines of words in each box.
        edges: lower level and upper.
        paths: of hypergradients, levels from the first to the last.
        words: a line for each path, and for what is idle.
    """

    title: str
    places: Mapping[str, tuple[int, int]]
    about: Mapping[str, Sequence[str]]
    edges: Sequence[tuple[str, str]]
    paths: Sequence[Sequence[str]]
    words: Sequence[str]

    @property
    def width(self) -> float:
        """Inches."""
        boxes = max(column for column, _ in self.places.values()) * _ACROSS + _WIDE + 1.0
        return max(boxes, *(0.9 + 0.075 * len(line) for line in (self.title, *self.words)))


def _facts(engine: Engine, stage: Stage) -> _Facts:
    active: dict[str, BettyProblem] = {}
    waiting = list(engine.leaves)
    while waiting:
        problem = waiting.pop(0)
        active[problem.name] = problem
        waiting += [parent for parent in problem.parents if parent.name not in active]
    problems = [p for p in engine.problems if p.name in active]
    paths = [[node.name for node in path] for p in problems for path in p.paths]
    passed = {name for path in paths for name in path[1:-1]}
    idle = [p.name for p in engine.problems if p.name not in active]
    words = ["hypergradient " + " \N{RIGHTWARDS ARROW} ".join(path) for path in paths]
    length = f"at most {stage.iterations}" if stage.open_ended else str(stage.iterations)
    return _Facts(
        title=f"stage {stage.name}, {length} iterations",
        places=_places(problems),
        about={p.name: _about(p, p.name in passed) for p in problems},
        edges=[(p.name, parent.name) for p in problems for parent in p.parents],
        paths=paths,
        words=words + ([f"idle: {', '.join(idle)}"] if idle else []),
    )


def _places(problems: Sequence[BettyProblem]) -> dict[str, tuple[int, int]]:
    """Each level above all those that hand something up to it."""
    ranks: dict[str, int] = {}
    for _ in problems:  # as often as a chain can be long
        for problem in problems:
            below = [ranks.get(p.name, 0) for p in problems if problem in p.parents]
            ranks[problem.name] = 1 + max(below, default=-1)
    columns: dict[int, int] = {}
    places = {}
    for problem in problems:
        row = ranks[problem.name]
        places[problem.name] = (columns.get(row, 0), row)
        columns[row] = columns.get(row, 0) + 1
    return places


def _about(problem: BettyProblem, passed: bool) -> list[str]:
    count = sum(p.numel() for p in problem.module.parameters() if p.requires_grad)
    lines = [f"{type(problem).__name__}, {count:,} parameters"]
    steps = problem.config.unroll_steps
    if steps > 1 and problem.parents:
        lines.append(f"{steps} steps to one above")
    if passed:
        lines.append(f"passed by {problem.config.type}")
    return lines


def _stage(place: Any, facts: _Facts) -> None:
    from matplotlib.patches import FancyBboxPatch

    middle = {name: (x * _ACROSS, y * _UP) for name, (x, y) in facts.places.items()}
    for lower, upper in facts.edges:
        _arrow(place, middle[lower], middle[upper], 0.0, color="#8a8a8a", lw=1.8)
    left = -_WIDE / 2
    for index, path in enumerate(facts.paths):
        style = {"color": _COLOURS[index % len(_COLOURS)], "lw": 1.5}
        style["linestyle"] = _DASHES[index % len(_DASHES)]
        for at, to in pairwise(path):
            aside = (0.3 + 0.22 * index) * (-1 if middle[to][1] < middle[at][1] else 1)
            _arrow(place, middle[at], middle[to], aside, **style)
        down = -_TALL / 2 - _LINE * (index + 1)
        place.plot([left, left + 0.45], [down, down], **style)
    for index, line in enumerate(facts.words):
        down = -_TALL / 2 - _LINE * (index + 1)
        start = left + (0.55 if index < len(facts.paths) else 0)
        place.text(start, down, _plain(line), va="center", fontsize=8)
    for name, (x, y) in middle.items():
        box = FancyBboxPatch(
            (x - _WIDE / 2, y - _TALL / 2), _WIDE, _TALL,
            boxstyle="round,pad=0,rounding_size=.1", facecolor="#eaf3fa", edgecolor="#0072b2",
            lw=1.2, zorder=3,
        )  # fmt: skip
        place.add_patch(box)
        about = {"ha": "center", "va": "center", "zorder": 4}
        lines = facts.about[name]
        top = y + 0.1 * len(lines)
        place.text(x, top, _plain(name), weight="bold", fontsize=10, **about)
        for number, line in enumerate(lines):
            place.text(x, top - 0.22 - 0.17 * number, _plain(line), fontsize=7, **about)


def _arrow(
    place: Any, at: tuple[float, float], to: tuple[float, float], aside: float, **style: Any
) -> None:
    """From box to box, ``aside`` of their middles; around what lies between them."""
    from matplotlib.patches import FancyArrowPatch, PathPatch
    from matplotlib.path import Path as Outline

    up = to[1] - at[1]
    if abs(up) > 1.5 * _UP and at[0] == to[0] and aside:
        out = at[0] + (_WIDE / 2 + 0.15 + abs(aside) / 2) * (1 if aside > 0 else -1)
        side = at[0] + _WIDE / 2 * (1 if aside > 0 else -1)
        corners = [(side, at[1]), (out, at[1]), (out, to[1])]
        place.add_patch(PathPatch(Outline(corners), fill=False, **style))
        start, end = (out, to[1]), (side, to[1])
    elif up:
        half = _TALL / 2 if up > 0 else -_TALL / 2
        start, end = (at[0] + aside, at[1] + half), (to[0] + aside, to[1] - half)
    else:
        half = _WIDE / 2 if to[0] > at[0] else -_WIDE / 2
        start, end = (at[0] + half, at[1] + aside / 2), (to[0] - half, to[1] + aside / 2)
    place.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=12, shrinkA=0, shrinkB=0, **style
        )
    )


def _plain(text: str) -> str:
    """Without matplotlib's own markup, which a dollar begins."""
    return text.replace("$", r"\$")
