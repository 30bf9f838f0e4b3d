"""What tests of SegAN's game look at: the loss around each player's step."""

from typing import Any

import tiny
import torch
from torch import Tensor

PLAIN = {
    "problems.critic.optimizer": {"name": "sgd", "lr": 1e-3},
    "problems.segmentor.optimizer": {"name": "sgd", "lr": 1e-3},
    "critic.clamp": None,
}
"""Small steps along the gradient, nothing after them."""


def distance(engine: Any, batch: Any) -> float:
    """The loss of both players on a batch, leaving no trace."""
    image, label, counted = batch
    with torch.no_grad(), engine.critic.again.untraced():
        return float(engine.critic.distance(image, engine.segmentor.maps(image, counted), label))


def watch(engine: Any) -> dict[str, Any]:
    """The loss on the present batch before and after each player's step, and the networks."""
    seen: dict[str, Any] = {}
    for name in ("critic", "segmentor"):
        problem = getattr(engine, name)
        former = problem.optimizer_step

        def stepped(name: str = name, problem: Any = problem, former: Any = former) -> None:
            seen[f"before {name}"] = distance(engine, problem.cur_batch), tiny.weights(engine)
            former()
            seen[f"after {name}"] = distance(engine, problem.cur_batch), tiny.weights(engine)

        problem.optimizer_step = stepped
    return seen


def parameters_that_differ(engine: Any, a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    names = {f"{p.name}/{n}" for p in engine.problems for n, _ in p.module.named_parameters()}
    return {name.split("/")[0] for name in names if not torch.equal(a[name], b[name])}
