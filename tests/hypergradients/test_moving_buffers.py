"""Buffers that a step changes and its loss reads: a hop sees those that the step began with."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scaled import Lower, S, Upper, X, Y, error, points, program
from torch import Tensor, nn

from mlseg import EngineSettings
from mlseg.errors import UserError

DIFFERENCE = {"method": "finite_difference", "epsilon": 1e-4, "linearise": "before_step"}
RATE = 0.005


class Spectral(nn.Sequential):
    """Its vectors turn with each pass in training."""

    def __init__(self) -> None:
        first = nn.utils.spectral_norm(nn.Linear(4, 4))
        super().__init__(first, nn.Tanh(), nn.Linear(4, 1))


class Taught(nn.Module):
    """A teacher in a buffer, pulled along by each pass in training."""

    teacher: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 1, bias=False)
        self.register_buffer("teacher", points(1, 4, seed=5).float())

    def pull(self) -> None:
        self.teacher.mul_(0.5).add_(0.5 * self.student.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.pull()
        return nn.functional.linear(x, self.student.weight * (1.0 + self.teacher.clone()))


class TaughtInData(Taught):
    """The same in a way of which torch takes no note."""

    def pull(self) -> None:
        self.teacher.data.mul_(0.5).add_(0.5 * self.student.weight.detach())


class Replaced(Taught):
    """Likewise, by a new tensor."""

    def pull(self) -> None:
        self.teacher = 0.5 * self.teacher + 0.5 * self.student.weight.detach()


class Queued(nn.Module):
    """Outputs of earlier passes, in a buffer that grows."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 1, bias=False)
        self.register_buffer("queue", torch.zeros(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.student(x)
        before = 1.0 + self.queue.mean(0)
        if self.training:
            self.queue = torch.cat([self.queue, out.detach()])
        return out * before


class Mixed(nn.Sequential):
    """BatchNorm whose statistics the loss reads: a pass in training, one in evaluation."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        trained = super().forward(x)
        self.eval()
        seen = super().forward(x)
        self.train()
        return trained + seen


KINDS: list[Callable[[], nn.Module]] = [Spectral, Taught, TaughtInData, Replaced, Queued, Mixed]


def net_of(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().double()


def buffers(net: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    return [
        (module._buffers, name, value.clone())
        for module in net.modules()
        for name, value in module._buffers.items()
        if value is not None
    ]


def truth(net: nn.Module, steps: int, hops: int = 1) -> float:
    """Of a plain loop: the graph of the last window, walked back from the upper loss."""
    net = copy.deepcopy(net)
    weights = {k: p.detach() for k, p in net.named_parameters()}
    for _ in range(hops):
        s = torch.tensor(S, dtype=torch.float64).requires_grad_()
        weights = {k: w.detach().requires_grad_() for k, w in weights.items()}
        for _ in range(steps):
            loss = error(passed(net, weights), Y) * s.exp()
            gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {k: w - RATE * g for (k, w), g in zip(weights.items(), gradient, strict=True)}
        (found,) = torch.autograd.grad(error(passed(net, weights), Y + 1.0, 2), s)
    return float(found)


def passed(net: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    """A pass that leaves the buffers that graphs have saved alone."""
    for table, name, value in buffers(net):
        table[name] = value
    return torch.func.functional_call(net, weights, (X,))


def difference(net: nn.Module, hops: int) -> float:
    """Of windows of one step, by differences, to which a teacher moves with the student's weights.

    The lower loss is a product with ``exp(s)``: its derivative by ``s`` is itself.
    """
    net = copy.deepcopy(net)
    parameters = list(net.parameters())

    def loss() -> Tensor:
        return error(net(X), Y) * math.exp(S)

    for _ in range(hops):
        begun, weights = buffers(net), [p.detach().clone() for p in parameters]
        gradient = torch.autograd.grad(loss(), parameters)
        for p, g in zip(parameters, gradient, strict=True):
            p.data.sub_(RATE * g)
        along = torch.autograd.grad(error(net(X), Y + 1.0, 2), parameters)
        after, moved = buffers(net), [p.detach().clone() for p in parameters]
        values = []
        for h in (1e-5, -1e-5):
            for table, name, value in begun:
                table[name] = value.clone()
            for p, w, v in zip(parameters, weights, along, strict=True):
                p.data.copy_(w + h * v)
            values.append(float(loss().detach()))
        for p, w in zip(parameters, moved, strict=True):
            p.data.copy_(w)
        for table, name, value in after:
            table[name] = value
    return -RATE * (values[0] - values[1]) / 2e-5


def found(method: Any, net: nn.Module, steps: int, hops: int = 1, **more: Any) -> float:
    engine = program(method, net, steps=steps, rate=RATE, **more)
    while len(engine.upper.gradients) < hops:
        engine.iterate()
    return engine.upper.gradients[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hops", [1, 3])
def test_one_step(kind: Callable[[], nn.Module], hops: int) -> None:
    expected = truth(net_of(kind), 1, hops)
    graphs = {"method": "unrolled", "store": "graphs"}
    if kind is Mixed:
        with pytest.raises(UserError, match=r"BatchNorm's statistics, .* store to weights"):
            found(graphs, net_of(kind), 1, hops)
    for method in ("unrolled",) if kind is Mixed else ("unrolled", graphs):
        assert found(method, net_of(kind), 1, hops) == pytest.approx(expected, rel=1e-9), method
    expected = difference(net_of(kind), hops)
    assert found(DIFFERENCE, net_of(kind), 1, hops) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [{}, {"store": {"states": 2}}, {"backend": "higher"}], ids=str)
def test_several_steps(kind: Callable[[], nn.Module], way: dict[str, Any]) -> None:
    if "backend" in way:
        pytest.importorskip("higher")
    expected = truth(net_of(kind), 4, 2)
    assert found({"method": "unrolled", **way}, net_of(kind), 4, 2) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind: Callable[[], nn.Module]) -> None:
    expected = truth(net_of(kind), 4, 2)
    assert found("forward", net_of(kind), 4, 2) == pytest.approx(expected, rel=1e-9)


def test_evolution() -> None:
    """It moves the weights, and with them what is detached: a queue isn't read by its own step."""
    method = {"method": "evolution", "sigma": 1e-4, "pairs": 1, "directions": "orthogonal"}
    expected = truth(net_of(Queued), 4, 2)
    assert found(method, net_of(Queued), 4, 2) == pytest.approx(expected, rel=1e-5)


class Counted(nn.Linear):
    """A scale in a buffer, which others change."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__(4, 1, bias=False)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Callback(Lower):
    def param_callback(self) -> None:
        self.module.scale.data.mul_(0.5)


class Above(Upper):
    def training_step(self, batch: Any) -> Any:
        if not self.replaying:
            self.lower.module.scale.mul_(0.5)
        return super().training_step(batch)


@pytest.mark.parametrize("levels", [{"lower": Callback}, {"upper": Above}])
def test_those_that_are_changed_between_step_and_hop(levels: dict[str, Any]) -> None:
    net = net_of(Counted)
    w = next(net.parameters()).detach().clone().requires_grad_()
    s = torch.tensor(S, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(error(X @ w.T, Y) * s.exp(), w, create_graph=True)
    after = w - RATE * g
    (expected,) = torch.autograd.grad(error(X @ after.T / 2, Y + 1.0, 2), s)
    for method in (DIFFERENCE, "unrolled"):
        engine = program(method, net_of(Counted), rate=RATE, **levels)
        engine.iterate()
        assert engine.upper.gradients[0] == pytest.approx(float(expected), rel=1e-5), method


def test_a_hop_leaves_them_as_they_were() -> None:
    for kind in KINDS:
        net = net_of(kind)
        plain = copy.deepcopy(net)
        found("unrolled", net, 2, 2)
        optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
        for _ in range(2):
            for _ in range(2):
                optimizer.zero_grad()
                (error(plain(X), Y) * math.exp(S)).backward()
                optimizer.step()
            plain(X)
        for (_, name, a), (_, _, b) in zip(buffers(net), buffers(plain), strict=True):
            assert torch.allclose(a, b, rtol=1e-12), (kind, name)


@pytest.mark.parametrize("kind", [Spectral, Taught])
def test_a_run_that_goes_on_in_mid_window(kind: Callable[[], nn.Module], tmp_path: Path) -> None:
    def make(iterations: int) -> Any:
        settings = EngineSettings(iterations=iterations, tensorboard=False)
        out = tmp_path / str(iterations)
        return program("unrolled", net_of(kind), steps=3, rate=RATE, settings=settings, out=out)

    whole, part = make(6), make(5)
    whole.run()
    part.run()
    rest = make(6)
    rest.resume(tmp_path / "5")
    rest.run()
    assert rest.upper.gradients[-1] == whole.upper.gradients[-1]
