"""Kronecker factors against another library, dense algebra and exact solves."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scaled import points
from torch import Tensor, nn
from torch.nn import functional

from mlseg.engines.engine import Engine
from mlseg.hypergradients import Hop
from mlseg.hypergradients.kronecker import Factors, Kronecker
from mlseg.testing import programs
from mlseg.testing.exact import distance
from mlseg.testing.families import Vector
from mlseg.testing.programs import TWO_LEVELS, Graph, Recorded

CLASSES, EXAMPLES = 3, 6


def dense_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, CLASSES))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(2 * 16, CLASSES),
    )


def level(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    method: Any,
    **options: Any,
) -> Engine:
    """A network under a penalty that the upper level weighs."""

    def lower(nets: Any, batch: Any) -> Tensor:
        x, y = batch
        penalty = sum((p**2).sum() for p in nets["low"].parameters())
        return loss(nets["low"](x), y) + 0.1 * nets["top"]().exp()[0] * penalty

    def upper(nets: Any, batch: Any) -> Tensor:
        return sum((p**2).sum() for p in nets["low"].parameters()) + 0.0 * nets["top"]().sum()

    return programs.build(
        Graph({"low": lower, "top": upper}, *TWO_LEVELS),
        {"low": net.double(), "top": Vector(torch.zeros(1, dtype=torch.float64))},
        {"low": [(x, y)], "top": [(x, y)]},
        method,
        {"low": programs.sgd(1e-9), "top": programs.sgd(0.0)},
        kinds={"top": Recorded},
        **options,
    )


def factors_of(engine: Any, loss: Callable[[], Tensor], **settings: Any) -> Factors:
    hop = Hop(engine.low, [engine.top], "top")
    factors = Factors(hop, Kronecker(**settings))
    factors.evaluated(loss)
    return factors.over(hop.parameters)


CASES: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "dense": (dense_net, (4,)),
    "convolutional": (convolutional, (2, 8, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_factors_are_those_of_curvlinops(case: str) -> None:
    """Its empirical Fisher matrix of a cross-entropy, block by block, bias included."""
    from curvlinops import KFACLinearOperator

    make, shape = CASES[case]
    torch.manual_seed(0)
    net, x = make(), points(EXAMPLES, *shape)
    y = torch.arange(EXAMPLES) % CLASSES
    if case == "convolutional":
        setattr(net[2], "padding_mode", "zeros")  # noqa: B010, theirs alone
    engine: Any = level(net, x, y, functional.cross_entropy, "identity")
    found = factors_of(engine, lambda: functional.cross_entropy(net(x), y))
    for module in net:
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = KFACLinearOperator(
            net,
            nn.CrossEntropyLoss(),
            [p for p in net.parameters() if p.requires_grad],
            [(x, y)],
            fisher_type="empirical",
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        dense = theirs @ torch.eye(theirs.shape[1], dtype=torch.float64)
    position, memory = 0, engine.low.hop_memory["top"]
    for i, layer in enumerate(found.layers):
        a, g = memory[f"kfac/A{i}"], memory[f"kfac/G{i}"]
        width = layer.parameters[0][0].numel()
        size = sum(p.numel() for p in layer.parameters)
        # Ours row by row of the weight with its bias behind; theirs the weight, then the bias.
        index = torch.arange(len(g) * len(a)).view(len(g), len(a))
        order = torch.cat([index[:, :width].flatten(), index[:, width:].flatten()])
        ours = torch.kron(g, a)[order][:, order]
        block = dense[position : position + size, position : position + size]
        # Some hundred sums of products in another order.
        assert distance(ours.flatten(), block.flatten()) < 1e-12
        position += size


@pytest.mark.parametrize("case", CASES)
def test_inverse_and_roots(case: str) -> None:
    make, shape = CASES[case]
    torch.manual_seed(0)
    net, x = make(), points(EXAMPLES, *shape)
    y = torch.arange(EXAMPLES) % CLASSES
    engine: Any = level(net, x, y, functional.cross_entropy, "identity")
    f = factors_of(engine, lambda: functional.cross_entropy(net(x), y), damping=1e-2)
    parameters = engine.low.trainable_parameters()
    v = points(sum(p.numel() for p in parameters), seed=3)
    found, parts = f.inverse(v), iter(v.split([p.numel() for p in parameters]))
    expected = []
    for i, layer in enumerate(f.layers):
        a, g = (engine.low.hop_memory["top"][f"kfac/{k}{i}"] for k in "AG")
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        a = a + pi * 0.1 * torch.eye(len(a), dtype=a.dtype)
        g = g + 0.1 / pi * torch.eye(len(g), dtype=g.dtype)
        columns = [next(parts).view(len(g), -1) for _ in layer.parameters]
        whole = torch.cat(columns, dim=1)
        solved = torch.linalg.solve(torch.kron(g, a), whole.flatten()).view(len(g), len(a))
        width = columns[0].shape[1]
        expected += [solved[:, :width].flatten(), solved[:, width:].flatten()]
    # Conditions of at most 1e4, as the damping bounds them: 1e-16 times that, and room.
    assert distance(found, torch.cat(expected)) < 1e-10
    assert distance(f.root(f.root_transposed(v)), found) < 1e-10
    assert distance(f.root(f.root_inverse(v)), v) < 1e-10
    w = points(len(v), seed=4)
    assert abs(float(w.dot(f.root(v)) - f.root_transposed(w).dot(v))) < 1e-10 * len(v)


def regression(method: Any, **options: Any) -> Any:
    """One output, features of very different sizes: the Hessian is ``A`` times a number."""
    torch.manual_seed(0)
    x = points(40, 6) * torch.logspace(0, 2, 6, dtype=torch.float64)
    return level(
        nn.Linear(6, 1),
        x,
        points(40, 1, seed=1),
        lambda out, y: ((out - y) ** 2).mean() / 2,
        method,
        **options,
    )


def gradient(engine: Any, iterations: int = 1) -> Tensor:
    for _ in range(iterations):
        engine.iterate()
    return engine.top.gradient


def test_exact_for_a_layer_with_one_output() -> None:
    """``H = A`` there, so that the factors' inverse is the Hessian's up to the factor that
    ``rescale`` finds. The penalty's Hessian, 0.2, is the damping's share."""
    method = {"method": "kfac", "damping": 1e-12}
    engine = regression(method)
    # Without the penalty in the Hessian: it enters by the upper level alone.
    with torch.no_grad():
        engine.top.module.value.fill_(-40.0)
    found = gradient(engine)
    exact = regression("exact")
    with torch.no_grad():
        exact.top.module.value.fill_(-40.0)
    # The penalty's share is exp(-40); the condition of A is 1e4, the damping's share 1e-6 times it.
    assert distance(found, gradient(exact)) < 1e-3
    assert engine.top.metrics["hypergradient/low_residual"] < 1e-3
    plain = regression("identity")
    with torch.no_grad():
        plain.top.module.value.fill_(-40.0)
    direction = gradient(plain)
    assert float(direction.abs()) < 0.5 * float(found.abs())


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_preconditioner_changes_the_way_and_not_the_answer(method: str) -> None:
    # The system's condition is 1e4: four digits of the sixteen are lost.
    spec = {"method": method, "iterations": 60, "tolerance": 1e-12}
    exact = gradient(regression("exact"))
    with_factors = regression({**spec, "preconditioner": {"damping": 1e-3}})
    assert distance(gradient(with_factors), exact) < 1e-8
    few = {**spec, "iterations": 3}
    preconditioned = distance(gradient(regression({**few, "preconditioner": "kfac"})), exact)
    assert preconditioned < 0.1 * distance(gradient(regression(few)), exact)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_warm_start_goes_through_the_roots(method: str) -> None:
    spec = {"method": method, "iterations": 60, "warm_start": True, "preconditioner": "kfac"}
    engine = regression(spec)
    gradient(engine, 2)
    # From the solution itself nothing is left to do but what rounding leaves.
    assert float(engine.top.metrics["hypergradient/low_iterations"]) <= 2
    assert distance(engine.top.gradient, gradient(regression("exact"), 2)) < 1e-8


def test_factors_are_averaged_and_factorised_every_so_many_hops() -> None:
    torch.manual_seed(0)
    xs = [points(8, 4, seed=n) for n in range(4)]
    net = nn.Linear(4, 2)
    batches = [(x, points(8, 2, seed=9)) for x in xs]
    engine: Any = level(
        net,
        *batches[0],
        lambda out, y: ((out - y) ** 2).mean(),
        {"method": "kfac", "decay": 0.6, "every": 2},
    )
    engine.low.set_train_data_loader(batches)
    ones = torch.ones(8, 1, dtype=torch.float64)
    squares = [torch.cat([x, ones], 1) for x in xs]
    squares = [rows.T @ rows / 8 for rows in squares]
    average, factorised = squares[0], []
    for n in range(4):
        engine.iterate()
        keep = min(1.0 - 1.0 / (n + 1), 0.6)
        average = keep * average + (1.0 - keep) * squares[n]
        memory = engine.low.hop_memory["top"]
        assert distance(memory["kfac/A0"].flatten(), average.flatten()) < 1e-12
        factorised.append(memory["kfac/CA0"].clone())
    # At the first hop, and at each that is even.
    assert not torch.equal(factorised[0], factorised[1])
    assert torch.equal(factorised[1], factorised[2])
    assert not torch.equal(factorised[2], factorised[3])


@pytest.mark.parametrize(
    "method", [{"method": "kfac", "every": 3}, {"method": "cg", "preconditioner": {"every": 3}}]
)
def test_resumed_exactly(method: Any) -> None:
    through, file = regression(method), io.BytesIO()
    gradient(through, 4)
    torch.save(through.state_dict(), file)
    file.seek(0)
    resumed = regression(method)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(gradient(through, 2), gradient(resumed, 2))


class Mixed(nn.Module):
    """BatchNorm, a grouped convolution and a shared weight beside one layer with factors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.other(self.one(self.norm(self.layer(x))).tanh())
        return self.grouped(hidden[..., None])[..., 0]


def test_the_identity_elsewhere_is_said_once(tmp_path: Any) -> None:
    import json

    from mlseg.engines.settings import EngineSettings

    torch.manual_seed(0)
    settings = EngineSettings(iterations=4, log_every=1, tensorboard=False)
    engine: Any = level(
        Mixed(),
        points(6, 4),
        points(6, 4, seed=1),
        lambda out, y: ((out - y) ** 2).mean(),
        "kfac",
        settings=settings,
        out=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.run()
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    (event,) = [e for e in map(json.loads, lines) if e["event"] == "hypergradient_remark"]
    total = sum(p.numel() for p in engine.low.module.parameters())
    # Those of one layer of 4 x 4, and its bias.
    assert f"Kronecker factors cover 20 of the {total} parameters of 'low'" in event["text"]
    assert engine.top.gradient.isfinite().all()


def test_a_batch_with_a_nan_does_not_stay_in_the_factors() -> None:
    engine = regression("kfac")
    gradient(engine, 2)
    known = {k: v.clone() for k, v in engine.low.hop_memory["top"].items()}
    engine.low.set_train_data_loader([(torch.full((40, 6), torch.nan).double(), points(40, 1))])
    low = {k: v.clone() for k, v in engine.low.module.state_dict().items()}
    gradient(engine)
    engine.low.module.load_state_dict(low)
    memory = engine.low.hop_memory["top"]
    assert all(torch.equal(known[k], memory[k]) for k in ("kfac/A0", "kfac/G0", "kfac/hops"))
