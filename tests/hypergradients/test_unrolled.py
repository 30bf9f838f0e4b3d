"""Unrolling recorded steps against torch's own differentiable optimizers and other libraries.

The reference takes the same steps with ``torch.optim``'s ``differentiable=True`` on copies of the
weights that carry their history, batch by batch and draw by draw, and differentiates the outer loss
through all of it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call

from mlseg.engines.base import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import UserError
from mlseg.problems.base import Problem
from mlseg.problems.config import Config

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

FEATURES, WEIGHTS = 3, 4
Optimizers = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


class Net(nn.Module):
    """BatchNorm, dropout, two layers with the same weights, a frozen and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.again = nn.Linear(FEATURES, FEATURES)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(FEATURES, FEATURES)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(FEATURES, 1)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        hidden = torch.tanh(self.again(self.dropout(hidden)))
        return self.last(self.frozen(hidden)).squeeze(1)


class PlainNet(nn.Sequential):
    """What TorchOpt takes as well: (B, 3) to (B,), each parameter used once and trained."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(FEATURES, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1), nn.Flatten(0)
        )


class Scales(nn.Module):
    """Logarithms of the weights of residuals, and of a learning rate."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        draw = torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)
        self.scales = nn.Parameter(0.3 * draw)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """torch's differentiable optimizers count steps in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lower_loss(predict: Callable[[Tensor], Tensor], scales: Tensor, batch: Any) -> Tensor:
    x, y, group = batch
    return (scales.exp()[group] * (predict(x) - y) ** 2).mean()


def upper_loss(predict: Callable[[Tensor], Tensor], batch: Any) -> Tensor:
    x, y, _ = batch
    return ((predict(x) - y) ** 2).mean()


class Low(Problem):
    """Notes what each of its steps started from."""

    notes: list[dict[str, Any]]
    with_rate = False

    def training_step(self, batch: Any) -> Tensor:
        if not self.replaying:
            self.notes.append(
                {
                    "batch": batch,
                    "random": torch.get_rng_state(),
                    "weights": {n: p.detach().clone() for n, p in self.module.named_parameters()},
                    "optimizer": copy.deepcopy(self.optimizer.state_dict()),
                }
            )
        return lower_loss(self.module, self.top.module.scales, batch)

    def learning_rates(self) -> list[Tensor] | None:
        if not self.with_rate:
            return None
        return [0.05 * self.top.module.scales[-1].exp() for _ in self.optimizer.param_groups]


class Top(Problem):
    gradients: list[Tensor]

    def training_step(self, batch: Any) -> Tensor:
        self.low.module.eval()
        loss = upper_loss(self.low.module, batch)
        self.low.module.train()
        return loss

    def grad_callback(self) -> None:
        self.gradients.append(self.module.scales.grad.clone())


def batches(seed: int, count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    group = torch.arange(8) % WEIGHTS
    return [(draw(8, FEATURES), 2.0 * draw(8), group) for _ in range(count)]


def program(
    method: Any,
    optimizer: Optimizers,
    unroll: int = 3,
    with_rate: bool = False,
    plain: bool = False,
    **config: Any,
) -> Any:
    torch.manual_seed(4)
    net, scales = PlainNet() if plain else Net(), Scales()
    made = Config(hypergradient=method, unroll_steps=unroll, **config)
    low = Low(
        "low", net, optimizer([p for p in net.parameters() if p.requires_grad]), batches(0, 5), made
    )
    low.notes, low.with_rate = [], with_rate
    top = Top("top", scales, torch.optim.SGD(scales.parameters(), 0.01), batches(1, 3), Config())
    top.gradients = []
    return Engine(
        [low, top],
        EngineSettings(tensorboard=False),
        u2l={top: [low]},
        l2u={low: [top]},
        device="cpu",
        quiet=True,
    )


def sgd(**settings: Any) -> Optimizers:
    return lambda params: torch.optim.SGD(params, **{"lr": 0.05, **settings})


def reference(engine: Any, steps: int, accumulate: int = 1, clip: float = 0.0) -> Tensor:
    """Through the last ``steps`` steps, at the values that the top level had before its own."""
    low, top = engine.low, engine.top
    scales = engine.scales_before.clone().requires_grad_()
    notes = low.notes[-steps * accumulate :]
    named = [(n, p) for n, p in low.module.named_parameters() if p.requires_grad]
    weights = {n: notes[0]["weights"][n].clone().requires_grad_() for n, _ in named}
    moving = {n: w.clone() for n, w in weights.items()}
    settings = {k: v for k, v in low.optimizer.param_groups[0].items() if k != "params"}
    settings = {k: v for k, v in settings.items() if k in low.optimizer.defaults}
    settings = {k: v for k, v in settings.items() if k not in ("fused", "decoupled_weight_decay")}
    settings |= {"differentiable": True, "foreach": None}
    optimizer = type(low.optimizer)(list(moving.values()), **settings)
    for state in notes[0]["optimizer"]["state"].values():
        for key, value in state.items():
            state[key] = value.clone() if isinstance(value, Tensor) else value
    optimizer.load_state_dict(
        {**notes[0]["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]}
    )
    if low.with_rate:
        optimizer.param_groups[0]["lr"] = 0.05 * scales[-1].exp()
    present = torch.get_rng_state()
    for index in range(steps):
        total: list[Any] = [None] * len(moving)
        for note in notes[index * accumulate : (index + 1) * accumulate]:
            torch.set_rng_state(note["random"])
            used = {n: w.clone() for n, w in moving.items()}  # the step writes into its own
            loss = lower_loss(_call(low.module, used), scales, note["batch"]) / accumulate
            found = torch.autograd.grad(
                loss, list(used.values()), create_graph=True, allow_unused=True
            )
            total = [f if t is None else t + f for t, f in zip(total, found, strict=True)]
        if clip:
            size = torch.stack([g.norm() for g in total if g is not None]).norm()
            total = [
                None if g is None else g * (clip / (size + 1e-6)).clamp(max=1.0) for g in total
            ]
        for w, g in zip(moving.values(), total, strict=True):
            w.grad = g
        optimizer.step()
    torch.set_rng_state(present)
    for n, p in named:
        torch.testing.assert_close(moving[n], p, rtol=1e-7, atol=1e-9)
    module = copy.deepcopy(low.module).eval()
    loss = upper_loss(_call(module, moving), top.cur_batch)
    return torch.autograd.grad(loss, scales)[0]


def by_difference(engine: Any, make: Callable[[Any], Any]) -> Tensor:
    """Central differences of the outer loss over whole first windows, taken anew.

    At the buffers and on the batch of ``engine``: a hypergradient doesn't count how BatchNorm's
    running statistics came about.
    """
    shift, slopes = 1e-5, []
    evaluation = copy.deepcopy(engine.low.module).eval()
    for index in range(WEIGHTS):
        losses = []
        for sign in (1.0, -1.0):
            again = make({"method": "identity"})
            with torch.no_grad():
                again.top.module.scales[index] += sign * shift
            run(again, 1)
            weights = {n: p.detach() for n, p in again.low.module.named_parameters()}
            losses.append(upper_loss(_call(evaluation, weights), engine.top.cur_batch))
        slopes.append((losses[0] - losses[1]) / (2.0 * shift))
    return torch.stack(slopes).detach()


def _call(module: nn.Module, weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    return lambda x: functional_call(module, {**weights, **buffers}, (x,))


def run(engine: Any, uppers: int) -> Tensor:
    """The ``uppers``-th gradient of the top level; keeps its weights before that step."""
    torch.manual_seed(uppers)  # programs that are compared see the same draws
    while len(engine.top.gradients) < uppers:
        engine.scales_before = engine.top.module.scales.detach().clone()
        engine.iterate()
    return engine.top.gradients[-1]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": sgd(weight_decay=1e-2),
    "sgd momentum": sgd(momentum=0.9),
    "sgd nesterov": sgd(momentum=0.9, nesterov=True),
    "sgd dampening": sgd(momentum=0.9, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, 0.05, betas=(0.5, 0.9), weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.1),
}
NOT_BY_TORCH: dict[str, Optimizers] = {
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.05, betas=(0.5, 0.2), amsgrad=True),
    "rmsprop centred": lambda p: torch.optim.RMSprop(p, 0.05, alpha=0.9, centered=True),
}
METHODS: dict[str, dict[str, Any]] = {
    "weights": {"method": "unrolled"},
    "graphs": {"method": "unrolled", "store": "graphs"},
    "forward over reverse": {"method": "unrolled", "mode": "forward_over_reverse"},
    "forward": {"method": "forward"},
    # Pairs in every direction: a central difference of the whole run.
    "evolution": {
        "method": "evolution",
        "pairs": WEIGHTS,
        "directions": "orthogonal",
        "sigma": 1e-5,
    },
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, method: str) -> None:
    """In the second window, whose steps start from moments."""
    engine = program(METHODS[method], OPTIMIZERS[optimizer])
    found = run(engine, 2)
    # A bias before BatchNorm has a gradient of rounding errors, which Adagrad divides by itself.
    differences = 5e-3 if optimizer == "adagrad" else 1e-4
    assert distance(found, reference(engine, 3)) < (differences if method == "evolution" else 1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", NOT_BY_TORCH)
def test_optimizers_that_torch_differentiates_wrongly(optimizer: str, method: str) -> None:
    """Its graphs of these are void after two steps."""

    def make(spec: Any) -> Any:
        return program(spec, NOT_BY_TORCH[optimizer])

    engine = make(METHODS[method])
    found = run(engine, 1)
    assert distance(found, by_difference(engine, make)) < (1e-3 if method == "evolution" else 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2])
def test_truncation(method: str, steps: int) -> None:
    engine = program({**METHODS[method], "steps": steps}, OPTIMIZERS["adam"])
    found = run(engine, 2)
    assert distance(found, reference(engine, steps)) < (1e-5 if method == "evolution" else 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_learning_rates_of_the_upper_level(method: str) -> None:
    """The last scale is also the logarithm of the lower level's rate."""

    def make(spec: Any) -> Any:
        return program(spec, sgd(momentum=0.9), with_rate=True)

    engine = make(METHODS[method])
    found = run(engine, 1)
    true = by_difference(engine, make)
    without = run(program(METHODS[method], sgd(momentum=0.9)), 1)
    assert distance(found, true) < 1e-5
    assert distance(without, true) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_and_clipping(method: str) -> None:
    engine = program(
        METHODS[method],
        OPTIMIZERS["adam"],
        unroll=2,
        gradient_accumulation=2,
        gradient_clipping=0.3,
    )
    found = run(engine, 2)
    true = reference(engine, 2, accumulate=2, clip=0.3)
    assert distance(found, true) < (1e-5 if method == "evolution" else 1e-9)


def test_a_fresh_optimizers_state() -> None:
    """The same in the first window; later only where moments enter nonlinearly."""
    made = {
        (state, name): program({"method": "unrolled", "optimizer_state": state}, OPTIMIZERS[name])
        for state in ("carried", "fresh")
        for name in ("sgd momentum", "adam")
    }
    first = {key: run(engine, 1) for key, engine in made.items()}
    for name in ("sgd momentum", "adam"):
        assert distance(first["fresh", name], first["carried", name]) < 1e-12
    second = {key: run(engine, 2) for key, engine in made.items()}
    assert distance(second["fresh", "sgd momentum"], second["carried", "sgd momentum"]) < 1e-12
    assert distance(second["fresh", "adam"], second["carried", "adam"]) > 1e-3


def test_zero_second_moments_give_no_nan() -> None:
    """A weight without any gradient: torch's own square root would give NaN."""
    for name, optimizer in {**OPTIMIZERS, **NOT_BY_TORCH}.items():
        engine = program({"method": "unrolled"}, optimizer)
        with torch.no_grad():
            engine.low.module.last.weight.zero_()  # so that nothing before it has a gradient
        assert run(engine, 1).isfinite().all(), name


def test_steps_beyond_the_window_use_the_present_sources() -> None:
    """With an upper level that stands still they are exact."""
    engine = program({"method": "unrolled", "steps": 5}, sgd(momentum=0.9), unroll=2)
    for group in engine.top.optimizer.param_groups:
        group["lr"] = 0.0
    found = run(engine, 3)
    assert len(engine.low.trajectory.steps) == 5
    assert distance(found, reference(engine, 5)) < 1e-9


def test_memory_of_one_graph_and_not_of_all() -> None:
    """Graphs are kept only when asked for, and dropped from what is saved."""
    engine = program({"method": "unrolled"}, sgd())
    run(engine, 1)
    assert not any(step.graphs or step.leaves for step in engine.low.trajectory.steps)
    engine = program({"method": "unrolled", "store": "graphs"}, sgd())
    run(engine, 1)
    assert all(step.graphs for step in engine.low.trajectory.steps)
    assert "graphs" not in str(engine.low.trajectory.state_dict().keys())


# --------------------------------------------------------------- other people's libraries


@pytest.mark.parametrize("name", ["sgd momentum", "sgd nesterov", "adam", "rmsprop"])
def test_higher(name: str) -> None:
    ours = program({"method": "unrolled"}, OPTIMIZERS[name])
    theirs = program({"method": "unrolled", "backend": "higher"}, OPTIMIZERS[name])
    assert distance(run(ours, 2), run(theirs, 2)) < 1e-6  # higher's Adam corrects in float32


def test_higher_serves_optimizers_of_its_own() -> None:
    engine = program(
        {"method": "unrolled", "backend": "higher"}, lambda p: torch.optim.Adadelta(p, 0.5)
    )
    found = run(engine, 2)
    assert distance(found, reference(engine, 3)) < 1e-6


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_torchopt(name: str) -> None:
    """In the first window, without moments; TorchOpt's Adam gives NaN at zero second moments."""
    settings: dict[str, Any] = {"lr": 0.05, **PLAIN[name][2]}
    engine = program({"method": "unrolled"}, lambda p: PLAIN[name][0](p, **settings), plain=True)
    found = run(engine, 1)
    notes = engine.low.notes
    net = copy.deepcopy(engine.low.module)
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_(notes[0]["weights"][n])
    scales = engine.scales_before.clone().requires_grad_()
    optimizer = PLAIN[name][1](net, **settings)
    for note in notes:
        torch.set_rng_state(note["random"])
        optimizer.step(lower_loss(net, scales, note["batch"]))
    (true,) = torch.autograd.grad(upper_loss(net.eval(), engine.top.cur_batch), scales)
    assert distance(found, true) < 1e-9


PLAIN: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, torchopt.MetaSGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, torchopt.MetaAdam, {"betas": (0.5, 0.9)}),
}


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "optimizer", "config", "words"),
    [
        ({}, lambda p: torch.optim.Adadelta(p), {}, "step of Adadelta can't be differentiated"),
        ({"store": "graphs"}, sgd(), {"precision": "bf16"}, "set store to weights, or precision"),
        (
            {"store": "graphs", "mode": "forward_over_reverse"},
            sgd(),
            {},
            "set store to weights, or mode",
        ),
        ({"backend": "higher"}, lambda p: torch.optim.NAdam(p), {}, "doesn't know NAdam"),
        ({"backend": "higher"}, sgd(maximize=True), {}, "doesn't know maximize"),
        ({"backend": "higher"}, sgd(), {"gradient_clipping": 1.0}, "unclipped"),
    ],
)
def test_what_cant_be_differentiated_is_refused_when_it_is_made(
    method: Any, optimizer: Optimizers, config: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        program({"method": "unrolled", **method}, optimizer, **config)
