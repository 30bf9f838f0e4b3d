"""Problems written for plain Betty: on our engine as they are, and derived from our Problem.

The program is that of Betty's installation test: a logistic regression whose penalty per feature is
learned on validation data, here with fewer points and steps, and in float64: what rounding makes of
two orders of the same sums is then far below anything that the two could do differently.
"""

from pathlib import Path
from typing import Any

import betty.configs
import betty.engine
import betty.problems
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.engines.engine import Engine
from mlseg.multilevel.problem import Problem

FEATURES, POINTS = 6, 60
UNROLL, ITERATIONS = 10, 200


def halves() -> list[list[tuple[Tensor, Tensor]]]:
    """Training and validation half, a single batch each; half of the features say nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS, FEATURES, generator=generator).double()
    true = torch.randn(FEATURES, generator=generator).double() * (torch.arange(FEATURES) % 2)
    noise = 0.5 * torch.randn(POINTS, generator=generator)
    y = (x @ true + noise > 0).double()
    middle = POINTS // 2
    return [[(x[:middle], y[:middle])], [(x[middle:], y[middle:])]]


class Coefficients(nn.Module):
    """A vector of parameters."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((FEATURES,), value, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.w


class Penalty(betty.problems.ImplicitProblem):
    """Upper level: one penalty per feature, kept positive."""

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return functional.binary_cross_entropy_with_logits(x @ self.inner(), y)

    def configure_train_data_loader(self) -> Any:
        return halves()[1]

    def configure_module(self) -> nn.Module:
        return Coefficients(1.0)

    def configure_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.module.parameters(), lr=1.0, momentum=0.9)

    def param_callback(self) -> None:
        for parameter in self.trainable_parameters():
            parameter.data.clamp_(min=1e-8)


class Regression(betty.problems.ImplicitProblem):
    """Lower level: penalised logistic regression, from zero each time."""

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        w = self.module()
        loss = functional.binary_cross_entropy_with_logits(x @ w, y)
        return loss + 0.5 * (w * self.outer() * w).sum()

    def configure_train_data_loader(self) -> Any:
        return halves()[0]

    def configure_module(self) -> nn.Module:
        return Coefficients(0.0)

    def configure_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.module.parameters(), lr=0.1)

    def on_inner_loop_start(self) -> None:
        self.module.w.data.zero_()


class OurPenalty(Penalty, Problem):
    pass


class OurRegression(Regression, Problem):
    pass


def train(kind: str, method: str, out: Path | None = None) -> Any:
    """The engine after training: "betty", Betty's problems on our "engine", or all "ours"."""
    upper, lower = (OurPenalty, OurRegression) if kind == "ours" else (Penalty, Regression)
    outer = upper(name="outer", config=betty.configs.Config(first_order=True, retain_graph=True))
    inner = lower(
        name="inner",
        config=betty.configs.Config(
            type=method, cg_iterations=3, cg_alpha=0.1, unroll_steps=UNROLL
        ),
    )
    dependencies = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
    config = betty.configs.EngineConfig(train_iters=ITERATIONS, strategy="cpu")
    if kind == "betty":
        engine = betty.engine.Engine([outer, inner], config, dependencies)
    else:
        engine = Engine(
            config=config,
            problems=[outer, inner],
            dependencies=dependencies,
            device="cpu",
            out=out,
            quiet=True,
        )
    engine.run()
    return engine


@pytest.mark.parametrize("method", ["cg", "darts", "neumann"])
@pytest.mark.parametrize("kind", ["engine", "ours"])
def test_the_same_weights_as_on_betty(kind: str, method: str) -> None:
    theirs, ours = (tiny.weights(train(k, method)) for k in ("betty", kind))
    for name, value in theirs.items():
        # A rounding unit of 1e-16, over the step of 1e-2 that darts takes, for the 2000 steps.
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-10)
    assert float((ours["outer/w"] - 1.0).norm()) > 0.1


def test_the_penalties_do_their_work() -> None:
    """Validation loss with the learned penalties is below that with penalties of one."""
    engine = train("ours", "cg")
    (x, y), (x_val, y_val) = (batches[0] for batches in halves())

    def validation_loss(penalty: Tensor) -> float:
        w = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
        for _ in range(300):
            loss = functional.binary_cross_entropy_with_logits(x @ w, y)
            (gradient,) = torch.autograd.grad(loss + 0.5 * (w * penalty * w).sum(), w)
            w = (w - 0.1 * gradient).detach().requires_grad_()
        return float(functional.binary_cross_entropy_with_logits(x_val @ w.detach(), y_val))

    learned = engine.outer.module.w.detach()
    assert validation_loss(learned) < 0.9 * validation_loss(torch.ones_like(learned))


def test_plain_problems_are_recorded_and_saved(tmp_path: Path) -> None:
    train("engine", "cg", tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert set(saved["problems"]) == {"outer", "inner"}
    assert saved["engine"]["global_step"] == ITERATIONS
