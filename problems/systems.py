"""The table of systems: whole multilevel programs that a config can name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch

from mlseg import config, parallel
from mlseg.config import Settings
from mlseg.config.registry import Entry, Registry, find_entry, run_imports
from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings, LoopSettings
from mlseg.engines.tracking import LogSettings
from mlseg.errors import RunError, UserError, located
from mlseg.multilevel.batch_norm import synchronise
from mlseg.randomness import LARGEST_SEED
from mlseg.threads import MOST as MOST_THREADS


class AnyRunSettings(Settings):
    """What every system's config has, whatever chooses its weights.

    Attributes:
        system: registered name, or dotted path ``package.module:build``.
        imports: modules to import first, which register what the rest of the config names.
        seed: of every random draw but the data split, which has its own; below 2^64.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of the processor; ``auto``: what the environment says (OMP_NUM_THREADS), or else as
            many as the work fills. Another number may change the last digits.
        precision: ``bf16`` is autocast; hypergradients are evaluated in fp32 all the same.
        sync_batchnorm: in several processes (torchrun), whether BatchNorm goes by the statistics of
            the whole batch, at two collectives a layer; else by those of each process's share.
        init: a run, or a file of ``export --format torch``, whose weights segmentors start from.
        engine: length, validation, checkpoints.
        log: where figures go besides the run directory.
    """

    resumable: ClassVar[Sequence[str]] = (
        "engine.iterations",  # how long
        "engine.log_every",  # what is written down on the way
        "engine.checkpoint_every",
        "engine.samples",
        "engine.tensorboard",
        "log.tracker",
        "log.project",
        "device",  # where; another one may change the last digits
        "threads",
        "data.root",  # where the files lie: that they are the same ones is checked
        "data.out_of_distribution_roots",
        "data.unlabelled_root",
        "data.when_missing",
        "data.memory_limit_mib",
        "data.cache_dir",
        "data.max_files",
        "data.max_megapixels",
    )
    """What may differ when a run goes on; all else is what it was made with."""

    takes_unlabelled: ClassVar[bool] = False
    """Whether the system learns from images without masks (``data.unlabelled``)."""

    system: str
    imports: list[str] = []
    seed: Annotated[int, pydantic.Field(ge=0, le=LARGEST_SEED)] = 0
    device: str = "auto"
    threads: Literal["auto"] | Annotated[int, pydantic.Field(ge=1, le=MOST_THREADS)] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    sync_batchnorm: bool = False
    init: Annotated[str, pydantic.Field(min_length=1)] | None = None
    engine: LoopSettings = LoopSettings()
    log: LogSettings = LogSettings()

    @pydantic.model_validator(mode="after")
    def _masks_are_needed(self) -> "AnyRunSettings":
        if getattr(getattr(self, "data", None), "unlabelled", 0) and not self.takes_unlabelled:
            raise ValueError(
                f"data.unlabelled: system {self.system!r} learns nothing from images without "
                "masks; drop it"
            )
        return self

    def work(self) -> int:
        """What threads have to share, in multiply-adds; 0 without images.

        Those of a 1x1 convolution of the widest features at full resolution: examples of a batch x
        pixels x channels^2, each the largest that the config names. Deeper layers of a U-Net have
        as many.
        """
        values = self.model_dump()
        data, augmentation = values.pop("data", None) or {}, values.get("augmentation") or {}
        size = augmentation.get("window") or data.get("image_size") or 0
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        batch = max(_all(values.get("problems"), "batch_size"), default=1)
        return batch * height * width * max(_all(values, "channels"), default=_UNNAMED) ** 2


class RunSettings(AnyRunSettings):
    """What a system's config has whose validation chooses the weights.

    Attributes:
        engine: length, validation, checkpoints.
    """

    engine: EngineSettings = EngineSettings()


_UNNAMED = 64
"""Channels of networks whose settings don't name them: those of a ResNet's first layers."""


def _all(values: Any, key: str) -> Iterator[int]:
    """Every integer of that key, at any depth."""
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if name == key and isinstance(value, int):
            yield value
        yield from _all(value, key)


@dataclass(frozen=True)
class System(Entry):
    """A system: its settings class and the function that builds it.

    ``build`` makes data, networks, problems, and the engine of them; its second argument is the
    run directory, or None to write nothing.

    Attributes:
        in_several: whether several processes may train it together: each of its losses is a mean
            over the examples of a batch, or puts its sums together by :mod:`mlseg.parallel`.
    """

    in_several: bool = False

    def __call__(self, settings: Any, out: Path | None = None) -> Engine:
        """Build it; with ``out``, the run directory, its records are written there.

        Raises:
            UserError: a system of a user's own fails or ends the process, or makes no engine.
        """
        if parallel.several() and not self.in_several:
            raise UserError(
                f"system {self.name!r} trains in one process: nothing says that its losses are "
                "means over the examples of a batch; leave torchrun out, or where they are, say so "
                "by @system(..., in_several=True)"
            )
        engine = self._engine(settings, out)
        if settings.sync_batchnorm:
            synchronise(problem.module for problem in engine.problems)
        return engine

    def _engine(self, settings: Any, out: Path | None) -> Engine:
        if self.build.__module__.split(".")[0] == "mlseg":
            return self.build(settings, out)
        try:
            engine = self.build(settings, out)
        except (UserError, RunError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"system {self.name!r} can't be built ({located(error)})") from error
        if not isinstance(engine, Engine):
            raise UserError(
                f"system {self.name!r} gives a {type(engine).__name__}, not an mlseg.Engine"
            )
        return engine


SYSTEMS: Registry[System] = Registry("system", example="my_package.games:build")


def system(
    name: str, settings: type[AnyRunSettings], summary: str, in_several: bool = False
) -> Callable[[Callable[[Any, Path | None], Engine]], System]:
    """Decorator that registers ``build(settings, out)`` as a system.

    Args:
        name: under which configs name it.
        settings: class of the whole config.
        summary: one line for ``--help``.
        in_several: see :class:`System`.
    """

    def enter(build: Callable[[Any, Path | None], Engine]) -> System:
        return SYSTEMS.register(name)(System(name, summary, settings, build, in_several))

    return enter


def load_system(name: str) -> System:
    """Find a system by registered name or by dotted path ``package.module:attribute``.

    Raises:
        UserError: there is none of that name, or the path leads to something else.
    """
    return find_entry(SYSTEMS, System, RunSettings, name)


def parse_run(tree: config.Tree) -> tuple[AnyRunSettings, Any]:
    """The checked settings of a config and the system that they are for.

    Raises:
        UserError: the config names no system, an unknown one, or doesn't fit it.
    """
    run_imports(tree)
    name = tree.values.get("system")
    if not isinstance(name, str):
        raise tree.error("system", "missing; name a system, such as system: e2eaug")
    try:
        system = load_system(name)
    except UserError as error:
        raise tree.error("system", str(error)) from None
    settings = config.parse(system.settings, tree)
    config.require_names(settings, tree)
    return settings, system


def all_systems() -> Sequence[System]:
    """Every registered system, by name."""
    return list(SYSTEMS.all().values())


def merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``values`` over ``defaults``, what a preset fills in.

    A mapping that names another component replaces the default.
    """
    result = dict(defaults)
    for key, value in values.items():
        default = result.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and _same(default, value):
            result[key] = merged(default, value)
        else:
            result[key] = value
    return result


def _same(default: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether both are settings of one component."""
    return all(value.get(key, default.get(key)) == default.get(key) for key in ("name", "method"))
