"""Unrolling recorded steps against torch's own differentiable optimizers and other libraries."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torchopt
import waiting
from unrolling import (
    NOT_BY_TORCH,
    OPTIMIZERS,
    WEIGHTS,
    by_difference,
    lower_loss,
    program,
    reference,
    run,
    upper_loss,
)

from mlseg.errors import RunError, UserError
from mlseg.testing.exact import distance
from mlseg.testing.programs import Optimizers, sgd

pytestmark = [
    # torch's differentiable optimizers count steps in the default type.
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


METHODS: dict[str, dict[str, Any]] = {
    "weights": {"method": "unrolled"},
    "graphs": {"method": "unrolled", "store": "graphs"},
    "last graphs": {"method": "unrolled", "store": {"graphs": 2}},
    "forward over reverse": {"method": "unrolled", "mode": "forward_over_reverse"},
    "difference": {"method": "unrolled", "mode": "difference", "epsilon": 1e-5},
    "few states": {"method": "unrolled", "store": {"states": 2}},
    "forward": {"method": "forward"},
    # Pairs in every direction: a central difference of the whole run.
    "evolution": {
        "method": "evolution",
        "pairs": WEIGHTS,
        "directions": "orthogonal",
        "sigma": 1e-5,
    },
}


def allowed(method: str) -> float:
    """Relative error, in float64 with u = 1e-16.

    Exact methods and references do the same sums in another order: some hundred operations a
    step, whose derivatives divide by ``unrolling.EPS`` = 1e-3 at most once, 1e-11 for three steps.
    A difference of step sigma = 1e-5 (or epsilon, of the weights' norm) errs by sigma^2 = 1e-10
    times a third derivative over a first, below 10 for these losses, and by the hundred roundings
    of its values over sigma, 1e-9.
    """
    return 1e-6 if method in ("evolution", "difference") else 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, method: str) -> None:
    """In the second window, whose steps start from moments."""
    engine = program(METHODS[method], OPTIMIZERS[optimizer])
    found = run(engine, 2)
    assert distance(found, reference(engine, 3)) < allowed(method)


ON_A_GPU: dict[str, Optimizers] = {
    **OPTIMIZERS,
    **NOT_BY_TORCH,
    "adam fused": lambda p: torch.optim.Adam(p, 0.05, fused=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1, fused=True),
}
HOPS: dict[str, dict[str, Any]] = {
    **METHODS,
    "fresh": {"method": "unrolled", "optimizer_state": "fresh"},
    "fixed point": {"method": "fixed_point"},
    "sama": {"method": "sama", "epsilon": 1e-4},
    "optimizer's scale": {"method": "identity", "scale": "optimizer"},
}


@waiting.needs_gpu
@pytest.mark.parametrize("method", HOPS)
@pytest.mark.parametrize("optimizer", ON_A_GPU)
def test_on_a_gpu_the_same_without_waiting(optimizer: str, method: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        engine = program(HOPS[method], ON_A_GPU[optimizer], device=device)
        engine.low.module.dropout.p = 0.0  # each device draws its own
        run(engine, 1)
        with waiting.forbidden() if device == "cuda" else nullcontext():
            found[device] = run(engine, 2)
    # Both round; a difference divides by its step, and Adagrad rounding errors by themselves.
    differences = 5e-3 if optimizer == "adagrad" else 1e-4
    divides = method in ("evolution", "sama", "difference")
    assert distance(found["cuda"].cpu(), found["cpu"]) < (differences if divides else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", NOT_BY_TORCH)
def test_optimizers_that_torch_differentiates_wrongly(optimizer: str, method: str) -> None:
    """Its graphs of these are void after two steps."""

    def make(spec: Any) -> Any:
        return program(spec, NOT_BY_TORCH[optimizer])

    engine = make(METHODS[method])
    found = run(engine, 1)
    by_difference(engine, make).check(found, within=max(1e-7, allowed(method)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2])
def test_truncation(method: str, steps: int) -> None:
    engine = program({**METHODS[method], "steps": steps}, OPTIMIZERS["adam"])
    found = run(engine, 2)
    assert distance(found, reference(engine, steps)) < allowed(method)


@pytest.mark.parametrize("method", METHODS)
def test_learning_rates_of_the_upper_level(method: str) -> None:
    """The last scale is also the logarithm of the lower level's rate."""

    def make(spec: Any) -> Any:
        return program(spec, sgd(momentum=0.9), with_rate=True)

    engine = make(METHODS[method])
    found = run(engine, 1)
    true = by_difference(engine, make)
    without = run(program(METHODS[method], sgd(momentum=0.9)), 1)
    true.check(found, within=max(1e-7, allowed(method)))
    assert distance(without, true.value) > 1e-2


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
    assert distance(found, true) < allowed(method)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_written_into(method: str) -> None:
    """By clipping and, over lists of tensors, by Nesterov's momentum; graphs want the old ones."""
    nesterov = sgd(momentum=0.9, nesterov=True, foreach=True)
    engine = program(METHODS[method], nesterov, gradient_clipping=0.3)
    found = run(engine, 2)
    assert distance(found, reference(engine, 3, clip=0.3)) < allowed(method)


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
    engine = program({"method": "unrolled", "store": {"graphs": 2}}, sgd())
    for _ in range(2):
        run(engine, 1)
        steps = engine.low.trajectory.steps
        assert [bool(step.graphs) for step in steps] == [False, True, True]
        assert [bool(step.leaves) for step in steps] == [False, True, True]
    assert "graphs" not in str(engine.low.trajectory.state_dict().keys())


def test_a_difference_that_is_off_ends_the_run() -> None:
    """Against one exact product per hop; each step has its turn."""

    engine = program(METHODS["difference"], sgd(), plain=True)
    errors = []
    for uppers in range(1, 4):
        run(engine, uppers)
        errors.append(float(engine.top.metrics["hypergradient/low_difference_error"]))
    assert all(error < 1e-6 for error in errors)
    assert len(set(errors)) == 3
    assert engine.top.metrics["hypergradient/low_products"] == 1
    # Per step two at its sides; one more for the exact product.
    assert engine.top.metrics["hypergradient/low_evaluations"] == 2 * 3 + 1
    engine = program({**METHODS["difference"], "epsilon": 0.5}, sgd(), plain=True)
    with pytest.raises(RunError, match=r"off by .* more than the tolerance 0\.05: .*set the"):
        run(engine, 1)
    engine = program({**METHODS["difference"], "epsilon": 0.5, "tolerance": 1e3}, sgd(), plain=True)
    run(engine, 1)


# --------------------------------------------------------------- other people's libraries


@pytest.mark.parametrize("name", ["sgd momentum", "sgd nesterov", "adam", "rmsprop"])
def test_higher(name: str) -> None:
    # higher's Adam adds eps before it corrects the second moment: where eps is small it's the same.
    small = {"adam": lambda p: torch.optim.Adam(p, 0.05, betas=(0.5, 0.9), weight_decay=1e-2)}
    optimizer = small.get(name, OPTIMIZERS[name])
    ours = program({"method": "unrolled"}, optimizer)
    theirs = program({"method": "unrolled", "backend": "higher"}, optimizer)
    # It corrects in float32, twice a step and three steps, with a rounding unit of 6e-8.
    assert distance(run(ours, 2), run(theirs, 2)) < 1e-5


def test_higher_serves_optimizers_of_its_own() -> None:
    engine = program(
        {"method": "unrolled", "backend": "higher"}, lambda p: torch.optim.Adadelta(p, 0.5)
    )
    found = run(engine, 2)
    assert distance(found, reference(engine, 3)) < 1e-9


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_torchopt(name: str) -> None:
    """In the first window, without moments; TorchOpt's Adam gives NaN at zero second moments."""
    settings: dict[str, Any] = {"lr": 0.05, **PLAIN[name][2]}
    engine = program({"method": "unrolled"}, lambda p: PLAIN[name][0](p, **settings), plain=True)
    found = run(engine, 1)
    steps = engine.low.notes
    net = copy.deepcopy(engine.low.module)
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_(steps[0].values[n])
    scales = engine.top.notes[-1].values["value"].clone().requires_grad_()
    optimizer = PLAIN[name][1](net, **settings)
    for step in steps:
        torch.set_rng_state(step.random)
        optimizer.step(lower_loss(net, scales, step.batch))
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
            {"store": {"graphs": 1}, "mode": "forward_over_reverse"},
            sgd(),
            {},
            "set store to weights, or mode",
        ),
        ({"store": "graphs", "mode": "difference"}, sgd(), {}, "set store to weights, or mode"),
        ({"backend": "higher", "mode": "difference"}, sgd(), {}, "set backend to mlseg"),
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
