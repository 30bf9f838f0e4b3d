"""What a comparison's config says.

    tasks:
      quadratic: {condition: 100.0}          # the key is the label, and the name if none is given
      saddle: {name: quadratic, negative: 5}
    methods:
      exact: {}
      neumann: {terms: [10, 100]}            # a list makes one row of each of its values
      secant: {method: finite_difference, epsilon: 1.0e-4}
    seeds: [0, 1, 2]

A task or method that is set to null is left out, as on a command line: ``methods.exact=null``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mlseg import config
from mlseg.comparison.tasks.base import Task, TaskSettings, load_task
from mlseg.config import Settings
from mlseg.config.explaining import explain, quoted
from mlseg.config.registry import run_imports
from mlseg.errors import UserError
from mlseg.hypergradients import Method
from mlseg.hypergradients.registry import validated
from mlseg.machine import choose_device
from mlseg.randomness import LARGEST_SEED

DTYPES = {"float64": torch.float64, "float32": torch.float32}
Seeds = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_SEED)]], Field(min_length=1)]


class AccuracySettings(Settings):
    """The phase that compares hypergradients with the exact one.

    Attributes:
        dtypes: in which everything runs; the exact one is in float64 throughout.
        repeats: of the timing, each on a program built anew, so that no warm start helps.
    """

    dtypes: list[Literal["float64", "float32"]] = Field(["float64"], min_length=1)
    repeats: PositiveInt = 3


class TrainingSettings(Settings):
    """The phase that trains from end to end.

    Attributes:
        methods: labels of those that take part; None for all.
        iterations: steps of the upper level.
        evaluate_every: upper steps between two points of a curve.
        optimizer: of the upper level.
        rates: its learning rates, the same grid for every method, of which each gets the one with
            the lowest mean upper loss on validation data at the end over ``tuning_seeds``.
        tuning_seeds: other than those that are reported.
        dtype: in which everything runs.
    """

    methods: list[str] | None = None
    iterations: PositiveInt = 100
    evaluate_every: PositiveInt = 5
    optimizer: Literal["adam", "sgd"] = "adam"
    rates: list[PositiveFloat] = Field([0.01, 0.03, 0.1, 0.3], min_length=1)
    tuning_seeds: Seeds = [1000]
    dtype: Literal["float64", "float32"] = "float32"


class CompareSettings(Settings):
    """A comparison: tasks x methods x settings x seeds.

    Attributes:
        tasks: by label; a mapping of ``name`` (the label by default) and that task's settings.
        methods: by label; a mapping of ``method`` (the label by default) and its settings, where a
            list of values makes one method of each.
        imports: modules to import first, which register tasks and methods of the user's own.
        seeds: of every draw, one cell for each.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        threads: of each process; the command also takes ``auto``: what the environment says, or 1.
            More than one may change the last digits.
        accuracy: None skips the phase.
        training: None skips the phase.
    """

    tasks: dict[str, dict[str, Any] | None]
    methods: dict[str, dict[str, Any] | None]
    imports: list[str] = []
    seeds: Seeds = [0, 1, 2]
    device: str = "cpu"
    threads: PositiveInt = 1
    accuracy: AccuracySettings | None = AccuracySettings()
    training: TrainingSettings | None = None

    @model_validator(mode="after")
    def _check(self) -> CompareSettings:
        if self.accuracy is None and self.training is None:
            raise ValueError("accuracy and training are both null; leave one of them in")
        if self.training is not None:
            shared = sorted({*self.seeds} & {*self.training.tuning_seeds})
            if shared:
                raise ValueError(
                    f"training.tuning_seeds: {shared[0]} is among the seeds that are reported; "
                    "tune on others"
                )
        for name in ("seeds", "tasks", "methods"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: one of them comes twice")
        return self


@dataclass(frozen=True)
class Comparison:
    """A checked config with what it names.

    Attributes:
        settings: the config.
        tasks: by label, the task and its settings.
        methods: by label, after expanding lists.
        groups: by the config's label, those of the methods that came of it.
        trained: labels of those that are trained with.
        device: resolved.
    """

    settings: CompareSettings
    tasks: Mapping[str, tuple[Task, TaskSettings]]
    methods: Mapping[str, Method]
    groups: Mapping[str, Sequence[str]]
    trained: tuple[str, ...]
    device: str


def parse(tree: config.Tree) -> Comparison:
    """Check a config with everything that it names.

    Raises:
        UserError: a key, task, method or setting is unknown or wrong.
    """
    run_imports(tree)
    settings = config.parse(CompareSettings, tree)
    config.require_names(settings, tree)
    tasks = {
        label: _task(label, values, tree)
        for label, values in settings.tasks.items()
        if values is not None
    }
    methods: dict[str, Method] = {}
    groups: dict[str, list[str]] = {}
    for label, values in settings.methods.items():
        if values is not None:
            expanded = _methods(label, values, tree)
            for name in expanded.keys() & methods.keys():
                raise tree.error(("methods", label), f"makes a second {name!r}; rename one")
            methods.update(expanded)
            groups[label] = list(expanded)
    for kind, found in (("tasks", tasks), ("methods", methods)):
        if not found:
            raise tree.error(kind, "none is left; name at least one")
    trained = tuple(methods)
    if settings.training is not None and settings.training.methods is not None:
        wanted = []
        for position, label in enumerate(settings.training.methods):
            if label not in groups and label not in methods:
                known = ", ".join(dict.fromkeys([*groups, *methods]))
                raise tree.error(
                    ("training", "methods", position), f"{quoted(label)} is none of {known}"
                )
            wanted += groups.get(label, [label])
        trained = tuple(dict.fromkeys(wanted))
    device = str(choose_device(settings.device))
    return Comparison(settings, tasks, methods, groups, trained, device)


def _task(label: str, values: Mapping[str, Any], tree: config.Tree) -> tuple[Task, TaskSettings]:
    name = values.get("name", label)
    if not isinstance(name, str):
        raise tree.error(("tasks", label, "name"), f"expected a string, got {quoted(name)}")
    try:
        task = load_task(name)
    except UserError as error:
        raise tree.error(("tasks", label), str(error)) from None
    complete = {**values, "name": name}
    try:
        return task, task.settings.model_validate(complete)
    except pydantic.ValidationError as error:
        path, text, _ = explain(error, task.settings, complete)
        raise tree.error(("tasks", label, *path), text) from None


def _methods(label: str, values: Mapping[str, Any], tree: config.Tree) -> dict[str, Method]:
    """One method per combination of the settings that are lists."""
    listed = {key: value for key, value in values.items() if isinstance(value, list)}
    for key, value in listed.items():
        if not value:
            raise tree.error(("methods", label, key), "an empty list; give at least one value")
    made = {}
    for combination in itertools.product(*listed.values()):
        chosen = dict(zip(listed, combination, strict=True))
        name = " ".join([label, *(f"{key}={value}" for key, value in chosen.items())])
        given = {"method": label, **values, **chosen}
        try:
            made[name] = validated(given)
        except pydantic.ValidationError as error:
            path, text, _ = explain(error, Method, given)
            path = path if path[:1] and path[0] in values else ()  # the label stands for the name
            raise tree.error(("methods", label, *path), text) from None
    return made
