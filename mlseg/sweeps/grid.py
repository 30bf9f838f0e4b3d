"""The cells of a grid, and the config of each; everything that can be wrong is found here."""

from __future__ import annotations

import copy
import graphlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlseg import config
from mlseg.config import Override, Tree
from mlseg.config.explaining import quoted
from mlseg.config.registry import run_imports
from mlseg.errors import UserError
from mlseg.files import reachable
from mlseg.problems.systems import load_system, parse_run
from mlseg.sweeps.checks import (
    check_name,
    check_report,
    check_where,
    fits,
    refuse_test_data,
    value_at,
)
from mlseg.sweeps.settings import DependencySettings, GridSettings, ValueSettings

CONFIG, RESULTS = "config.yaml", "results.json"
_RESERVED = ("logs", "report")


@dataclass(frozen=True)
class Cell:
    """A value of each axis and a seed.

    Attributes:
        at: pairs of axis and value, in the order of the axes.
        seed: of its run.
    """

    at: tuple[tuple[str, str], ...]
    seed: int

    def __str__(self) -> str:
        return f"{', '.join(value for _, value in self.at)}, seed {self.seed}"

    @property
    def values(self) -> dict[str, str]:
        """By axis."""
        return dict(self.at)


class Grid:
    """A checked grid.

    Args:
        path: its file.
        out: below which each cell is a run directory, ``<out>/<value>/.../seed_<n>``.
        common: ``KEY=VALUE`` for every cell whose config has such a key.
        seeds: in place of the file's.

    Raises:
        UserError: a mistake; one line with its place.
    """

    def __init__(
        self, path: Path, out: Path, common: Sequence[str] = (), seeds: Sequence[int] | None = None
    ) -> None:
        self.path, self.out = path, out
        self.tree = config.load(path)
        run_imports(self.tree)
        if seeds:
            self.tree.values["seeds"] = list(seeds)
        self.settings = config.parse(GridSettings, self.tree)
        self._common = config.read_overrides(common)
        for given in self._common:
            if given.key in self.settings.seed_keys:
                raise UserError(f"command line: {given.key}: the grid's seeds set it; use --seeds")
        self.notes: list[str] = []
        self._bases = {name: config.load(self._file(name)) for name in self.settings.configs}
        self._fields = {name: _fields(base) for name, base in self._bases.items()}
        self.axes = {
            axis: {name: value for name, value in values.items() if value is not None}
            for axis, values in self.settings.axes.items()
            if values is not None
        }
        if not self.axes:
            raise self.tree.error("axes", "none is left; name at least one")
        self._check_axes()
        self.dependencies = {n: d for n, d in self.settings.dependencies.items() if d is not None}
        self._all = dict.fromkeys(self._product())
        self._takes = {cell: self._taken(cell) for cell in self._all}
        self._check_order()
        self.shown = [cell for cell in self._all if self.is_shown(cell)]
        if not self.shown:
            raise self.tree.error("leave_out", "no cell is left that a table shows; leave less out")
        check_report(self.tree, self.settings, self.axes)
        self._effective: set[str] = set()
        self.parsed = {c.at: self._settings(c) for c in self.closure(self.shown, one_seed=True)}
        for given in self._common:
            if given.key not in self._effective:
                raise UserError(
                    f"command line: {given.key}: the axes set it otherwise in every cell; change "
                    f"it in {path}"
                )
        self._check_same()

    # ----------------------------------------------------------------------------- cells

    def closure(self, cells: Iterable[Cell], one_seed: bool = False) -> list[Cell]:
        """Those cells and all that they take something from, before them.

        Args:
            one_seed: of cells that differ in their seed alone, only the first.
        """
        found: dict[Any, Cell] = {}

        def add(cell: Cell) -> None:
            key = cell.at if one_seed else cell
            if key not in found:
                for other in self.after(cell):
                    add(other)
                found[key] = cell

        for cell in cells:
            add(cell)
        return list(found.values())

    def after(self, cell: Cell) -> list[Cell]:
        """The cells that this one takes something from."""
        return list(dict.fromkeys(other for _, other in self._takes[cell].values()))

    def takes(self, cell: Cell) -> Mapping[str, tuple[DependencySettings, Cell]]:
        """What it takes from which cell, by the key that it is for."""
        return self._takes[cell]

    def chosen(self, cells: Iterable[Cell], only: Sequence[str]) -> list[Cell]:
        """Those of ``cells`` that fit ``AXIS=VALUE,VALUE`` of each of the axes named.

        Raises:
            UserError: there is no such axis or value.
        """
        where: dict[str, list[str]] = {}
        known: dict[str, list[str]] = {axis: list(values) for axis, values in self.axes.items()}
        known["seed"] = [str(seed) for seed in self.settings.seeds]
        for text in only:
            axis, equals, values = text.partition("=")
            if not equals:
                raise UserError(
                    f"--only: {text!r}: write AXIS=VALUE, as in {next(iter(known))}=..."
                )
            check_name("--only", axis, known, "axis")
            # A value may have commas of its own.
            named = [values] if values in known[axis] else values.split(",")
            for value in named:
                check_name(f"--only {axis}", value, known[axis], "value")
            where.setdefault(axis, []).extend(named)
        return [
            cell
            for cell in cells
            if all({**cell.values, "seed": str(cell.seed)}[k] in v for k, v in where.items())
        ]

    def directory(self, cell: Cell) -> Path:
        """Its run directory."""
        return self.out.joinpath(*(value for _, value in cell.at), f"seed_{cell.seed}")

    def log(self, cell: Cell) -> Path:
        """What its run prints."""
        name = "_".join([*(value for _, value in cell.at), str(cell.seed)])
        return self.out / "logs" / f"{name}.log"

    def resources(self, cell: Cell) -> dict[str, float]:
        """What it needs of a machine, as far as the grid says so."""
        found = self.settings.resources.model_dump(exclude_none=True)
        for value in self._values(cell):
            found |= value.resources.model_dump(exclude_none=True)
        return found

    # --------------------------------------------------------------------------- configs

    def config(self, cell: Cell, taken: Mapping[str, Any] | None = None) -> Tree:
        """Its config.

        Args:
            taken: values from other cells by key; None: paths alone, of files that may not be yet.
        """
        name, _ = self._config_name(cell)
        base = self._bases[name]
        tree = Tree(copy.deepcopy(base.values), dict(base.origins), base.source)
        layers = [self._overrides(("overrides",), self.settings.overrides), self._common]
        for layer in layers:
            config.override(tree, [given for given in layer if self._has_place(name, given.key)])
        self.notes += [note for note in tree.notes if note not in self.notes]
        naming = self._naming_axis()
        for axis, value in cell.at:
            path = ("axes", axis, value, "overrides")
            own = self._overrides(path, self._value(axis, value).overrides)
            if naming not in (None, axis):
                own = [given for given in own if self._has_place(name, given.key)]
            config.override(tree, own)
        seeds = [(key, cell.seed) for key in self.settings.seed_keys]
        if taken is None:
            paths = {
                k: d.file and self.directory(c) / d.file for k, (d, c) in self._takes[cell].items()
            }
            taken = {key: str(path) for key, path in paths.items() if path is not None}
        at: dict[tuple[str | int, ...], str] = {(): self.tree.where("seeds")}
        config.override(tree, [Override(key, value, at) for key, value in [*seeds, *taken.items()]])
        return tree

    def _settings(self, cell: Cell) -> Any:
        tree = self.config(cell)
        settings, _ = parse_run(tree)
        self._effective |= {g.key for g in self._common if value_at(tree.values, g.key) == g.value}
        return settings

    def _overrides(self, path: tuple[str, ...], values: Mapping[str, Any]) -> list[Override]:
        found = []
        for key, value in values.items():
            here = (*path, key)
            if not all(key.split(".")):
                raise self.tree.error(here, "no key of a config; write it dotted")
            if key in self.settings.seed_keys:
                raise self.tree.error(here, "the grid's seeds set it; drop it, or change seed_keys")
            length = len(here)
            own = {p[length:]: at for p, at in self.tree.origins.items() if p[:length] == here}
            found.append(Override(key, value, own))
        return found

    def _has_place(self, name: str, key: str) -> bool:
        """Whether an override is for a config: it has such a key, or none of the grid's has."""
        places = {other: fits(key) for other, fits in self._fields.items()}
        return places[name] or not any(places.values())

    def _file(self, name: str) -> Path:
        said = self.tree.where(("configs", name))
        place = Path(said.rpartition(":")[0]).parent if ":" in said else self.path.parent
        return place / reachable(self.settings.configs[name])

    def _naming_axis(self) -> str | None:
        for axis, values in self.axes.items():
            if any(value.config is not None for value in values.values()):
                return axis
        return None

    def _config_name(self, cell: Cell) -> tuple[str, str | None]:
        for axis, value in cell.at:
            if (named := self._value(axis, value).config) is not None:
                return named, axis
        return next(iter(self.settings.configs)), None

    # ---------------------------------------------------------------------------- checks

    def _value(self, axis: str, value: str) -> ValueSettings:
        return self.axes[axis][value]

    def _values(self, cell: Cell) -> Iterator[ValueSettings]:
        return (self._value(*pair) for pair in cell.at)

    def is_shown(self, cell: Cell) -> bool:
        """Whether it enters tables."""
        return all(value.shown for value in self._values(cell))

    def _check_axes(self) -> None:
        tree = self.tree
        naming: list[str] = []
        for axis, values in self.axes.items():
            if axis in ("seed", "split", "metric"):
                raise tree.error(("axes", axis), "is what every table has; name the axis otherwise")
            if not values:
                raise tree.error(("axes", axis), "none of its values is left; name at least one")
            for name, value in values.items():
                here = ("axes", axis, name)
                if name in (*_RESERVED, "") or name.startswith(".") or "/" in name or "\\" in name:
                    raise tree.error(here, "becomes a folder's name, which it can't; rename it")
                if value.config is not None:
                    check_name(
                        tree, value.config, self.settings.configs, "config", (*here, "config")
                    )
                    naming.append(axis)
                for key, dependency in value.takes.items():
                    place = (*here, "takes", key)
                    check_name(tree, dependency, self.settings.dependencies, "dependency", place)
                    if key in self.settings.seed_keys:
                        raise tree.error(place, "the grid's seeds set it")
        if len(set(naming)) > 1:
            raise tree.error(
                ("axes", naming[-1]), f"names configs, and so does {naming[0]}; let one axis do it"
            )
        for name, settings in self.settings.dependencies.items():
            if settings is not None:
                self._check_dependency(name, settings)
        for position, where in enumerate(self.settings.leave_out):
            check_where(tree, ("leave_out", position), where, self.axes)

    def _check_dependency(self, name: str, dependency: DependencySettings) -> None:
        here = ("dependencies", name)
        for axis, value in dependency.cell.items():
            place = (*here, "cell", axis)
            if value is None:
                continue
            if axis == "seed":
                if value not in self.settings.seeds:
                    raise self.tree.error(place, f"{quoted(value)} is none of the grid's seeds")
                continue
            check_name(self.tree, axis, self.axes, "axis", place)
            check_name(self.tree, str(value), self.axes[axis], f"value of {axis}", place)
        if dependency.file is not None:
            path = Path(dependency.file)
            if path.is_absolute() or ".." in path.parts:
                raise self.tree.error((*here, "file"), "lies outside the run directory")
        if dependency.result is not None:
            refuse_test_data(self.tree, (*here, "result"), dependency.result, "what a cell takes")

    def _product(self) -> Iterator[Cell]:
        for seed in self.settings.seeds:
            for values in itertools.product(*self.axes.values()):
                at = tuple(zip(self.axes, values, strict=True))
                if not any(fits(where, dict(at)) for where in self.settings.leave_out):
                    yield Cell(at, seed)

    def _taken(self, cell: Cell) -> dict[str, tuple[DependencySettings, Cell]]:
        found: dict[str, tuple[DependencySettings, Cell]] = {}
        keys: dict[str, str] = {}
        for axis, value in cell.at:
            own = self._value(axis, value)
            for key in [*own.overrides, *own.takes]:
                if key in keys:
                    raise self.tree.error(
                        ("axes", axis, value), f"sets {key}, and so does {keys[key]}; let one do it"
                    )
                keys[key] = f"{axis} {value}"
            for key, name in own.takes.items():
                place = ("axes", axis, value, "takes", key)
                dependency = self.dependencies.get(name)
                if dependency is None:
                    raise self.tree.error(place, f"the dependency {name} has been left out")
                other = self._source(cell, dependency)
                if other not in self._all:
                    raise self.tree.error(place, f"{name}: the cell {other} has been left out")
                found[key] = (dependency, other)
        return found

    def _source(self, cell: Cell, dependency: DependencySettings) -> Cell:
        named = {axis: value for axis, value in dependency.cell.items() if value is not None}
        at = tuple((axis, str(named.get(axis, value))) for axis, value in cell.at)
        return Cell(at, int(named.get("seed", cell.seed)))

    def _check_order(self) -> None:
        try:
            graphlib.TopologicalSorter({cell: self.after(cell) for cell in self._all}).prepare()
        except graphlib.CycleError as error:
            chain = " takes from ".join(str(cell) for cell in reversed(error.args[1]))
            raise self.tree.error(
                "dependencies", f"a cell would build on itself: {chain}"
            ) from None

    def _check_same(self) -> None:
        """Raise UserError where cells that are to be compared differ in what shouldn't."""
        first: dict[tuple[tuple[str, str], ...], tuple[str, Any]] = {}
        for cell in self.shown:
            if cell.seed != self.shown[0].seed:
                continue
            values = self.parsed[cell.at].model_dump(mode="json")
            name, before = first.setdefault(cell.at[1:], (str(cell.at[0][1]), values))
            for position, key in enumerate(self.settings.same):
                mine, its = value_at(values, key), value_at(before, key)
                if mine != its:
                    differing = config.differences({key: its}, {key: mine})
                    raise self.tree.error(
                        ("same", position),
                        f"{differing[0]} of {cell.at[0][1]} is not that of {name}; let them agree, "
                        "or take the key out",
                    )


def _fields(base: Tree) -> Any:
    """A test whether a config's system has the first key of an override, and the level it names."""
    run_imports(base)
    fields = load_system(base.text("system")).settings.model_fields

    def has(key: str) -> bool:
        first, *rest = key.split(".")
        if first == "problems" and rest and "problems" in fields:
            return rest[0] in getattr(fields["problems"].annotation, "model_fields", {})
        return first in fields

    return has
