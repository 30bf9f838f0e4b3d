"""What a grid says: which runs a table is made of, and what of them it shows.

    title: Two rows
    configs: {game: game.yaml, alone: alone.yaml}      # relative to the file that names them
    overrides: {engine.iterations: 100}                # of every cell whose config has such a key
    axes:
      row:
        first: {shown: false, overrides: {engine.iterations: 1}}
        ours: {takes: {gan.pretrained: gan}}
        plain: {config: alone, overrides: {augmentation: off}}
      images:
        "40": {overrides: {data.train: 32}}
        "100": {overrides: {data.train: 80}}
    dependencies:
      gan: {cell: {row: first}, file: checkpoints/gan.pt}
    seeds: [0, 1, 2]
    leave_out: [{row: plain, images: "100"}]
    report: ...

A cell is a value of each axis and a seed. Layers of its config, later ones over earlier: the file,
the grid's overrides, those of the command line, those of the axes in their order, seeds, and what
it takes from other cells. What is set to null is left out: an axis, a value, a table, a section.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mlseg.config import Settings

Overrides = dict[str, Any]
Where = dict[str, str | list[str]]
"""Values by axis; an axis that isn't named stands for all of its values."""


class ResourceSettings(Settings):
    """What a cell needs of a machine; Ray heeds it. What isn't named isn't asked for.

    Attributes:
        cpus, gpus: fractions of one allowed.
        memory_gib: of the machine.
    """

    cpus: PositiveFloat | None = None
    gpus: NonNegativeFloat | None = None
    memory_gib: PositiveFloat | None = None


class DependencySettings(Settings):
    """Something that cells take from another cell.

    Attributes:
        cell: values of some axes, or a ``seed``; all others, or null, are the taker's own.
        file: in the other's run directory; its path is taken.
        result: a dotted path in its ``results.json``, whose value is taken.
    """

    cell: dict[str, str | int | None]
    file: str | None = None
    result: str | None = None

    @model_validator(mode="after")
    def _check(self) -> DependencySettings:
        if (self.file is None) == (self.result is None):
            raise ValueError("name either a file or a result, which is what is taken")
        return self


class ValueSettings(Settings):
    """A value of an axis.

    Attributes:
        config: one of the grid's, by name; one axis alone may name it.
        overrides: of the config, by dotted key.
        takes: dependencies by the dotted key that they are for.
        shown: whether its cells enter tables; those that don't are run where others take something.
        resources: of its cells, over the grid's.
    """

    config: str | None = None
    overrides: Overrides = {}
    takes: dict[str, str] = {}
    shown: bool = True
    resources: ResourceSettings = ResourceSettings()


class FigureSettings(Settings):
    """A number of each cell.

    Attributes:
        of: a dotted path in ``results.json``, or after ``config.`` in ``config.yaml``; ``{split}``
            and ``{metric}`` stand for each of those that a table shows.
        minus: another path, whose value is taken off.
        by: in place of ``of``: what a system has registered as a figure.
        times: a factor.
        digits: after the point.
        signed: whether it has a sign in any case.
        spread: whether its standard deviation over seeds is shown.
    """

    of: str | None = None
    minus: str | None = None
    by: str | None = None
    times: float = 1.0
    digits: NonNegativeInt | None = None
    signed: bool = False
    spread: bool = True

    @model_validator(mode="after")
    def _check(self) -> FigureSettings:
        if (self.of is None) == (self.by is None):
            raise ValueError("name either a path (of) or a registered figure (by)")
        return self


Axes = Annotated[list[str], Field(min_length=1)]


class TableSettings(Settings):
    """Figures, mean and standard deviation over seeds, by axes; a table for each of the others.

    Attributes:
        rows, columns: names of axes, or ``split``, or ``metric``.
        figures: which of the report's.
        where: cells that it is of; also by ``split`` and ``metric``.
        versus: a named row, by axes: its figures less those of every other row, seed by seed.
        differences: of these figures; None: of all.
        select: axes, of which each row shows one value only: that with the best mean of a figure on
            validation images.
    """

    rows: Axes
    columns: list[str] = []
    figures: Annotated[list[str], Field(min_length=1)]
    where: Where = {}
    versus: dict[str, str] | None = None
    differences: list[str] | None = None
    select: dict[str, str] = {}


class PictureSettings(Settings):
    """A figure over an axis: mean and deviation, and each seed a dot; lines where it is of numbers.

    Attributes:
        figure: one of the report's.
        x: name of an axis.
        series: another, told apart by colour.
        where: as for tables; what is left makes panels.
    """

    figure: str
    x: str
    series: str | None = None
    where: Where = {}


class ExamplesSettings(Settings):
    """A picture of images with their truth and each row's prediction: its seeds' ensemble.

    Attributes:
        split: that the images are of.
        images: how many, drawn by ``seed`` from their names.
        seed: of the draw.
        ids: the images themselves, in place of a draw.
        seeds: of the runs; None: all. Where seeds split the data otherwise, name one.
        where: rows that it is of, as for tables.
    """

    split: str = "test"
    images: PositiveInt = 6
    seed: NonNegativeInt = 0
    ids: Annotated[list[str], Field(min_length=1)] | None = None
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    where: Where = {}


class SheetSettings(Settings):
    """Images in columns; in rows these, their masks, and what runs predict, those of one seed.

    Attributes:
        rows: name of an axis, whose values are the rows; for each value of the others a sheet.
        images: of each split.
        splits: None: all that ``{split}`` stands for.
        where: cells that it is of, as for tables.
        besides: by a value of that axis, what a system has registered to be shown of its run below,
            such as the pairs that it has made.
    """

    rows: str
    images: PositiveInt = 1
    splits: list[str] | None = None
    where: Where = {}
    besides: dict[str, str] = {}


class SectionSettings(Settings):
    """A part of the report that a function writes which has registered itself.

    Attributes:
        kind: its name.
        where: rows that it is of, as for tables.
        options: what it takes besides.
    """

    kind: str
    where: Where = {}
    options: dict[str, Any] = {}


class ReportSettings(Settings):
    """What is made of finished cells.

    Attributes:
        splits: that ``{split}`` stands for; None: all that the cells have but ``val``.
        metrics: that ``{metric}`` stands for; None: the headline one.
        calibrated: whether the weights ``calibrated`` are scored too: those of ``best`` with k and
            threshold chosen on validation images; or with the ``threshold`` alone chosen, at the k
            that each network has been trained to.
        figures, tables, pictures, sheets, examples, sections: by name.
    """

    splits: list[str] | None = None
    metrics: list[str] | None = None
    calibrated: bool | Literal["threshold"] = False
    figures: dict[str, FigureSettings | None] = {
        "selected step": FigureSettings(of="scores.best.{split}.{metric}"),
        "last step": FigureSettings(of="scores.last.{split}.{metric}"),
        "over images": FigureSettings(of="scores.best.{split}.{metric}_std", spread=False),
        "seconds": FigureSettings(of="seconds", digits=0),
    }
    tables: dict[str, TableSettings | None] = {}
    pictures: dict[str, PictureSettings | None] = {}
    sheets: dict[str, SheetSettings | None] = {}
    examples: dict[str, ExamplesSettings | None] = {}
    sections: dict[str, SectionSettings | None] = {}


class GridSettings(Settings):
    """A grid.

    Attributes:
        configs: by name, files; the first is that of cells whose values name none.
        imports: modules to import first, which register figures and sections of the user's own.
        axes: by name; of each its values by name.
        seeds: every cell is run with each.
        seed_keys: what a seed sets.
        leave_out: cells that there are not.
        dependencies: by name.
        same: dotted keys that mustn't differ between cells of one seed that differ in the first
            axis alone, so that their scores can be compared.
        require: what ``results.json`` has to say of a cell that enters a table, by dotted path.
        resources: of each cell.
    """

    title: str = "Sweep"
    configs: Annotated[dict[str, str], Field(min_length=1)]
    imports: list[str] = []
    overrides: Overrides = {}
    axes: Annotated[dict[str, dict[str, ValueSettings | None] | None], Field(min_length=1)]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    seed_keys: list[str] = ["seed"]
    leave_out: list[Where] = []
    dependencies: dict[str, DependencySettings | None] = {}
    same: list[str] = []
    require: dict[str, Any] = {}
    resources: ResourceSettings = ResourceSettings()
    report: ReportSettings = ReportSettings()

    @pydantic.field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("one of them comes twice")
        return seeds


BESIDE_AXES = ("split", "metric")
"""What tables may have rows and columns of beside a grid's axes."""


def file_stem(name: str) -> str:
    """Of a picture's file: ``Figure 2`` becomes ``figure_2``."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()
