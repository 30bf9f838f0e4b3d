"""What several processes train together, and one by itself: programs that must come to the same.

Each case gives tensors. Between one process and several they differ by rounding alone.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import resuming
import tiny
import torch
from e2eaug_generators import GENERATORS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mlseg import parallel
from mlseg.hypergradients import names
from mlseg.multilevel.penalty import PenaltyProblem, PenaltySettings
from mlseg.segmentation.scoring import evaluating, score
from mlseg.testing import programs
from mlseg.testing.programs import GRAPHS, Graph, Level, Recorded

Answer = dict[str, Tensor]
CASES: dict[str, Callable[[], Answer]] = {}

BATCH, ITERATIONS = 6, 10
"""Six are shared equally by one, two and three."""


class Net(nn.Module):
    """(B, 3) features to (B,) numbers; nothing of it sees the batch as a whole."""

    def __init__(self, seed: int, norm: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.last = nn.Linear(programs.FEATURES, 2), nn.Linear(2, 1)
        self.norm = nn.GroupNorm(1, 2) if norm else nn.Identity()
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.5, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)))).squeeze(1)


def batches(seed: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Seven of them."""
    return [(x.to(dtype), y.to(dtype)) for x, y in programs.batches(seed, size=BATCH)]


def program(
    graph: Graph,
    method: Any,
    dtype: torch.dtype = torch.float64,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    unroll: int = 2,
    norm: bool = True,
    loader: Callable[..., Any] = batches,
    kinds: dict[str, type[Level]] | None = None,
    **config: Any,
) -> Any:
    """An engine."""
    torch.manual_seed(3)
    levels = graph.losses
    return programs.build(
        graph,
        {name: Net(seed, norm).to(dtype) for seed, name in enumerate(levels)},
        {name: loader(seed, dtype) for seed, name in enumerate(levels)},
        method,
        lambda params: optimizer(params, lr=0.05),
        kinds={**dict.fromkeys(levels, Level), **(kinds or {})},
        configs={
            name: {"unroll_steps": unroll if name == "low" else 1, **config} for name in levels
        },
    )


def train(
    graph: str, *args: Any, prepare: Callable[[Any], None] = lambda engine: None, **kwargs: Any
) -> Answer:
    """The weights after ten iterations."""
    engine = program(GRAPHS[graph], *args, **kwargs)
    prepare(engine)
    for _ in range(ITERATIONS):
        engine.iterate()
    return parameters(engine)


def parameters(engine: Any) -> Answer:
    """Of all levels."""
    return {
        f"{p.name}.{name}": w.detach().clone()
        for p in engine.problems
        for name, w in p.module.named_parameters()
    }


METHODS: dict[str, dict[str, Any]] = {
    "exact": {"damping": 2.0},  # else what rounding makes of a Hessian's condition
    "evolution": {"pairs": 2},
    "cg": {"iterations": 3, "tolerance": 0.0, "damping": 2.0},
    "minres": {"iterations": 3, "tolerance": 0.0},
    "neumann": {"terms": 3, "power_iterations": 2, "damping": 2.0},
    "nystrom": {"rank": 5, "damping": 1.0},
    "stochastic": {"iterations": 3, "power_iterations": 2},
    "penalty": {"iterations": 3},
    "fixed_point": {"iterations": 3, "tolerance": 0.0},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "identity before the step": ("identity", {"linearise": "before_step", "scale": "optimizer"}),
    "identity forwards": ("identity", {"mode": "forward_over_reverse"}),
    "unrolled graphs": ("unrolled", {"store": "graphs"}),
    "unrolled forwards": ("unrolled", {"mode": "forward_over_reverse"}),
    "unrolled further": ("unrolled", {"steps": 3, "optimizer_state": "fresh"}),
    "cg warm": (
        "cg",
        {"warm_start": True, "iterations": 3, "linearise": "before_step", "damping": 2.0},
    ),
    "minres damped": ("minres", {"damping": 0.1, "iterations": 3}),
    "cg preconditioned": ("cg", {"preconditioner": "kfac", "iterations": 3, "damping": 2.0}),
    "one sided": ("finite_difference", {"scheme": "one_sided", "linearise": "before_step"}),
}


def spec(name: str) -> dict[str, Any]:
    """A method with few iterations."""
    return {"method": name, **METHODS.get(name, {})}


def hook(engine: Any) -> None:
    """Hooks that are no linear function of a gradient."""
    for parameter in engine.low.module.parameters():
        parameter.register_hook(torch.tanh)


def shuffled(seed: int, dtype: torch.dtype) -> Any:
    """Its order comes from torch's global generator."""
    x, y = (torch.cat(parts) for parts in zip(*batches(seed, dtype), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)


class Penalised(PenaltyProblem, Level):
    """An upper level by a penalty."""

    lower = "low"
    penalty = PenaltySettings(steps=2)


def penalised() -> Answer:
    """F2SA."""
    two = GRAPHS["two levels"]
    engine = program(Graph(two.losses, two.l2u, {}), "identity", kinds={"top": Penalised})
    for _ in range(ITERATIONS):
        engine.iterate()
    return parameters(engine)


def enter(name: str, *args: Any, **kwargs: Any) -> None:
    """A case of :func:`train`."""
    CASES[name] = lambda: train(*args, **kwargs)


for _name in names():
    for _graph in ("two levels", "two paths"):
        enter(f"{_name}, {_graph}", _graph, spec(_name))
for _title, (_name, _settings) in VARIANTS.items():
    enter(_title, "two paths", {"method": _name, **_settings}, norm="forwards" not in _title)
for _name in ("identity", "unrolled", "evolution", "fixed_point", "forward"):
    enter(f"{_name} with hooks", "two levels", spec(_name), prepare=hook)
    enter(f"{_name}, accumulating and clipping", "two levels", spec(_name),
          gradient_accumulation=2, gradient_clipping=0.1)  # fmt: skip
enter("higher", "two levels", {"method": "unrolled", "backend": "higher"})
enter("chain of three", "chain of three", "unrolled", optimizer=torch.optim.RMSprop)
enter("Adam", "two paths", {"method": "identity", "scale": "optimizer"}, optimizer=torch.optim.Adam)
enter("a callback", "two paths", "unrolled", kinds=dict.fromkeys(("low", "middle"), Recorded))
enter("a shuffling DataLoader", "two levels", "stochastic", loader=shuffled)
for _name in ("finite_difference", "cg", "unrolled"):
    enter(f"{_name} in float32", "two paths", spec(_name), torch.float32)
CASES["penalty problem"] = penalised


# ------------------------------------------------------------------------------ systems


def system(name: str, changes: dict[str, Any], dtype: torch.dtype = torch.float64) -> Answer:
    """A whole run: stages, validations, everything but a directory; its weights and figures."""
    engine: Any = tiny.build(name, {**SHARED, **changes})
    for module in {id(m): m for p in engine.problems for m in p.module.modules()}.values():
        if isinstance(module, nn.BatchNorm2d) and not changes.get("sync_batchnorm"):
            module.__class__ = Scale
        if hasattr(module, "dropout"):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if dtype == torch.float32:
        engine.run()
        return parameters(engine)  # a pixel more or less is right
    for problem in engine.problems:
        problem.module.double()
        problem.module.register_forward_pre_hook(_doubled)
    engine.run()
    found = {key: torch.tensor(value) for key, value in engine.last_validation.items()}
    if engine.best is not None:
        found["best"] = torch.tensor([engine.best["value"], engine.best["step"]])
    return parameters(engine) | {key: value.double() for key, value in found.items()}


class Scale(nn.BatchNorm2d):
    """In the place of BatchNorm, with its parameters, and without statistics of a batch."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.affine:
            return input
        return input * self.weight[:, None, None] + self.bias[:, None, None]


def _doubled(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) else x for x in inputs)


SHARED: dict[str, Any] = {
    "data.train": 12,
    "data.val": 7,
    "engine.iterations": 10,
    "engine.validate_every": 5,
}
DICE = {"cross_entropy": 1.0, "dice": 0.5, "jaccard": 0.5}
OTHER_TERMS = {"cross_entropy": 1.0, "tversky": 0.5, "focal": 0.5, "boundary": 0.01}
GAN_BATCHES: dict[str, Any] = {
    f"problems.{level}.batch_size": 6 for level in ("generator", "segmentor", "architecture")
}
SGD = {"name": "sgd", "lr": 1e-5}
"""Where nothing depends on a bias before a norm Adam makes steps out of a rounding. The weights
there start with a norm of .06 and gradients of 10: at a rate of 1e-3 a step turns them by a fifth,
and each iteration makes a rounding's work up to 100 times as large."""
LOAD: dict[str, Any] = {
    "data.val": 8,
    "engine.iterations": 60,
    "problems.pretraining.optimizer": {"name": "sgd", "lr": 0.01},
    **{
        f"problems.{level}.batch_size": 6 for level in ("pretraining", "generator", "discriminator")
    },
}
WINDOWS: dict[str, Any] = {  # pixels that don't count
    "data.name": "synthetic_scenes",
    "augmentation": {"preset": "combine", "window": 16},
    "data.unlabelled": 7,
    "problems.segmentor.batch_size": 6,
}
DCT: dict[str, Any] = {
    "method": "dct",
    "partner": {"name": "unet", "channels": 4, "levels": 2},
    "problems.partner": {"batch_size": 12},
}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised", {"augmentation": "combine", "loss": DICE}),
    "supervised, pairs added": (
        "supervised",
        {"augmentation": {"preset": "combine", "brightness": 0.2}, "augmented_pairs": "added"},
    ),
    "supervised, several classes": (
        "supervised",
        {
            "data.name": "synthetic_scenes",
            "loss": {**DICE, "tversky": 0.5, "focal": 0.5, "boundary": 0.01},
            "augmentation": {"window": 16},
        },
    ),
    "e2eaug": (
        "e2eaug",
        {
            "loss": DICE,
            **GAN_BATCHES,
        },
    ),
    **{
        f"e2eaug, {generator}": (
            "e2eaug",
            {
                **GENERATORS[generator],
                **GAN_BATCHES,
                "problems.generator.optimizer": SGD,
                "problems.discriminator.optimizer": SGD,
                "gan.pretrain_lr": SGD["lr"],
                **more,
            },
        )
        for generator, more in {"spade": {}, "asapnet": {"loss": OTHER_TERMS}}.items()
    },
    "e2eaug, level three learns more": (
        "e2eaug",
        {"level3": {"synthetic_weight": True, "guidance": 0.5}, "loss": DICE, **GAN_BATCHES},
    ),
    "e2eaug, learned masks": (
        "e2eaug",
        {
            "engine.iterations": 3,
            "gan.pretrain": 0,
            "level3.mask_augmentation": True,
            **GAN_BATCHES,
        },
    ),
    "e2eaug, BatchNorm synchronised": (
        "e2eaug",
        {
            "sync_batchnorm": True,
            "engine.iterations": 3,
            **GAN_BATCHES,
        },
    ),
    "segan": (
        "segan",
        {"problems.critic.batch_size": 6, "loss.dice_weight": 0.5, "augmentation": "flip"},
    ),
    "segan, stackelberg": (
        "segan",
        {
            "problems.critic.batch_size": 6,
            "game": "stackelberg",
            "warmup_epochs": 1,
        },
    ),
    "segan, a scalar critic": (
        "segan",
        {"problems.critic.batch_size": 6, "critic.output": "scalar", "critic.clamp": None},
    ),
    "load": ("load", {**LOAD, "adversarial.reduction": "sum"}),
    "load, part of the fakes": (
        "load",
        {**LOAD, "adversarial.cross_entropy": 1.0, "fakes.fraction": 0.5},
    ),
    "load, descent and ascent": (
        "load",
        {
            **LOAD,
            "adversarial.cross_entropy": 1.0,
            "descent_ascent": 5,
            "problems.discriminator.batch_size": 12,
        },
    ),
    "ctbct by SGD": (
        "semi_supervised",
        {**WINDOWS, "sync_batchnorm": True, "partner.stochastic_depth": 0.0},
    ),
    "dct by SGD": ("semi_supervised", {**WINDOWS, **DCT}),
    "dct by SGD, in float32": ("semi_supervised", {**WINDOWS, **DCT}),
}
for _title, (_name, _changes) in SYSTEMS.items():
    if _name == "supervised" or (tiny.PLACE / _name / "tiny.yaml").exists():
        _changes = {**({"problems.segmentor.batch_size": 6} if _name == "supervised" else {}),
                    **_changes}  # fmt: skip
        _dtype = torch.float32 if "float32" in _title else torch.float64
        CASES[f"system {_title}"] = partial(system, _name, _changes, _dtype)


def goes_on(changes: dict[str, Any]) -> Answer:
    """A run that is stopped and goes on comes to where it would have."""
    folder = Path(parallel.from_first(tempfile.mkdtemp()))
    changes = {**changes, "data.train": 12}

    def make(out: Path) -> Any:
        return tiny.build("semi_supervised", changes, out)

    try:
        resuming.check(make, folder, [1, 3], "saved")
    finally:
        parallel.together()
        if parallel.is_first():
            shutil.rmtree(folder)
    return {}


if (tiny.PLACE / "semi_supervised" / "tiny.yaml").exists():
    CASES["ctbct goes on"] = partial(goes_on, WINDOWS)
    CASES["dct goes on"] = partial(goes_on, {**WINDOWS, **DCT})


def scores() -> Answer:
    """Of five images, of which three processes have unequal parts, and eleven none."""
    engine: Any = tiny.build("supervised", {"data.val": 5, "problems.segmentor.batch_size": 6})
    samples = engine.hooks[0].data.val
    with evaluating(engine.segmentor.module):
        figures = score(engine.hooks[0].predict, samples, "cpu", native=True, distances=True)
    per_image = figures.per_image()
    values = [*figures.compute().values(), *(v for s in per_image.values() for v in s.values())]
    assert list(per_image) == samples.ids
    return {"figures": torch.tensor(values, dtype=torch.float64)}


CASES["scores"] = scores


# -------------------------------------------------------------------------- in each process


def cases(count: int) -> list[str]:
    """Those that ``count`` processes go through; three of them not through all."""
    methods = ("two levels", "synchronised", "with hooks", "accumulating")
    systems = ("e2eaug, ", "scalar", "load, ", "system dct by SGD, in float32", "goes on")
    left_out = (*methods, *systems) if count > 2 else ()
    return [name for name in CASES if not any(words in name for words in left_out)]


def hops() -> Iterator[tuple[str, int]]:
    """Collectives of one hop by each method."""
    for name in names():
        engine = program(GRAPHS["two levels"], spec(name), unroll=2)
        for _ in range(2):
            engine.iterate()
        engine.iterate()
        before = parallel.collectives()
        engine.iterate()
        # Besides, each level's own gradient.
        yield name, parallel.collectives() - before - 2


def main(arguments: list[str]) -> int:
    """Every case, into ``FOLDER/<rank>.pt``; what fails is told by its text."""
    parallel.start()
    answers: dict[str, Any] = {"hops": dict(hops())}
    for name in cases(parallel.size()):
        case = CASES[name]
        try:
            answers[name] = case()
        except parallel.Lost:
            raise
        except Exception as error:  # noqa: BLE001, the test says which case it was
            answers[name] = f"{type(error).__name__}: {error}"
    torch.save(answers, Path(arguments[0]) / f"{parallel.rank()}.pt")
    parallel.stop()
    return 0
