"""One-sided differences whose unperturbed gradient the training step takes along."""

import io
from typing import Any

import pytest
import torch
from pairs import Declared, mlp, pair

from mlseg.errors import UserError
from mlseg.hypergradients import Hop
from mlseg.testing import programs
from mlseg.testing.exact import distance
from mlseg.testing.programs import GRAPHS, Graph

BEFORE = {"method": "finite_difference", "linearise": "before_step"}
FORWARD = {**BEFORE, "scheme": "forward"}
ONE_SIDED = {**BEFORE, "scheme": "one_sided"}


def hop_of(engine: Any, level: str = "low") -> dict[str, float]:
    figures = engine.top.metrics
    return {k: figures[f"hypergradient/{level}_{k}"] for k in ("evaluations", "step")}


@pytest.mark.parametrize("graph", ["two levels"])
@pytest.mark.parametrize(
    "optimizer", [None, lambda p: torch.optim.Adam(p, 0.01, fused=True)], ids=["sgd", "adam"]
)
def test_bit_for_bit_a_forward_difference_for_half_the_price(graph: str, optimizer: Any) -> None:
    """With dropout and BatchNorm: the training step drew what the hop draws again."""
    found = []
    for method in (FORWARD, ONE_SIDED):
        engine: Any = programs.small(GRAPHS[graph], method, optimizer)
        for _ in range(4):
            engine.iterate()
        found.append((engine.top.gradient, hop_of(engine)["evaluations"]))
    (one, twice), (other, once) = found
    assert torch.equal(one, other)
    assert (twice, once) == (2, 1)


def test_only_the_step_before_a_hop_goes_further_back() -> None:
    engine: Any = programs.small(GRAPHS["two levels"], ONE_SIDED, unroll={"low": 3})
    taken = []
    for _ in range(6):
        former = engine.low.hypergradient
        engine.iterate()
        taken.append(engine.low.trajectory.taken_along is not None)
        assert former
    assert taken == [False, False, True, False, False, True]
    same: Any = programs.small(GRAPHS["two levels"], FORWARD, unroll={"low": 3})
    for _ in range(6):
        same.iterate()
    assert torch.equal(same.top.gradient, engine.top.gradient)


def test_through_an_interface() -> None:
    """By the interface's tensors: the networks behind them are passed once."""
    found = []
    for method in (FORWARD, ONE_SIDED):
        _, top, program = pair(method, mlp(), low=Declared)
        for _ in range(3):
            program.iterate()
        found.append(top.gradient)
        evaluations = top.metrics["hypergradient/low_evaluations"]
    assert torch.equal(*found)
    assert evaluations == 1


def critic_between(*, fused: bool = False) -> Any:
    """The low level's loss depends on a critic that steps after it, before the top's hop."""
    graph = Graph(
        {
            "low": lambda nets, batch: (
                programs.fit("low", "top")(nets, batch) + (nets["critic"](batch[0]) ** 2).mean()
            ),
            "critic": programs.fit("critic"),
            "top": programs.fit("low"),
        },
        {"low": ["top"], "critic": ["top"]},
        {"top": ["low"]},
    )
    adam = lambda p: torch.optim.Adam(p, 0.01, fused=fused)  # noqa: E731
    return programs.small(graph, ONE_SIDED, adam)


@pytest.mark.parametrize("fused", [False, True])
def test_another_level_that_steps_in_between_voids_it(fused: bool) -> None:
    with pytest.raises(UserError, match="'critic', which its loss depends on, has stepped"):
        critic_between(fused=fused).iterate()


def test_a_level_that_has_no_part_in_the_loss_may_step() -> None:
    """In two paths the low level's hop comes after the middle one's step."""
    graph = Graph(
        {"low": programs.fit("low", "top"), "other": programs.fit("other"),
         "top": programs.fit("low")},
        {"low": ["top"], "other": ["top"]},
        {"top": ["low"]},
    )  # fmt: skip
    engine: Any = programs.small(graph, ONE_SIDED)
    engine.iterate()
    assert hop_of(engine)["evaluations"] == 1


def test_a_resumed_run_goes_on_the_same() -> None:
    through: Any = programs.small(GRAPHS["two levels"], ONE_SIDED, dropout=0.0, unroll={"low": 2})
    for _ in range(3):
        through.iterate()
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    resumed: Any = programs.small(GRAPHS["two levels"], ONE_SIDED, dropout=0.0, unroll={"low": 2})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        through.iterate()
        resumed.iterate()
    assert torch.equal(through.top.gradient, resumed.top.gradient)


def test_without_what_was_taken_along_it_is_evaluated() -> None:
    """As after an interruption between the step and the hop: the same, bit for bit."""
    engine: Any = programs.small(GRAPHS["two levels"], ONE_SIDED, dropout=0.0)
    engine.iterate()
    v = [torch.randn_like(p) for p in engine.low.trainable_parameters()]
    # The top has stepped since: put it back where it was.
    with torch.no_grad():
        for p, was in zip(
            engine.top.trainable_parameters(), engine.top.notes[-1].values.values(), strict=True
        ):
            p.copy_(was)
    engine.low.trajectory.taken_along = None
    (evaluated,), figures = engine.low.method(v, Hop(engine.low, [engine.top]))
    assert figures["evaluations"] == 2
    method = engine.low.method.model_copy(update={"scheme": "forward"})
    (forward,), _ = method(v, Hop(engine.low, [engine.top]))
    assert all(torch.equal(a, b) for a, b in zip(evaluated, forward, strict=True))


def test_first_order_in_the_step() -> None:
    """Against the derivative itself: the error falls with epsilon, not with its square."""
    errors = []
    for epsilon in (1e-2, 1e-3, 1e-4):
        method = {**ONE_SIDED, "epsilon": epsilon}
        engine: Any = programs.small(GRAPHS["two levels"], method, dropout=0.0)
        exact: Any = programs.small(
            GRAPHS["two levels"], {"method": "identity", "linearise": "before_step"}, dropout=0.0
        )
        engine.iterate()
        exact.iterate()
        errors.append(distance(engine.top.gradient, exact.top.gradient))
    # Ten times, give or take what second order makes of the first of them.
    assert 5.0 < errors[0] / errors[1] < 20.0
    assert 8.0 < errors[1] / errors[2] < 12.0


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        ({"linearise": "after_step"}, {}, "set linearise to before_step"),
        ({}, {"precision": "bf16"}, "in full precision"),
        ({}, {"gradient_accumulation": 2}, "set accumulate to 1"),
    ],
)
def test_what_it_cant_be_had_of_is_refused(method: Any, config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pair({**ONE_SIDED, **method}, **config)


def test_a_level_with_lower_ones_is_refused() -> None:
    with pytest.raises(UserError, match="serves levels without lower ones"):
        programs.small(GRAPHS["chain of three"], ONE_SIDED)
