"""Every method and every system on a device whose numbers nobody may look at."""

from typing import Any

import elsewhere
import pytest
import tiny
import torch
from torch import Tensor

from mlseg.hypergradients import Hop, names
from mlseg.testing import programs
from mlseg.testing.programs import GRAPHS, Noted

LEFT_OUT = {
    "exact": "its eigendecomposition says on the host whether it has failed",
    "forward": "a push per hyperparameter, whose formulas for this device are slow Python",
}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "unrolled": [
        {},
        {"store": "graphs"},
        {"store": {"states": 2}},
        {"mode": "difference"},
        {"mode": "forward_over_reverse"},
    ],
    "fixed_point": [{"iterations": 2}],
    "evolution": [{"pairs": 1}],
    "penalty": [{"iterations": 2}],
    # What draws on the device for itself has a generator there, which this device hasn't.
    "neumann": [{"step_size": 0.1, "terms": 2}],
    "stochastic": [{"step_size": 0.1, "iterations": 2}],
    "nystrom": [{"sketch": "gaussian", "rank": 2}],
    "cg": [{"iterations": 2}, {"iterations": 2, "preconditioner": "kfac"}],
    "minres": [
        {"iterations": 2},
        {"iterations": 2, "preconditioner": "kfac", "warm_start": True},
    ],
    "finite_difference": [{}, {"scale": "optimizer", "linearise": "before_step"}],
}
METHODS = [
    pytest.param({"method": name, **more}, id=" ".join([name, *map(str, more.values())]))
    for name in names()
    if name not in LEFT_OUT
    for more in SETTINGS.get(name, [{}])
]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.01)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In E2EAug's shape of graph: a hop that starts another, and accumulated paths."""
    host = Hop.generator
    monkeypatch.setattr(Hop, "generator", lambda hop, seed, device: host(hop, seed, "cpu"))
    engine: Any = programs.small(
        GRAPHS["two paths" if "states" not in str(method) else "two levels"],
        method,
        adam,
        unroll={"low": 3} if "states" in str(method) else None,
        kinds={"low": Noted} if "states" in str(method) else None,  # without a grad_callback
    )
    elsewhere.send_away(engine)
    for _ in range(3 if method["method"] == "unrolled" else 2):
        elsewhere.iterate(engine)
    assert all(g.device.type == "meta" for g in engine.top.gradients[-1])


def test_what_is_made_on_the_host_is_found() -> None:
    engine: Any = programs.small(GRAPHS["two levels"], "identity")
    elsewhere.send_away(engine)
    former = engine.low.training_step
    engine.low.training_step = lambda batch: former(batch) * torch.ones(2).double().sum()
    elsewhere.iterate(engine)  # a scalar of the host may go with a device's tensors
    engine.low.training_step = lambda batch: former(batch) + torch.ones(2, dtype=torch.double)[1:]
    with pytest.raises(RuntimeError, match="device"):
        elsewhere.iterate(engine)


@pytest.mark.parametrize("look", [float, bool, Tensor.tolist])
def test_what_looks_at_a_number_is_found(look: Any) -> None:
    engine: Any = programs.small(GRAPHS["two levels"], "identity")
    elsewhere.send_away(engine)
    former = engine.low.training_step

    def step(batch: Any) -> Any:
        loss = former(batch)
        look(loss.detach())
        return loss

    engine.low.training_step = step
    with pytest.raises((RuntimeError, NotImplementedError)):
        elsewhere.iterate(engine)


LOSS = {"cross_entropy": 1.0, "dice": 1.0}
PEER = {"name": "unet", "channels": 4, "levels": 2}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised", {"loss": LOSS}),
    "e2eaug": ("e2eaug", {"gan.pretrain": 0, "loss": LOSS}),
    "segan": ("segan", {}),
    # In turn, as a buffer of label maps is the engine's and lies on the host.
    "load": ("load", {"descent_ascent": 3}),
    "ctbct": ("semi_supervised", {}),
    "dct": ("semi_supervised", {"method": "dct", "partner": PEER, "adversarial.begin": 0}),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_systems_steps(name: str) -> None:
    engine: Any = tiny.build(*SYSTEMS[name])
    elsewhere.send_away(engine)
    for stage in range(len(engine.stages)):
        engine.enter_stage(stage)
        engine.train()
        for problem in engine.problems:
            if hasattr(problem, "again"):
                problem.again._begins = 1
        for _ in range(2):
            elsewhere.iterate(engine)
