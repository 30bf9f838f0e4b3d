"""Whole systems at a size that trains in a second: 32 pixels, 4 channels, synthetic lesions."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.problems.systems import load_system
from mlseg.randomness import seed_everything

Changes = Mapping[str, Any]

_SHARED: dict[str, Any] = {
    "seed": 1,
    "device": "cpu",
    "data": {
        "name": "synthetic_lesions",
        "image_size": 32,
        "train": 6,
        "val": 4,
        "test": 3,
    },
    "segmentor": {"name": "unet", "channels": 4, "levels": 2},
    "engine": {
        "iterations": 4,
        "validate_every": 2,
        "log_every": 1,
        "samples": 0,
        "tensorboard": False,
    },
}
_SUPERVISED: dict[str, Any] = {
    "system": "supervised",
    "problems": {
        "segmentor": {
            "optimizer": {"name": "rmsprop", "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3},
            "batch_size": 2,
        }
    },
}
PLACE = Path(__file__).parent / "problems"
"""A system's own part of its config lies with its tests: ``SYSTEM/tiny.yaml``."""


def values(system: str = "supervised", changes: Changes | None = None) -> dict[str, Any]:
    """A config's content.

    Args:
        system: "supervised", or one whose tests have a ``tiny.yaml``.
        changes: by dotted key, as on the command line: ``{"data.train": 4}``.
    """
    own = _SUPERVISED
    if system != "supervised":
        own = yaml.safe_load((PLACE / system / "tiny.yaml").read_text(encoding="utf-8"))
    result = copy.deepcopy(_SHARED)
    for key, value in copy.deepcopy(own).items():
        adds = isinstance(value, dict) and "name" not in value  # with a name it is another thing
        result[key] = {**result.get(key, {}), **value} if adds else value
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return result


def config_yaml(system: str = "supervised", changes: Changes | None = None) -> str:
    """The same as YAML, for tests of commands."""
    return yaml.safe_dump(values(system, changes), sort_keys=False)


def write_config(path: Path, system: str = "supervised", changes: Changes | None = None) -> Path:
    """The same in a file."""
    path.write_text(config_yaml(system, changes), encoding="utf-8")
    return path


def build(
    system: str = "supervised", changes: Changes | None = None, out: Path | None = None
) -> Engine:
    """An engine with all its problems, silent, ready to run; seeded as the command does it."""
    made = load_system(system)
    settings = made.settings.model_validate(values(system, changes))
    seed_everything(settings.seed)
    engine = made(settings, out)
    engine.recorder.progress.quiet = True
    return engine


class Doubled:
    """A loader's batches with images in float64."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((image.double(), mask) for image, mask in self.loader)


def untimed(records: str) -> str:
    """JSON lines without the seconds that hops took, which no two runs share."""
    lines = [json.loads(line) for line in records.splitlines()]
    kept = [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in lines]
    return "\n".join(map(json.dumps, kept))


def weights(engine: Any) -> dict[str, Tensor]:
    """Copies of all parameters and buffers of all problems, by "problem/name"."""
    return {
        f"{problem.name}/{name}": value.detach().clone()
        for problem in engine.problems
        for name, value in problem.module.state_dict().items()
    }


def around_gradients(engine: Engine, problem: Any) -> list[dict[str, Tensor]]:
    """Where the engine's weights before and after each gradient of ``problem`` will be listed."""
    seen: list[dict[str, Tensor]] = []
    former = problem.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        seen.append(weights(engine))
        result = former(*args, **kwargs)
        seen.append(weights(engine))
        return result

    problem.backward = backward
    return seen


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures are equal bit for bit, NaN included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class Counter:
    """Counts the passes over a module: forwards, and backwards to its input or parameters.

    Of several outputs, in whatever structure, the last one is watched.
    """

    def __init__(self, module: nn.Module) -> None:
        self.forward = 0
        self.backward = 0
        self.batches: list[int] = []
        module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self.forward += 1
        self.batches.append(len(inputs[0]))
        while not isinstance(output, Tensor):
            output = output[-1]
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backward += 1


def gradients_of(problem: Any, steps: list[list[Tensor]]) -> None:
    """Have ``problem`` add a copy of its gradient to ``steps`` at each of its steps."""
    former: Callable[[], None] | None = getattr(problem, "grad_callback", None)

    def note() -> None:
        if former is not None:
            former()
        steps.append([p.grad.detach().clone() for p in problem.trainable_parameters()])

    problem.grad_callback = note
