"""SegAN's Stackelberg variant, in float64, against double backward through the critic's step.

The reference: C' = C - eta d(-L)/dC by the segmentor's maps, then the whole derivative of
L(C', S) by S. Nothing of the library's hypergradients has a part in it.
"""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.func import functional_call

from mlseg.errors import UserError
from mlseg.hypergradients import names
from mlseg.problems.segan.losses import multi_scale_l1

RATE = 0.05
GAME = {
    "game": "stackelberg",
    "critic.clamp": None,
    "problems.critic.optimizer": {"name": "sgd", "lr": RATE},
    "problems.segmentor.optimizer": {"name": "sgd", "lr": 1e-30},
}


pytestmark = pytest.mark.usefixtures("double")


def play(unroll: int = 1, **changes: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], Any]:
    """The segmentor's gradient after ``unroll`` steps of the critic.

    Returns:
        the gradient; the reference with and without the critic's response; the engine.
    """
    steps_of_critic = {"problems.critic.unroll_steps": unroll}
    engine = tiny.build("segan", {**GAME, **steps_of_critic, **changes})
    critic, segmentor = engine.critic, engine.segmentor
    critic.set_train_data_loader(tiny.Doubled(critic.train_data_loader[0]))
    before = {n: p.detach().clone() for n, p in critic.module.named_parameters()}
    steps: list[list[Tensor]] = []
    tiny.gradients_of(segmentor, steps)
    batches = []
    for _ in range(unroll):
        engine.iterate()
        batches.append(critic.cur_batch)
    parameters = segmentor.trainable_parameters()

    def loss(weights: dict[str, Tensor], batch: Any) -> Tensor:
        image, label, counted = batch
        maps = segmentor.maps(image, counted)
        buffers = {n: b.clone() for n, b in critic.module.named_buffers()}
        true, predicted = (
            functional_call(critic.module, {**weights, **buffers}, ((image + 1) / 2, m))
            for m in (label, maps)
        )
        return multi_scale_l1(predicted[0], true[0])

    after = {n: p.clone().requires_grad_() for n, p in before.items()}
    for batch in batches:
        ascent = torch.autograd.grad(loss(after, batch), list(after.values()), create_graph=True)
        after = {n: p + RATE * g for (n, p), g in zip(after.items(), ascent, strict=True)}
    for n, p in critic.module.named_parameters():
        torch.testing.assert_close(after[n], p, rtol=1e-9, atol=1e-12)
    whole = torch.autograd.grad(loss(after, batches[-1]), parameters, retain_graph=True)
    fixed = {n: p.detach() for n, p in after.items()}
    direct = torch.autograd.grad(loss(fixed, batches[-1]), parameters)
    return steps[0], list(whole), list(direct), engine


def error(a: list[Tensor], b: list[Tensor]) -> float:
    one, two = (torch.cat([t.flatten() for t in ts]) for ts in (a, b))
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize(
    "method", [{"method": "identity", "linearise": "before_step"}, {"method": "unrolled"}]
)
def test_the_whole_derivative_through_the_critics_step(method: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"problems.critic.hypergradient": method}
    gradient, whole, direct, engine = play(**changes)
    assert error(gradient, whole) < 1e-9
    assert error(gradient, direct) > 1e-3, "the critic's response has a part in it"
    assert float(engine.segmentor.metrics["hypergradient/via_critic"]) > 0


@pytest.mark.parametrize("store", ["weights", "graphs"])
def test_unrolling_follows_all_steps_of_the_critic(store: str) -> None:
    """The first of the two steps reaches the segmentor too, though it keeps no statistics of it."""
    method = {"problems.critic.hypergradient": {"method": "unrolled", "steps": 2, "store": store}}
    gradient, whole, direct, _ = play(2, **method)
    assert error(gradient, whole) < 1e-9
    assert error(direct, whole) > 1e-3


def test_finite_differences_approach_it() -> None:
    """The loss has kinks (|.|, LeakyReLU): the step must be so small that none is crossed.

    Rounding is then 1e-16 over the step of 1e-9 for each operation, 1e-5 for a hundred of them.
    """
    method = {"method": "finite_difference", "linearise": "before_step", "epsilon": 1e-9}
    changes: dict[str, Any] = {"problems.critic.hypergradient": method}
    gradient, whole, direct, _ = play(**changes)
    assert error(gradient, whole) < 1e-2 * error(direct, whole)


def test_plain_alternation_is_the_direct_part_alone() -> None:
    gradient, whole, direct, _ = play(game="alternating")
    assert error(gradient, direct) < 1e-12
    assert error(gradient, whole) > 1e-3


SMALL_ONLY = {"exact", "forward"}
"""Methods whose cost grows with the number of parameters, and which say so."""


@pytest.mark.parametrize("method", names())
def test_every_method_of_the_registry_plays(method: str) -> None:
    changes: dict[str, Any] = {
        "game": "stackelberg",
        "problems.critic.hypergradient": {"method": method},
    }
    torch.set_default_dtype(torch.float32)
    if method == "evolution":  # it takes the critic's steps again, without the clamp after them
        with pytest.raises(UserError, match="param_callback"):
            tiny.build("segan", changes).iterate()
        return
    if method in SMALL_ONLY:
        with pytest.raises(UserError, match="parameters"):
            tiny.build("segan", changes)
        return
    engine = tiny.build("segan", changes)
    before = tiny.weights(engine)
    for _ in range(2):
        engine.iterate()
    after = tiny.weights(engine)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("segmentor/"))
    assert float(engine.segmentor.metrics["hypergradient/via_critic"]) > 0
