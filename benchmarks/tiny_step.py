"""A step of a tiny program beside Betty's, where the library's own work is what counts.

    OMP_NUM_THREADS=1 python benchmarks/tiny_step.py --rounds 30

A logistic regression of 22 weights whose penalty, a number per weight, an upper level learns: ten
inner steps, then one hop by finite differences and a step of the upper level. mlseg's engine, the
same levels in plain Betty 0.2.1, and a loop written by hand do the same from the same start, and
have to agree before anything is timed. They take turns, an outer step each; time is this process's
CPU time, and a ratio is the median over rounds of the ratio within a round. Betty's own step reads
the loss from the device at each step, and divides by the same finite difference.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import betty.configs
import betty.engine
import betty.problems
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg import Config, Engine, Problem, machine
from mlseg.commands import as_script
from mlseg.engines.settings import EngineSettings

FEATURES, BATCH, INNER = 21, 32, 10
RATE, UPPER_RATE = 0.1, 0.01
STEP = 1e-2
"""Of the finite difference: its norm over all weights, which is Betty's ``darts_alpha``."""


class Weights(nn.Module):
    """The lower level's: 21 and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(1)


class Penalties(nn.Module):
    """The upper level's: a logarithm per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.logarithms = nn.Parameter(torch.full((FEATURES,), -3.0))

    def forward(self) -> Tensor:
        return self.logarithms.exp()


def lower_loss(weights: Any, penalties: Any, layer: nn.Linear, batch: Any) -> Tensor:
    """Cross-entropy and the weighted squares of the weights."""
    x, y = batch
    fit = functional.binary_cross_entropy_with_logits(weights(x), y)
    return fit + (penalties() * layer.weight[0] ** 2).sum()


def upper_loss(weights: Any, batch: Any) -> Tensor:
    """Cross-entropy on other examples."""
    x, y = batch
    return functional.binary_cross_entropy_with_logits(weights(x), y)


class _Lower:
    def training_step(self, batch: Any) -> Tensor:
        level: Any = self
        return lower_loss(level, level.upper, level.module.layer, batch)


class _Upper:
    def training_step(self, batch: Any) -> Tensor:
        level: Any = self
        return upper_loss(level.lower, batch)


class Lower(_Lower, Problem):
    """In mlseg."""


class Upper(_Upper, Problem):
    """In mlseg."""


class BettyLower(_Lower, betty.problems.ImplicitProblem):
    """In Betty."""


class BettyUpper(_Upper, betty.problems.ImplicitProblem):
    """In Betty."""


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Seven, for either level."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(7):
        x = torch.randn(BATCH, FEATURES, generator=generator)
        made.append((x, (x.sum(1) > 0).float()))
    return made


class Ours:
    """mlseg's engine."""

    def __init__(self) -> None:
        self.weights, self.penalties = Weights(), Penalties()
        method = {"method": "finite_difference", "scale": "none", "epsilon": STEP}
        lower = Lower(
            "lower",
            self.weights,
            torch.optim.SGD(self.weights.parameters(), RATE),
            batches(0),
            Config(hypergradient=method, unroll_steps=INNER),
        )
        optimizer = torch.optim.SGD(self.penalties.parameters(), UPPER_RATE)
        upper = Upper("upper", self.penalties, optimizer, batches(1))
        settings = EngineSettings(iterations=1, validate_every=0, tensorboard=False)
        self.engine = Engine(
            [lower, upper],
            settings,
            u2l={upper: [lower]},
            l2u={lower: [upper]},
            device="cpu",
            quiet=True,
        )

    def __call__(self) -> None:
        """An outer step."""
        for _ in range(INNER):
            self.engine.iterate()


class Bettys:
    """Betty's."""

    def __init__(self) -> None:
        self.weights, self.penalties = Weights(), Penalties()
        config = betty.configs.Config(type="darts", darts_alpha=STEP, unroll_steps=INNER)
        optimizer = torch.optim.SGD(self.weights.parameters(), RATE)
        lower = BettyLower("lower", config, self.weights, optimizer, train_data_loader=batches(0))
        optimizer = torch.optim.SGD(self.penalties.parameters(), UPPER_RATE)
        upper = BettyUpper(
            "upper", betty.configs.Config(), self.penalties, optimizer, train_data_loader=batches(1)
        )
        self.engine = betty.engine.Engine(
            config=betty.configs.EngineConfig(train_iters=1, strategy="cpu", logger_type="none"),
            problems=[lower, upper],
            dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
        )
        self.engine.train()

    def __call__(self) -> None:
        """An outer step."""
        for _ in range(INNER):
            self.engine.global_step += 1
            self.engine.train_step()


class ByHand:
    """The same passes in a plain loop."""

    def __init__(self) -> None:
        self.weights, self.penalties = Weights(), Penalties()
        self.optimizer = torch.optim.SGD(self.weights.parameters(), RATE)
        self.upper = torch.optim.SGD(self.penalties.parameters(), UPPER_RATE)
        self.train, self.val, self.count = batches(0), batches(1), 0

    def __call__(self) -> None:
        """An outer step."""
        weights, penalties = self.weights, self.penalties
        for _ in range(INNER):
            batch = self.train[self.count % 7]
            lower_loss(weights, penalties, weights.layer, batch).backward(
                inputs=list(weights.parameters())
            )
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.count += 1
        parameters = list(weights.parameters())
        val = self.val[(self.count // INNER - 1) % 7]
        vector = torch.autograd.grad(upper_loss(weights, val), parameters)
        size = STEP / torch.nn.utils.get_total_norm(vector)
        sides = []
        for h in (1.0, -2.0):
            with torch.no_grad():
                for p, v in zip(parameters, vector, strict=True):
                    p.add_(h * size * v)
            loss = lower_loss(weights, penalties, weights.layer, batch)
            sides.append(torch.autograd.grad(loss, penalties.logarithms)[0])
        with torch.no_grad():
            for p, v in zip(parameters, vector, strict=True):
                p.add_(size * v)
        penalties.logarithms.grad = -(sides[0] - sides[1]) / (2.0 * size)
        self.upper.step()
        self.upper.zero_grad()


CONTESTANTS: Mapping[str, Callable[[], Any]] = {"mlseg": Ours, "Betty": Bettys, "by hand": ByHand}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    made = {name: make() for name, make in CONTESTANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for number in range(arguments.rounds + 2):
        by = number % len(names)
        for name in names[by:] + names[:by]:
            begun = time.process_time()
            made[name]()
            if number > 1:  # the first rounds warm up
                seconds[name].append(time.process_time() - begun)
    for name, one in made.items():
        # Single precision, and a finite difference: of step 1e-2 ours, relative to the weights.
        for attribute in ("weights", "penalties"):
            theirs = list(getattr(made["by hand"], attribute).parameters())
            for a, b in zip(getattr(one, attribute).parameters(), theirs, strict=True):
                if not torch.allclose(a, b, rtol=1e-2, atol=1e-3):
                    raise SystemExit(f"{name}: other {attribute} than by hand")
    report: dict[str, Any] = {"machine": machine.describe(torch.device("cpu")), "seconds": seconds}
    print(machine.head(report["machine"]), "\n", sep="")
    print("| an outer step of 10 inner ones | ms | to Betty | to the loop by hand |")
    print("|---|---|---|---|")
    for name, values in seconds.items():
        cells = [f"{1e3 * statistics.median(values):.2f}"]
        for other in ("Betty", "by hand"):
            ratios = [a / b for a, b in zip(values, seconds[other], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(as_script(main))
