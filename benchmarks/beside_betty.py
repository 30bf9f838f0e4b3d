"""E2EAug's three levels in plain Betty, as its user would wire them, beside ours.

    OMP_NUM_THREADS=1 python benchmarks/beside_betty.py --rounds 20
    OMP_NUM_THREADS=1 python benchmarks/beside_betty.py configs/e2eaug_isic_small.yaml \\
        data.image_size=128 --rounds 5

The same networks from the same weights, the same batches in the same order, optimizers with the
same settings; Betty's problems have its ``darts`` on both paths, ours what the config says. The two
take turns, iteration by iteration, so that whatever else the machine does hurts both alike; a ratio
is the median over rounds of the ratio within one.

Neither is held against the other but both against what they stand for: the architecture is moved by
``--shift`` along each of its numbers to either side, generator, discriminator and segmentor take
their step anew from where they stood, with the same batches and draws, and the validation loss of
the segmentor so trained is read. The cosine between that slope and the hypergradient which either
had at that iteration is what an architecture learner can use of it.

Time is this process's CPU time; memory what an iteration allocates at its peak beyond what was
there before.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import betty.configs
import betty.engine
import betty.problems
import torch
from betty.logging.logger_base import get_logger
from torch import Tensor, nn
from torch.nn import functional

from mlseg import command_line, config, machine
from mlseg.commands import as_script
from mlseg.comparison import memory
from mlseg.errors import UserError
from mlseg.problems.e2eaug.losses import gan_loss
from mlseg.problems.systems import parse_run

LEVELS = ("generator", "discriminator", "segmentor", "architecture")
Nets = dict[str, nn.Module]
Batches = dict[str, list[tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Losses:
    """Each level's loss, of plain networks and a batch.

    Attributes:
        criterion: of logits and a mask.
        l1, weight: of the generator's reconstruction, of the synthetic half.
    """

    criterion: Callable[[Tensor, Tensor], Tensor]
    l1: float
    weight: float

    def generator(self, nets: Nets, batch: Any) -> tuple[Tensor, Tensor]:
        """And the fake images."""
        image, mask = batch
        label = encoded(mask)
        fake = nets["generator"](label, nets["architecture"]())
        judged = nets["discriminator"](torch.cat([label, fake], 1))
        return gan_loss(judged, True) + self.l1 * functional.l1_loss(fake, image), fake.detach()

    def discriminator(self, nets: Nets, batch: Any, fake: Tensor) -> Tensor:
        """Half the sum over real and fake pairs."""
        image, mask = batch
        label = encoded(mask)
        real = gan_loss(nets["discriminator"](torch.cat([label, image], 1)), True)
        return 0.5 * (real + gan_loss(nets["discriminator"](torch.cat([label, fake], 1)), False))

    def segmentor(self, nets: Nets, batch: Any) -> Tensor:
        """On a real batch, and on a synthetic one of its augmented masks."""
        image, mask, augmented = batch
        made = nets["generator"](encoded(augmented), nets["architecture"]())
        synthetic = self.criterion(nets["segmentor"](made), augmented)
        return self.criterion(nets["segmentor"](image), mask) + self.weight * synthetic

    def architecture(self, nets: Nets, batch: Any) -> Tensor:
        """On a validation batch."""
        image, mask = batch
        nets["segmentor"].eval()
        loss = self.criterion(nets["segmentor"](image), mask)
        nets["segmentor"].train()
        return loss


def encoded(mask: Tensor) -> Tensor:
    """(B, 1, H, W) in {-1, 1}."""
    return (mask == 1).unsqueeze(1).to(torch.float32) * 2.0 - 1.0


class Level(betty.problems.ImplicitProblem):
    """A level of plain Betty."""

    losses: Losses

    def nets(self) -> Nets:
        """Those of all levels."""
        me: Any = self
        others = {name: getattr(me, name, me).module for name in LEVELS}
        return {**others, self.name: self.module}


class Generator(Level):
    """Keeps its fake images for the discriminator."""

    def training_step(self, batch: Any) -> Tensor:
        """Its loss."""
        loss, self.fake = self.losses.generator(self.nets(), batch)
        return loss


class Discriminator(Level):
    """Learns from the generator's last pair."""

    def training_step(self, batch: Any) -> Tensor:
        """Its loss."""
        return self.losses.discriminator(self.nets(), batch, self.generator.fake)


class Segmentor(Level):
    """Learns from real and synthetic pairs."""

    def training_step(self, batch: Any) -> Tensor:
        """Its loss."""
        return self.losses.segmentor(self.nets(), batch)


class Architecture(Level):
    """Keeps its last gradient."""

    def training_step(self, batch: Any) -> Tensor:
        """Its loss."""
        return self.losses.architecture(self.nets(), batch)

    def grad_callback(self) -> None:
        """Note it."""
        self.noted = self.module.alphas.grad.clone()


KINDS = {
    "generator": Generator,
    "discriminator": Discriminator,
    "segmentor": Segmentor,
    "architecture": Architecture,
}


@dataclass
class Side:
    """One of the two.

    Attributes:
        iterate: take an iteration.
        problems: by level.
        gradient: the architecture's last.
    """

    iterate: Callable[[], Any]
    problems: dict[str, Any]
    gradient: Callable[[], Tensor]


def in_betty(nets: Nets, optimizers: dict[str, Any], batches: Batches, losses: Losses) -> Side:
    """The program on Betty's engine."""
    made: dict[str, Any] = {}
    for name in LEVELS:
        optimizer = type(optimizers[name])(nets[name].parameters(), **optimizers[name].defaults)
        problem = KINDS[name](
            name,
            betty.configs.Config(type="darts", unroll_steps=1),
            nets[name],
            optimizer,
            train_data_loader=batches[name],
        )
        problem.losses = losses
        made[name] = problem
    generator, discriminator, segmentor, architecture = (made[name] for name in LEVELS)
    engine = betty.engine.Engine(
        [generator, discriminator, segmentor, architecture],
        betty.configs.EngineConfig(train_iters=1, strategy="cpu"),
        {
            "u2l": {architecture: [generator, segmentor]},
            "l2u": {generator: [segmentor], segmentor: [architecture]},
        },
    )
    engine.train()

    def iterate() -> None:
        engine.global_step += 1
        engine.train_step()

    return Side(iterate, made, lambda: architecture.noted)


def in_mlseg(engine: Any, batches: Batches) -> Side:
    """Ours, with given batches."""
    made = {problem.name: problem for problem in engine.problems}
    noted: list[Tensor] = []

    def give(name: str) -> None:
        given, place = batches[name], [0]

        def get_batch() -> tuple[Tensor, ...]:
            place[0] += 1
            return given[(place[0] - 1) % len(given)]

        made[name].get_batch = get_batch

    for name in LEVELS:
        if name != "discriminator":  # it takes the generator's last pair
            give(name)
    architecture = made["architecture"]
    former = architecture.optimizer_step

    def step(*arguments: Any, **more: Any) -> None:
        noted[:] = [architecture.module.alphas.grad.clone()]
        former(*arguments, **more)

    architecture.optimizer_step = step
    return Side(engine.iterate, made, lambda: noted[0])


def slope(side: Side, batches: Batches, number: int, losses: Losses, shift: float) -> Tensor:
    """The validation loss's, after the levels' next step, per number of the architecture.

    Args:
        number: of the next iteration's batches.
    """
    kept = {n: p.module for n, p in side.problems.items()}
    optimizers = {n: p.optimizer for n, p in side.problems.items()}
    random = torch.get_rng_state()
    batch = {n: given[number % len(given)] for n, given in batches.items()}

    def after(index: int, distance: float) -> float:
        nets, steppers = copy.deepcopy((kept, optimizers))
        nets["architecture"].alphas.data.view(-1)[index] += distance
        torch.set_rng_state(random)
        loss, fake = losses.generator(nets, batch["generator"])
        _step(loss, nets["generator"], steppers["generator"])
        loss = losses.discriminator(nets, batch["generator"], fake)
        _step(loss, nets["discriminator"], steppers["discriminator"])
        loss = losses.segmentor(nets, batch["segmentor"])
        _step(loss, nets["segmentor"], steppers["segmentor"])
        with torch.no_grad():
            return float(losses.architecture(nets, batch["architecture"]).double())

    alphas: Any = kept["architecture"].alphas
    found = [(after(i, shift) - after(i, -shift)) / (2.0 * shift) for i in range(alphas.numel())]
    torch.set_rng_state(random)
    return torch.tensor(found).view_as(alphas)


def _step(loss: Tensor, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = [p for p in net.parameters() if p.requires_grad]
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = g
    optimizer.step()


def drawn(engine: Any, count: int) -> Batches:
    """``count`` batches of each level, by our own loaders."""
    made = {problem.name: problem for problem in engine.problems}
    found: Batches = {
        name: [made[name].get_batch() for _ in range(count)]
        for name in LEVELS
        if name != "discriminator"
    }
    return {**found, "discriminator": found["generator"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/e2eaug_isic_small.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--slopes", type=int, default=3, help="at so many of them")
    parser.add_argument("--shift", type=float, default=0.1)
    arguments = command_line.parse(parser, argv)
    torch.set_num_threads(1)
    get_logger().setLevel("WARNING")
    changes = ["gan.pretrain=0", "device=cpu", "problems.segmentor.scheduler=null"]
    try:
        settings, build = parse_run(config.load(arguments.config, [*arguments.overrides, *changes]))
        engine = build(settings, None)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    engine.enter_stage(len(engine.stages) - 1)
    engine.train()
    by_name = {problem.name: problem for problem in engine.problems}
    batches = drawn(engine, min(8, arguments.rounds))
    segmentor = by_name["segmentor"]
    losses = Losses(segmentor.criterion, by_name["generator"].l1, segmentor.synthetic_weight)
    nets = copy.deepcopy({name: by_name[name].module for name in LEVELS})
    optimizers = {name: by_name[name].optimizer for name in LEVELS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sides = {
            "Betty": in_betty(nets, optimizers, batches, losses),
            "mlseg": in_mlseg(engine, batches),
        }
        measured = set(range(0, arguments.rounds, max(1, arguments.rounds // arguments.slopes)))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        cosines: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(arguments.rounds):
            for name, side in sides.items():
                truth = None
                if number in measured:
                    truth = slope(side, batches, number, losses, arguments.shift)
                begun = time.process_time()
                side.iterate()
                seconds[name].append(time.process_time() - begun)
                if truth is not None:
                    pair = side.gradient().flatten(), truth.flatten()
                    cosines[name].append(float(functional.cosine_similarity(*pair, dim=0)))
        cpu = torch.device("cpu")
        peaks = {name: memory.peak(side.iterate, cpu)[1] for name, side in sides.items()}
    print(f"# E2EAug in Betty and here\n\n{machine.head(machine.describe())}")
    print(f"- {arguments.config} {' '.join(arguments.overrides)}, {arguments.rounds} iterations")
    print("\n| | s per iteration | to Betty's | MiB | cosine to the slope: mean, each |")
    print("|---|---|---|---|---|")
    for name in sides:
        ratios = [a / b for a, b in zip(seconds[name], seconds["Betty"], strict=True)][1:] or [1.0]
        each = " ".join(f"{c:.2f}" for c in cosines[name])
        print(
            f"| {name} | {statistics.median(seconds[name]):.3f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {peaks[name] / 2**20:.1f} | "
            f"**{statistics.mean(cosines[name]):.2f}** ({each}) |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(as_script(main))
