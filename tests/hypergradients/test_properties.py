"""What holds of methods in general: linearity, order of parameters, indefiniteness, warm starts."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.hypergradients import Hop, System, names, resolve
from mlseg.hypergradients.registry import classes
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem
from mlseg.testing import programs
from mlseg.testing.exact import distance
from mlseg.testing.families import Settled
from mlseg.testing.programs import GRAPHS

QUICK: dict[str, dict[str, Any]] = {
    "penalty": {"strength": 1e4, "iterations": 20},
    "evolution": {"pairs": 6, "directions": "orthogonal", "sigma": 1e-3},
    "finite_difference": {"epsilon": 1e-5},
    "sama": {"epsilon": 1e-5},
    # Krylov methods are linear only once they have converged.
    "cg": {"iterations": 40},
    "minres": {"iterations": 40},
    # The step along its direction goes by the vector.
    "kfac": {"rescale": False},
    # Power iteration starts from the vector.
    "neumann": {"step_size": 0.3},
    "nystrom": {"rank": 30, "damping": 1e-2},
}
LOOSE = {"penalty": 2e-2, "finite_difference": 1e-4, "sama": 1e-4, "evolution": 1e-4}
LINEAR = [name for name in names() if name != "stochastic"]


def tolerance(method: str) -> float:
    """For what is linear but for the rounding, or the convergence, of a method."""
    return LOOSE.get(method, 1e-3 if classes()[method].converged else 1e-7)


def spec(method: str) -> dict[str, Any]:
    return {"method": method, **QUICK.get(method, classes()[method].converged)}


class Carried:
    """A hop of the convolutional program that can be taken over and over."""

    def __init__(self, method: str) -> None:
        made = Settled("logistic", "two levels")
        engine = made.engine(spec(method), steps=2)
        engine.iterate()
        engine.iterate()
        self.low, self.top = engine.low, engine.top

    def __call__(self, vector: Tensor) -> Tensor:
        assert self.low.method is not None
        (found,), _ = self.low.method([vector], Hop(self.low, [self.top], "top"))
        return found[0]


@pytest.mark.parametrize("method", LINEAR)
def test_linear_in_the_incoming_vector(method: str) -> None:
    """``stochastic`` apart, which starts from where it was."""
    hop = Carried(method)
    size = hop.low.module.value.numel()
    vectors = st.lists(
        st.floats(-2.0, 2.0).filter(lambda x: abs(x) > 1e-2), min_size=size, max_size=size
    )

    @settings(max_examples=5)
    @given(vectors, vectors, st.floats(-3.0, 3.0).filter(lambda x: abs(x) > 1e-2))
    def check(a: list[float], b: list[float], factor: float) -> None:
        x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        together = hop(x + factor * y)
        apart = hop(x) + factor * hop(y)
        size = hop(x).norm() + abs(factor) * hop(y).norm()
        assert (together - apart).norm() < tolerance(method) * size

    check()


class Pair(nn.Module):
    """Two parameters of different shapes, registered in either order."""

    first: nn.Parameter
    last: nn.Parameter

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        order = ["last", "first"] if swapped else ["first", "last"]
        for name in order:
            shape = (2, 3) if name == "first" else (2,)
            generator = torch.Generator().manual_seed(len(name))
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(0.5 * value))


class Fit(Problem):
    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        error = (torch.tanh(x @ self.module.first.T) @ self.module.last - y) ** 2
        decay = sum((p**2).sum() for p in self.module.parameters())
        return (error * self.top.module.first[0].exp().sum()).mean() + decay


class Judge(Problem):
    gradient: Tensor

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        low = self.low.module
        return ((torch.tanh(x @ low.first.T) @ low.last - y) ** 2).mean()

    def grad_callback(self) -> None:
        self.gradient = self.module.first.grad.clone()


def judged(low: Problem, top_net: Pair, iterations: int) -> Tensor:
    """The gradient of a :class:`Judge` above ``low``, by its first parameter alone."""
    top_net.last.requires_grad_(False)
    top = Judge("top", top_net, torch.optim.SGD([top_net.first], 0.1), programs.batches(1))
    engine = Engine(
        [low, top],
        EngineSettings(tensorboard=False),
        u2l={top: [low]},
        l2u={low: [top]},
        device="cpu",
        quiet=True,
    )
    for _ in range(iterations):
        engine.iterate()
    return top.gradient


@pytest.mark.parametrize("method", names())
def test_the_order_of_parameters_makes_no_difference(method: str) -> None:
    found = []
    for swapped in (False, True):
        low_net, top_net = Pair(swapped), Pair(swapped)
        # Nyström's random columns: all of them.
        made = Config(hypergradient=spec(method), unroll_steps=2)
        low = Fit(
            "low", low_net, torch.optim.Adam(low_net.parameters(), 0.05), programs.batches(0), made
        )
        found.append(judged(low, top_net, iterations=2))
    allowed = {"stochastic": 1e-2, "neumann": 1e-3}.get(method, tolerance(method))
    assert distance(found[0], found[1]) < allowed


# ------------------------------------------------------------------ solvers by themselves


class Matrix:
    """A Hessian in full, in the place of a level's."""

    hop = None

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix @ x


def symmetric(spectrum: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    n = len(spectrum)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ q.T


def solve(method: str, matrix: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, dict[str, Any]]:
    made: Any = resolve({"method": method, **given})
    hessian: Any = Matrix(matrix)
    return made.solve(System(hessian), v)


@settings(max_examples=20)
@given(st.integers(2, 25), st.integers(0, 1000))
def test_minres_is_scipys_on_indefinite_matrices(n: int, seed: int) -> None:
    from scipy.sparse.linalg import minres

    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.randn(n, generator=generator, dtype=torch.float64)
    spectrum = spectrum + 0.3 * spectrum.sign()
    matrix, v = symmetric(spectrum.tolist()), torch.ones(n, dtype=torch.float64)
    for iterations in (1, n // 2 + 1, 3 * n):
        ours, report = solve("minres", matrix, v, iterations=iterations, tolerance=1e-13)
        theirs, _ = minres(matrix.numpy(), v.numpy(), rtol=1e-14, maxiter=iterations)
        residuals = [
            float((matrix @ x - v).norm() / v.norm()) for x in (ours, torch.tensor(theirs))
        ]
        assert residuals[0] <= residuals[1] * (1 + 1e-5) + 1e-9
        assert float(report["residual"]) == pytest.approx(residuals[0], rel=1e-3, abs=1e-9)


def test_cg_is_exact_after_as_many_steps_as_eigenvalues() -> None:
    matrix = symmetric([0.5, 0.5, 1.0, 1.0, 2.0, 4.1, 4.1, 4.1])
    v = torch.arange(1.0, 9.0, dtype=torch.float64)
    x, report = solve("cg", matrix, v, iterations=20)
    assert (matrix @ x - v).norm() < 1e-9 * v.norm()
    assert float(report["iterations"]) <= 5
    assert 0.5 <= float(report["curvature"]) <= 4.1


def test_cg_stops_at_negative_curvature_and_says_so() -> None:
    matrix = symmetric([-1.0, -2.0, -0.5])
    v = torch.ones(3, dtype=torch.float64)
    x, report = solve("cg", matrix, v)
    assert float(report["curvature"]) < 0.0
    assert float(report["iterations"]) == 1
    assert x.dot(v) > 0  # the sign of the gradient is kept
    x, report = solve("cg", symmetric([3.0, 2.0, -0.5]), v)
    assert float(report["curvature"]) < 0.0
    assert x.isfinite().all()


def test_cg_without_curvature_gives_nothing() -> None:
    x, _ = solve("cg", torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    assert not x.any()


@pytest.mark.parametrize("given", [{"step_size": 1.0}, {}], ids=["given", "power iteration"])
def test_neumann_says_that_it_diverges(given: dict[str, Any]) -> None:
    """A step above 2 / lambda_max, and a negative eigenvalue."""
    v = torch.ones(3, dtype=torch.float64)
    spectrum = [3.0, 1.0, 0.5] if given else [1.0, 0.5, -0.8]
    x, report = solve("neumann", symmetric(spectrum), v, terms=50, **given)
    assert float(report["diverged"]) == 1.0
    assert x.norm() < 10.0 * v.norm()
    x, report = solve("neumann", symmetric([1.0, 0.5, 0.3]), v, terms=200)
    assert float(report["diverged"]) == 0.0
    assert float(report["step_size"]) == pytest.approx(1.0, rel=0.05)


def test_frozen_values_end_where_an_early_exit_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a device, where nothing may be read: all iterations, masked."""
    matrix = symmetric([0.5, 1.0, 2.0, 4.0])
    v = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    for method in ("cg", "minres", "neumann"):
        length = {"terms": 200} if method == "neumann" else {"iterations": 60}
        early, first = solve(method, matrix, v, **length)
        monkeypatch.setattr(f"mlseg.hypergradients.methods.{method}.finished", lambda active: False)
        late, second = solve(method, matrix, v, **length)
        torch.testing.assert_close(early, late, rtol=1e-12, atol=1e-14)
        assert float(first["iterations"]) == float(second["iterations"])


# --------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("method", ["cg", "minres", "penalty", "stochastic"])
def test_a_warm_start_goes_on(method: str) -> None:
    """A few iterations per hop reach over hops what they don't reach in one."""
    made = Settled("quadratic", "two levels")
    errors = []
    length = {"iterations": 3} if method in ("cg", "minres") else {"iterations": 20}
    extra = {"step_size": made.rate} if method in ("stochastic", "penalty") else {}
    extra |= {"strength": 1e4} if method == "penalty" else {}
    given = {"method": method, "warm_start": True, **length, **extra}
    engine = made.engine(given)
    for _ in range(8):
        engine.iterate()
        errors.append(float((engine.top.gradient - made.exact()).norm() / made.exact().norm()))
    assert errors[-1] < 0.05 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 5, 7])
@pytest.mark.parametrize(
    "method",
    [
        {"method": "unrolled", "steps": 5},
        {"method": "unrolled", "optimizer_state": "fresh"},
        {"method": "evolution", "pairs": 2},
        {"method": "stochastic", "iterations": 2},
        {"method": "minres", "warm_start": True},
        {"method": "penalty", "warm_start": True},
        {"method": "sama"},
    ],
    ids=lambda m: "-".join(map(str, m.values())),
)
def test_resumed_within_a_window_bit_by_bit(
    method: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    """Records of steps, solutions and streams of fresh batches go on where they were."""

    def make() -> Any:
        return programs.small(
            GRAPHS["two paths"],
            method,
            lambda params: torch.optim.Adam(params, 0.02),
            unroll={"low": 2, "middle": 3},
        )

    through = make()
    for _ in range(14):
        through.iterate()
    broken = make()
    for _ in range(stop):
        broken.iterate()
    checkpoint.save(tmp_path / "state.pt", broken.state_dict())
    resumed = make()
    resumed.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    for _ in range(14 - stop):
        resumed.iterate()
    assert tiny.same(tiny.weights(through), tiny.weights(resumed))


def test_fresh_batches_take_nothing_from_training() -> None:
    """With a loader that shuffles by the global generator, and by its own."""

    def trained(method: str) -> Any:
        def loader(seed: int) -> Any:
            x, y = (torch.cat(t) for t in zip(*programs.batches(seed), strict=True))
            own = torch.Generator().manual_seed(3) if seed else None
            data = torch.utils.data.TensorDataset(x, y)
            return torch.utils.data.DataLoader(data, 5, shuffle=True, generator=own)

        engine = programs.small(GRAPHS["two levels"], method, loader=loader)
        for group in engine.top.optimizer.param_groups:
            group["lr"] = 0.0  # so that what the hypergradient is makes no difference
        for _ in range(20):
            engine.iterate()
        return tiny.weights(engine)

    assert tiny.same(trained("stochastic"), trained("identity"))


def test_fresh_batches_are_fresh() -> None:
    engine = programs.small(GRAPHS["two levels"], "stochastic")
    engine.iterate()
    drawn = [engine.low.fresh_batch()[0] for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_divergence_is_an_event(tmp_path: Path) -> None:
    """Said once for each hop, not at every step."""
    engine = programs.small(
        GRAPHS["two levels"],
        {"method": "neumann", "step_size": 50.0},
        settings=EngineSettings(iterations=6, log_every=1, tensorboard=False),
        out=tmp_path,
    )
    engine.run()
    events = (tmp_path / "events.jsonl").read_text()
    assert events.count("hypergradient_diverged") == 1
    assert '"level": "low"' in events


def test_weight_decay_belongs_to_the_objective() -> None:
    """An L2 decay of the optimizer acts as the same term of the loss does."""

    class Decayed(Fit):
        strength = 0.0

        def training_step(self, batch: Any) -> Tensor:
            decay = sum((p**2).sum() for p in self.module.parameters())
            return super().training_step(batch) + 0.5 * self.strength * decay

    found = []
    for in_loss in (False, True):
        low_net, top_net = Pair(False), Pair(False)
        optimizer = torch.optim.SGD(
            low_net.parameters(), 0.01, weight_decay=0.0 if in_loss else 0.7
        )
        low = Decayed("low", low_net, optimizer, programs.batches(0), Config(hypergradient="exact"))
        low.strength = 0.7 if in_loss else 0.0
        found.append(judged(low, top_net, iterations=1))
    assert distance(found[0], found[1]) < 1e-9
