"""Passes over each network in one iteration of SegAN; the docstring of the system states them."""

from typing import Any

import pytest
import tiny
from torch import Tensor


class Critics:
    """Counts a critic's forward passes, and the backward ones by the deepest features."""

    def __init__(self, module: Any) -> None:
        self.forward = self.backward = 0
        for critic in module.critics:
            critic.register_forward_hook(self._forward)

    def _forward(self, module: Any, inputs: Any, features: list[Tensor]) -> None:
        self.forward += 1
        if features[-1].requires_grad:
            features[-1].register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backward += 1


def passes(changes: dict[str, Any], iterations: int = 1) -> list[tuple[int, int]]:
    """(forward, backward) of segmentor and critic, after a first iteration."""
    engine = tiny.build("segan", changes)
    for _ in range(iterations):
        engine.iterate()  # the first ones may set something up
    segmentor, critic = tiny.Counter(engine.segmentor.module), Critics(engine.critic.module)
    for _ in range(iterations):
        engine.iterate()
    return [(c.forward, c.backward) for c in (segmentor, critic)]


@pytest.mark.parametrize("changes", [{}, {"loss.dice_weight": 1.0}, {"critic.clamp_norm": False}])
def test_plain_alternation(changes: dict[str, Any]) -> None:
    """One pass of the segmentor serves both steps."""
    assert passes(changes) == [(1, 1), (4, 3)]


def test_a_critic_per_class_is_as_many_passes() -> None:
    scenes = {"data.name": "synthetic_scenes"}
    (segmentor, each), (_, stacked) = (
        passes(scenes),
        passes({**scenes, "critic.classes": "stacked"}),
    )
    assert segmentor == (1, 1)
    assert stacked == (4, 3)
    assert each == (7 * 4, 7 * 3)


def test_more_steps_of_the_critic_than_of_the_segmentor() -> None:
    """Three of the critic's with a forward pass each; the last one's serves the segmentor."""
    found = passes({"problems.critic.unroll_steps": 3}, iterations=3)
    assert found == [(3, 1), (3 * 2 + 2, 3 * 2 + 1)]


def test_the_warm_up_leaves_the_critic_alone() -> None:
    assert passes({"warmup_epochs": 4}) == [(1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("method", "critic"),
    [
        # Beside the plain game's: a backward pass of the true image in the segmentor's step, and
        # the method's two evaluations (a third of the plain game's) of true and predicted.
        ("finite_difference", (4 + 4, 4 + 2 + 2)),
        ("identity", (4 + 2, None)),
    ],
)
def test_stackelberg_goes_back_through_the_segmentor_twice(
    method: str, critic: tuple[int, int | None]
) -> None:
    found = passes({"game": "stackelberg", "problems.critic.hypergradient": {"method": method}})
    assert found[0] == (1, 2)
    assert found[1][0] == critic[0]
