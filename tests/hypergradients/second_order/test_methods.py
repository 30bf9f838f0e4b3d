"""Every method that differentiates gradients, by either formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlseg.hypergradients import Differentiating, resolve
from mlseg.hypergradients.registry import classes
from mlseg.testing import programs
from mlseg.testing.exact import distance
from mlseg.testing.programs import Graph


class Net(nn.Module):
    """(B, 2, 6, 5) to (B, 3, 3, 3), through all that is differentiated by formulas here."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 4, 2, padding=1),
            nn.InstanceNorm2d(4, affine=True),
            nn.Tanh(),
            nn.Conv2d(4, 3, 1),
            nn.LayerNorm([3, 2, 2]),
        ).double()
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, 0.3, 0.4, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def low(nets: Any, batch: Any) -> Tensor:
    return ((nets["low"](batch) - 0.1 * nets["top"](batch)) ** 2).mean()


def top(nets: Any, batch: Any) -> Tensor:
    return (nets["low"](batch) - 0.5).square().mean()


PROGRAM = Graph({"low": low, "top": top}, *programs.TWO_LEVELS)
DIFFERENTIATING = [name for name, cls in classes().items() if issubclass(cls, Differentiating)]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "cg": [{"damping": 1.0}],
    "minres": [{"damping": 1.0}],
    "neumann": [{"step_size": 0.1}],
    "stochastic": [{"step_size": 0.1}],
    "nystrom": [{"rank": 5, "damping": 1.0}],
    "exact": [{"damping": 1.0}],
    "unrolled": [{}, {"store": "graphs"}],
    "forward": [{"limit": 1000, "steps": 1}],
}


def gradient(spec: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(3, 2, 6, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    modules = {name: Net(seed) for seed, name in enumerate(PROGRAM.losses)}
    loaders = dict.fromkeys(PROGRAM.losses, batches)
    configs = {"low": {"unroll_steps": 2}}
    engine = programs.build(PROGRAM, modules, loaders, spec, configs=configs)
    for _ in range(2):
        engine.iterate()
    return engine.top.gradient


@pytest.mark.parametrize(
    ("method", "settings"),
    [(name, given) for name in DIFFERENTIATING for given in SETTINGS.get(name, [{}])],
)
def test_every_method_gives_the_same_with_torchs_formulas(
    method: str, settings: dict[str, Any]
) -> None:
    """Rounding of 1e-16, times the condition of what is solved."""
    spec = {"method": method, **settings}
    mine = gradient(spec)
    theirs = gradient({**spec, "second_order": "torch"})
    assert distance(mine, theirs) < 1e-9
    assert not torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "identity", "mode": "forward_over_reverse"},
        {"method": "unrolled", "mode": "forward_over_reverse"},
        {"method": "unrolled", "backend": "higher"},  # a cross-check by other means
        {"method": "finite_difference"},
    ],
)
def test_where_no_graph_is_differentiated_operations_are_torchs(spec: dict[str, Any]) -> None:
    assert resolve(spec).formulas() == "torch"


def test_methods_without_second_derivatives_have_no_such_setting() -> None:
    for name, cls in classes().items():
        assert ("second_order" in cls.model_fields) is (name in DIFFERENTIATING)
        assert not (cls.first_derivatives_alone and name in DIFFERENTIATING)
