"""Runs off the beaten track: what diverges, is refused, or goes on after an interruption."""

import io
import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from pairs import (
    EVOLUTION,
    GRAPHS,
    HIGHER,
    RATE,
    SAMA,
    Between,
    Declared,
    Low,
    Signs,
    Top,
    close,
    line,
    mlp,
    pair,
    values,
    weighted,
)
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.errors import UserError
from mlseg.hypergradients import Identity, names, register
from mlseg.multilevel.config import Config
from mlseg.testing import programs

# --------------------------------------------------------------------------- numbers that run away


def test_bfloat16_does_not_round_the_gradients_by_an_interface() -> None:
    """A difference of gradients in bfloat16 would be 3.5 % off."""
    data = [(x.float(), y.float()) for x, y in programs.batches(1)]
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
    one, other = found
    assert close(one, other, 0.01)


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
    _, _, program = pair("stochastic", loader=itertools.cycle(programs.batches(1)))
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
    data = [{"pairs": (kind(*batch), [batch[0]]), "name": "one"} for batch in programs.batches(1)]
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
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once per process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            program.iterate()
    finally:
        torch.set_warn_always(always)
    assert low.optimizer.param_groups[0]["lr"] == pytest.approx(float(top.before[1].exp()))


@pytest.mark.parametrize("name", ["unroll_steps", "gradient_accumulation"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_of_steps_below_one(name: str, number: int) -> None:
    given: dict[str, Any] = {name: number}
    with pytest.raises(ValueError, match=f"{name} {number}: at least 1"):
        Config(**given)


def test_a_namesake_from_another_module_replaces_nothing() -> None:
    namesake = type("Identity", (Identity,), {"__module__": "mine", "__qualname__": "Identity"})
    with pytest.raises(
        ValueError, match=r"two of the kind hypergradient method are named 'identity': .*rename one"
    ):
        register("identity")(namesake)
    assert Config(type="identity").hypergradient == Identity()
