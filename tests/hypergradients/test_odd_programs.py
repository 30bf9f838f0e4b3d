"""Programs off the beaten track: exact where one is due, and a clear error where none is."""

import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import toys
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm

from mlseg.engines.base import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import UserError
from mlseg.hypergradients import Identity, Interface, names, register
from mlseg.problems.base import Problem
from mlseg.problems.config import Config

RATE = 0.1
GRAPHS = {"method": "unrolled", "store": "graphs"}
FORWARD_OVER_REVERSE = {"method": "unrolled", "mode": "forward_over_reverse"}
HIGHER = {"method": "unrolled", "backend": "higher"}
EVOLUTION = {"method": "evolution", "directions": "orthogonal", "sigma": 1e-4}
SAMA = {"method": "sama", "linearise": "before_step", "epsilon": 1e-5}
BEFORE = {"method": "identity", "linearise": "before_step"}


def weighted(net: toys.Call, upper: toys.Call, batch: Any) -> Tensor:
    """The lower loss: squared errors, weighted by the upper network."""
    x, y = batch
    return ((net(x).squeeze(-1) - y) ** 2 * upper(x).squeeze(-1).sigmoid()).mean()


class Low(Problem):
    before: list[Tensor]

    def training_step(self, batch: Any) -> Tensor:
        if not self.replaying:
            self.before = values(self.module)
        return weighted(self.module, self.top.module, batch)


class Top(Problem):
    """Half of the squared norm of the lower level's weights, which thus are the hop's vector."""

    before: list[Tensor]
    gradient: Tensor

    def training_step(self, batch: Any) -> Tensor:
        self.before = values(self.module)
        return sum((0.5 * (p**2).sum() for p in self.low.trainable_parameters()), torch.zeros(()))

    def grad_callback(self) -> None:
        self.gradient = flat([p.grad for p in self.trainable_parameters()])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def line() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 1).double()


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), RATE)


def pair(
    method: Any,
    net: nn.Module | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    low: type[Problem] = Low,
    top: type[Problem] = Top,
    loader: Any = None,
    upper: nn.Module | None = None,
    **config: Any,
) -> tuple[Any, Any, Engine]:
    """Two levels; ``config`` is the lower one's."""
    net, upper = net or mlp(), upper or line()
    made = Config(hypergradient=method, **config)
    lower = low("low", net, optimizer(net), loader or toys.batches(1), made)
    higher = top("top", upper, sgd(upper), toys.batches(2))
    return lower, higher, engine([lower], higher)


def engine(lowers: list[Any], top: Any) -> Engine:
    return Engine(
        [*lowers, top],
        EngineSettings(tensorboard=False),
        u2l={top: lowers},
        l2u={low: [top] for low in lowers},
        device="cpu",
        quiet=True,
    )


def one_step(
    low: Any,
    top: Any,
    at: list[Tensor],
    batches: Sequence[Any],
    rate: float = RATE,
    vector: list[Tensor] | None = None,
) -> Tensor:
    """The truth: ``-rate (d2l / ds dw)^T v`` by double backward through plain functions.

    Args:
        at: the lower level's weights where its loss is differentiated.
        batches: over which its loss is the mean.
        vector: ``v``; by default that of :class:`Top`.
    """

    def call(module: nn.Module, tensors: list[Tensor]) -> toys.Call:
        given = dict(zip(dict(module.named_parameters()), tensors, strict=True))
        given |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        return lambda x: functional_call(module, given, (x,))

    trainable = [p.requires_grad for p in low.module.parameters()]
    w = [v.clone().requires_grad_(yes) for v, yes in zip(at, trainable, strict=True)]
    s = [v.clone().requires_grad_() for v in top.before]
    loss = sum(weighted(call(low.module, w), call(top.module, s), b) for b in batches)
    chosen = [p for p in w if p.requires_grad]
    gradient = torch.autograd.grad(loss / len(batches), chosen, create_graph=True)
    vector = vector or [p.detach() for p in low.trainable_parameters()]
    product = sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
    return -rate * flat(torch.autograd.grad(product, s))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-7) -> bool:
    assert b.norm() > 1e-5, "a truth of zero proves nothing"
    return toys.distance([a], [b]) < tolerance


# ----------------------------------------------------------------- what the step stepped along


class Signs(Low):
    def grad_callback(self) -> None:
        for p in self.trainable_parameters():
            p.grad = 0.01 * p.grad.sign()


@pytest.mark.parametrize("method", ["unrolled", "forward", GRAPHS, FORWARD_OVER_REVERSE, EVOLUTION])
def test_the_optimizer_is_differentiated_at_the_changed_gradient(method: Any) -> None:
    """Adam's first step is g / (|g| + eps): its slope tells which gradient was taken."""
    eps = 0.1
    low, top, program = pair(
        method, None, lambda net: torch.optim.Adam(net.parameters(), RATE, eps=eps), Signs
    )
    program.iterate()
    truth = one_step(low, top, low.before, [low.cur_batch], RATE * eps / (0.01 + eps) ** 2)
    assert close(top.gradient, truth, 1e-5)


class Both(Problem):
    """Depends on ``a``; ``b`` only decides when it steps."""

    before: list[Tensor]
    gradient: Tensor

    def training_step(self, batch: Any) -> Tensor:
        self.before = values(self.module)
        b = sum(p.sum() for p in self.b.trainable_parameters())
        return sum(0.5 * (p**2).sum() for p in self.a.trainable_parameters()) + 0.0 * b

    grad_callback = Top.grad_callback


@pytest.mark.parametrize(
    "method", ["unrolled", "forward", GRAPHS, FORWARD_OVER_REVERSE, EVOLUTION, BEFORE, SAMA]
)
def test_an_upper_that_steps_while_a_lower_accumulates(method: Any) -> None:
    """``a`` has taken one step of two batches and has begun the next one."""
    nets = {"a": mlp(), "b": line()}
    data = toys.batches(1)
    a = Low(
        "a", nets["a"], sgd(nets["a"]), data, Config(hypergradient=method, gradient_accumulation=2)
    )
    b = Low(
        "b", nets["b"], sgd(nets["b"]), toys.batches(3), Config(type="identity", unroll_steps=3)
    )
    upper = line()
    top: Any = Both("top", upper, sgd(upper), toys.batches(2))
    program = engine([a, b], top)
    start = values(nets["a"])
    for _ in range(3):
        program.iterate()
    assert a.trajectory.is_open
    whole = method not in (BEFORE, SAMA)  # these evaluate the step's last batch
    assert close(top.gradient, one_step(a, top, start, data[:2] if whole else data[1:2]), 1e-5)


class Rates(Low):
    """Steps at 0.5, whatever its optimizer was given."""

    def learning_rates(self) -> list[Tensor]:
        return [torch.tensor(0.5)] * len(self.optimizer.param_groups)


@pytest.mark.parametrize("method", [SAMA, BEFORE, "unrolled", HIGHER])
def test_the_learning_rate_is_that_of_the_step(method: Any) -> None:
    low, top, program = pair(method, low=Rates)
    program.iterate()
    assert close(top.gradient, one_step(low, top, low.before, [low.cur_batch], 0.5), 1e-5)


# ------------------------------------------------------------------------------------ buffers


@pytest.mark.parametrize("normalise", [spectral_norm, parametrizations.spectral_norm])
def test_every_evaluation_sees_the_same_buffers(normalise: Any) -> None:
    """Spectral norm moves on with each forward pass: differences of two passes would see that."""
    net = mlp()
    net[0] = normalise(net[0])
    low, top, program = pair({"method": "finite_difference", "epsilon": 1e-5}, net)
    program.iterate()
    assert close(top.gradient, one_step(low, top, values(net), [low.cur_batch]), 1e-5)


class Running(nn.Module):
    """Its forward pass puts new tensors in the buffers' place."""

    mean: Tensor
    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = line()
        self.register_buffer("mean", torch.zeros(3).double())
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.passes = self.passes + 1
        return self.inner(x - self.mean)


@pytest.mark.parametrize("method", ["finite_difference", "identity", "cg", "unrolled", HIGHER])
def test_buffers_that_the_forward_pass_reassigns(method: Any) -> None:
    low, _, program = pair(method, Running())
    program.iterate()
    assert float(low.module.passes) == 1
    assert torch.allclose(low.module.mean, 0.1 * low.cur_batch[0].mean(0), rtol=1e-12)


# ------------------------------------------------------------ which parameters, and where they are


def bias_alone(net: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that doesn't hold the first parameter."""
    return torch.optim.SGD([net.bias], RATE)  # type: ignore[list-item]


@pytest.mark.parametrize(
    "method", [{"method": "penalty", "strength": 1e4, "iterations": 200, "step_size": 0.5}, "exact"]
)
def test_a_first_parameter_that_the_optimizer_does_not_hold(method: Any) -> None:
    """The bias alone responds: ``- d2l/ds db v_b / (d2l/db2)``, and d2l/db2 is twice the weight."""
    low, top, program = pair(method, line(), bias_alone)
    low.module.weight.data *= 0.5
    program.iterate()
    s = top.before
    curvature = 2.0 * float((low.cur_batch[0] @ s[0].T + s[1]).sigmoid().mean())
    vector = [torch.zeros(1, 3), low.module.bias.detach()]
    truth = one_step(low, top, values(low.module), [low.cur_batch], 1.0 / curvature, vector)
    assert close(top.gradient, truth, 1e-3)


@pytest.mark.parametrize("method", ["identity", "finite_difference"])
def test_scale_none_lets_only_what_is_stepped_respond(method: str) -> None:
    spec = {"method": method, "scale": "none"} | (
        {"epsilon": 1e-5} if method == "finite_difference" else {}
    )
    low, top, program = pair(spec, line(), bias_alone)
    program.iterate()
    vector = [torch.zeros(1, 3), low.module.bias.detach()]
    truth = one_step(low, top, values(low.module), [low.cur_batch], 1.0, vector)
    assert close(top.gradient, truth, 1e-5)


class ThroughTop(Low):
    """Reads its own weights through a network of the upper problem, tied to its own."""

    def training_step(self, batch: Any) -> Tensor:
        self.before = values(self.module) if not self.replaying else self.before
        return weighted(self.top.module.tied, self.top.module.weights, batch)


class WeightsAndTied(nn.Module):
    def __init__(self, tied: nn.Module) -> None:
        super().__init__()
        self.weights, self.tied = line(), line()
        self.tied.weight, self.tied.bias = tied.weight, tied.bias


class OfWeights(Top):
    def training_step(self, batch: Any) -> Tensor:
        loss = super().training_step(batch)
        self.before = values(self.module.weights)
        return loss

    def trainable_parameters(self) -> list[Tensor]:
        return list(self.module.weights.parameters())


TIED = [GRAPHS, FORWARD_OVER_REVERSE, HIGHER]


@pytest.mark.parametrize("method", ["unrolled", "forward", *TIED])
def test_weights_tied_across_problems(method: Any) -> None:
    net = line()
    net.weight.data *= -1.0
    upper = WeightsAndTied(net)
    low, top, program = pair(method, net, low=ThroughTop, top=OfWeights, upper=upper)
    top.optimizer.param_groups[0]["params"] = list(upper.weights.parameters())
    program.iterate()
    top.module = upper.weights  # what the truth differentiates by
    assert close(top.gradient, one_step(low, top, low.before, [low.cur_batch]))


class Aside(Low):
    """Reads half of its weights through a network that is in no problem's module."""

    def training_step(self, batch: Any) -> Tensor:
        x, _ = batch
        self.before = values(self.module) if not self.replaying else self.before
        out = functional.linear(x, self.module.weight, self.aside[0])
        return weighted(lambda _: out, self.top.module, batch)


def beside(method: Any) -> tuple[Any, Any, Engine]:
    low, top, program = pair(method, line(), low=Aside)
    low.aside = [low.module.bias]  # a list: no module knows of it
    return low, top, program


@pytest.mark.parametrize("method", TIED)
def test_weights_that_nothing_can_stand_in_for_are_refused(method: Any) -> None:
    """Half of the gradient would be lost in silence."""
    _, _, program = beside(method)
    with pytest.raises(UserError, match="outside the problems' modules"):
        program.iterate()


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_double_backward_finds_weights_anywhere(method: str) -> None:
    low, top, program = beside(method)
    program.iterate()
    assert close(top.gradient, one_step(low, top, low.before, [low.cur_batch]))


THREE = {"unrolled": {"steps": 3}, "forward": {"steps": 3}, "evolution": {"steps": 3, **EVOLUTION}}


class Square(nn.Module):
    """Two matrices of one shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Parameter(torch.randn(3, 3).double()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a @ self.b).sum(1)


@pytest.mark.parametrize("method", [*THREE, "sama", "penalty", "stochastic", "cg"])
@pytest.mark.parametrize("change", ["freeze", "thaw", "swap"])
def test_freezing_in_mid_run(method: str, change: str) -> None:
    """Steps in another space are forgotten: the next hop is that of one step alone."""
    net = Square()
    net.a.requires_grad_(change == "freeze")
    spec = {"method": method, **THREE.get(method, {})}
    spec |= {"warm_start": True} if method in ("penalty", "cg") else {}
    low, top, program = pair(spec, net)
    program.iterate()
    program.iterate()
    net.a.requires_grad_(change != "freeze")
    net.b.requires_grad_(change != "swap")
    program.iterate()
    assert top.gradient.isfinite().all()
    if method in THREE:
        assert close(top.gradient, one_step(low, top, low.before, [low.cur_batch]), 1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_higher_with_a_frozen_parameter_in_the_optimizer(momentum: float) -> None:
    found = []
    for method in (HIGHER, "unrolled"):
        net = mlp()
        net[0].requires_grad_(False)
        _, top, program = pair(
            method,
            net,
            lambda net: torch.optim.SGD(net.parameters(), RATE, momentum=momentum),
            unroll_steps=2,
        )
        for _ in range(4):
            program.iterate()
        found.append(top.gradient)
    assert close(*found, 1e-12)


# --------------------------------------------------------------------------- numbers that run away


class Between(Low):
    """Reaches the upper level through one tensor, and may say so."""

    declares = False

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        z = self.top.module(x)
        if self.declares and self.is_differentiated and not self.replaying:
            self.interface = Interface(
                [z], lambda tensors: self.part(tensors, x, y), self.random_state(), None
            )
        return self.part([z], x, y)

    def part(self, tensors: Any, x: Tensor, y: Tensor) -> Tensor:
        return ((self.module(x + tensors[0]).squeeze(1) - y) ** 2).mean()


class Declared(Between):
    declares = True


def test_bfloat16_does_not_round_the_gradients_by_an_interface() -> None:
    """A difference of gradients in bfloat16 would be 3.5 % off."""
    data = [(x.float(), y.float()) for x, y in toys.batches(1)]
    found = []
    for low, precision in ((Declared, "bf16"), (Between, "fp32")):
        _, top, program = pair(
            "finite_difference",
            mlp().float(),
            low=low,
            loader=data,
            upper=line().float(),
            precision=precision,
        )
        program.iterate()
        found.append(top.gradient)
    assert close(*found, 0.01)


class Quadratic(Low):
    """``w^T D w / 2 + <w, s>``; the Hessian's diagonal is the batch."""

    def training_step(self, batch: Tensor) -> Tensor:
        w = self.module.weight[0]
        return 0.5 * (w * w * batch).sum() + (w * self.top.module.weight[0]).sum()


class Sum(Top):
    scale = 1.0

    def training_step(self, batch: Any) -> Tensor:
        return self.scale * self.low.module.weight.sum()


def still(diagonal: list[float], **settings: Any) -> tuple[Any, Any, Engine]:
    """``stochastic`` on a quadratic whose weights hardly move."""
    return pair(
        {"method": "stochastic", **settings},
        nn.Linear(3, 1, bias=False).double(),
        lambda net: torch.optim.SGD(net.parameters(), 1e-9),
        Quadratic,
        Sum,
        [torch.tensor(diagonal, dtype=torch.float64)],
    )


def test_a_diverging_warm_start_is_dropped_and_reported() -> None:
    _, top, program = still([1.0, 1.0, -1.0])
    for _ in range(40):
        program.iterate()
        assert float(top.metrics["hypergradient/via_low"]) < 100.0
    seen = float(top.metrics["hypergradient/low_step_size"])
    assert seen < 0.25  # half of 1 / lambda_max was 0.5


def test_a_step_too_large_for_a_sharper_hessian_shrinks() -> None:
    """Back to ``-H^-1 v`` once it fits."""
    low, top, program = still([1.0, 1.0, 1.0])
    program.iterate()
    low.set_train_data_loader([torch.full((3,), 6.0, dtype=torch.float64)])
    low._fresh = type(low._fresh)("low", "cpu")
    for _ in range(20):
        program.iterate()
    assert close(top.gradient[:3], torch.full((3,), -1.0 / 6.0, dtype=torch.float64), 1e-3)


def test_a_smaller_vector_is_no_divergence() -> None:
    """A warm start far from the new solution says nothing about the step."""
    _, top, program = still([1.0, 0.01, 0.01])
    for _ in range(30):
        program.iterate()
    step = float(top.metrics["hypergradient/low_step_size"])
    top.scale = 0.01
    for _ in range(3):
        program.iterate()
        assert float(top.metrics["hypergradient/low_diverged"]) == 0.0
    assert float(top.metrics["hypergradient/low_step_size"]) == step


@pytest.mark.parametrize("method", ["cg", "minres", "stochastic", "penalty"])
def test_a_warm_start_from_nan_is_not_kept(method: str) -> None:
    _, top, program = pair({"method": method, "warm_start": True}, line())
    program.iterate()
    former = top.training_step
    top.training_step = lambda batch: math.nan * former(batch)
    weights = values(top.module)
    program.iterate()
    top.training_step = former
    for p, value in zip(top.module.parameters(), weights, strict=True):
        p.data.copy_(value)
    program.iterate()
    assert top.gradient.isfinite().all()


@pytest.mark.parametrize("method", names())
def test_a_nan_in_the_incoming_vector_arrives(method: str) -> None:
    """No method takes it for zero."""
    _, top, program = pair(method, line())
    former = top.training_step
    top.training_step = lambda batch: math.nan * former(batch)
    program.iterate()
    assert top.gradient.isnan().any()


# ----------------------------------------------------------------------------------------- data


def test_fresh_batches_of_a_loader_that_passes_once_are_refused() -> None:
    """They would be missing in training."""
    _, _, program = pair("stochastic", loader=itertools.cycle(toys.batches(1)))
    with pytest.raises(UserError, match="walked through only once"):
        program.iterate()


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor


class ByName(Low):
    seen: type

    def training_step(self, batch: Any) -> Tensor:
        (inner, *_), name = batch["pairs"], batch["name"]
        assert name == "one"
        self.seen = type(inner)
        return weighted(self.module, self.top.module, (inner.x, inner.y))


@pytest.mark.parametrize("kind", [Pair, Record])
def test_batches_keep_their_classes(kind: Any) -> None:
    """Within whatever they are nested in; their tensors go to the problem's device."""
    data = [{"pairs": (kind(*batch), [batch[0]]), "name": "one"} for batch in toys.batches(1)]
    low, _, program = pair("identity", low=ByName, loader=data)
    program.iterate()
    assert low.seen is kind
    low.device = "meta"
    moved = low.get_batch_single_loader(0)["pairs"]
    assert {moved[0].x.device.type, moved[0].y.device.type, moved[1][0].device.type} == {"meta"}


# ------------------------------------------------------------------------------- going on after


def test_resumed_between_two_accumulated_batches_with_graphs() -> None:
    """The graph of the first of them is lost: the step is evaluated again."""

    def make() -> Engine:
        return pair(GRAPHS, unroll_steps=2, gradient_accumulation=2)[2]

    through = make()
    for _ in range(5):
        through.iterate()
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        through.iterate()
        resumed.iterate()
    mine, theirs = tiny.weights(resumed), tiny.weights(through)
    assert all(torch.allclose(mine[k], theirs[k], rtol=1e-12, atol=1e-14) for k in mine)
    assert not torch.equal(through.top.gradient, torch.zeros(4))


def test_sama_keeps_nothing_in_the_optimizer() -> None:
    """Betty copies each gradient into its state, and from there into checkpoints."""
    low, _, program = pair("sama", optimizer=lambda net: torch.optim.Adam(net.parameters()))
    program.iterate()
    assert {key for state in low.optimizer.state.values() for key in state} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


# ----------------------------------------------------------------------------- decoupled decay


@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.RAdam])
def test_decoupled_decay_of_nadam_and_radam(optimizer: Any) -> None:
    """It adds ``decay (sqrt(v) + eps)`` to the Hessian's diagonal, which the truth writes out."""
    decay, eps, beta = 0.5, 1e-8, 0.999
    low, top, program = pair(
        {"method": "cg", "iterations": 50, "warm_start": False},
        nn.Linear(3, 1, bias=False).double(),
        lambda net: optimizer(
            net.parameters(), 1e-3, weight_decay=decay, eps=eps, decoupled_weight_decay=True
        ),
        Quadratic,
        Sum,
        [torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)],
    )
    program.iterate()
    program.iterate()
    (state,) = low.optimizer.state.values()
    root = (state["exp_avg_sq"][0] / (1.0 - beta**2)).sqrt()
    curvature = low.cur_batch + decay * (root + eps)
    assert close(top.gradient[:3], -1.0 / curvature)


# ---------------------------------------------------------------------------- refused, or silent


class Clamped(Low):
    def param_callback(self) -> None:
        for p in self.trainable_parameters():
            p.data.clamp_(-0.2, 0.2)


class OwnStep(Low):
    def custom_optimizer_step(self, *args: Any) -> None:
        self.optimizer.step()


@pytest.mark.parametrize(
    ("method", "low", "what"),
    [
        (HIGHER, Clamped, "param_callback"),
        (HIGHER, Signs, "grad_callback"),
        (HIGHER, OwnStep, "custom_optimizer_step"),
        (EVOLUTION, Clamped, "param_callback"),
        *((m, OwnStep, "custom_optimizer_step") for m in ("unrolled", "forward", EVOLUTION, SAMA)),
    ],
)
def test_steps_that_a_method_would_take_again_otherwise(method: Any, low: Any, what: str) -> None:
    with pytest.raises(UserError, match=f"problem 'low': .*{what}"):
        pair(method, low=low)


class OneRate(Low):
    def learning_rates(self) -> list[Tensor]:
        return [self.top.module.bias.exp().sum()]


def two_groups(net: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[2].parameters()}], RATE)


@pytest.mark.parametrize("method", ["identity", "unrolled"])
def test_learning_rates_of_the_wrong_number(method: str) -> None:
    _, _, program = pair(method, optimizer=two_groups, low=OneRate)
    with pytest.raises(UserError, match=r"learning_rates gives 1, .* has 2 parameter groups"):
        program.iterate()


def test_learning_rates_that_require_a_gradient_warn_of_nothing() -> None:
    low, top, program = pair("unrolled", low=OneRate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program.iterate()
    assert low.optimizer.param_groups[0]["lr"] == pytest.approx(float(top.before[1].exp()))


@pytest.mark.parametrize("name", ["unroll_steps", "gradient_accumulation"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_of_steps_below_one(name: str, number: int) -> None:
    with pytest.raises(ValueError, match=f"{name} {number}: at least 1"):
        Config(**{name: number})


def test_a_namesake_from_another_module_replaces_nothing() -> None:
    namesake = type("Identity", (Identity,), {"__module__": "mine", "__qualname__": "Identity"})
    with pytest.raises(ValueError, match="'identity' is registered already"):
        register("identity")(namesake)
    assert Config(type="identity").hypergradient == Identity()
