"""Multilevel loops written by hand: what ``engine_overhead.py`` measures the engine against.

They use the library's networks, losses, loaders and optimizers, and nothing of its problems,
engines and hypergradient methods but the one-step scale: every pass, random draw and order of
summation is written out, so that the weights agree with the engine's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings, Stage
from mlseg.hypergradients.optimizers import one_step_scale
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem
from mlseg.problems.e2eaug.losses import gan_loss
from mlseg.problems.e2eaug.masks import encode


class Hop:
    """A level's finite difference, as its method's settings have it.

    Raises:
        SystemExit: the method is one that isn't written out here.
    """

    def __init__(self, problem: Any) -> None:
        method = problem.method
        written = ("finite_difference", "optimizer", "central")
        if (method.name, method.scale, method.scheme) != written:
            raise SystemExit(f"problem {problem.name}: {method} is not written out by hand")
        self.parameters = list(problem.module.parameters())
        self.epsilon: float = method.epsilon
        self._before: list[Tensor] | None = None
        self._keeps = method.linearise == "before_step"

    def remember(self) -> None:
        """Keep the weights that a step starts from, if the difference is to be taken there."""
        present = [p.detach() for p in self.parameters]
        if self._keeps and self._before is None:
            self._before = [p.clone() for p in present]
        elif self._before is not None:
            torch._foreach_copy_(self._before, present)

    def difference(
        self,
        vector: Sequence[Tensor],
        inputs: Sequence[Tensor],
        loss: Callable[[], Tensor],
        replay: Callable[[], None] = lambda: None,
    ) -> list[Tensor]:
        """Central difference of ``d loss / d inputs`` along ``vector``."""
        after = [p.data for p in self.parameters]
        base = after if self._before is None else self._before
        with torch.no_grad():
            size = _norm(vector)
            smallest = torch.finfo(size.dtype).tiny ** 0.5
            step = self.epsilon * _norm(base).clamp_min(1e-8) / size.clamp_min(smallest)
        sides = []
        for signed in (step, -step):
            moved = torch._foreach_mul(list(vector), signed)
            torch._foreach_add_(moved, base)
            for p, data in zip(self.parameters, moved, strict=True):
                p.data = data
            del moved
            replay()
            sides.append(torch.autograd.grad(loss(), list(inputs)))
        for p, data in zip(self.parameters, after, strict=True):
            p.data = data
        return [(above - below) / (step * 2.0) for above, below in zip(*sides, strict=True)]


class HandWrittenE2EAug:
    """One gradient step per level, and the gradient of the alphas on both paths.

    Args:
        engine: a built E2EAug, whose networks, optimizers and loaders are taken over.
    """

    def __init__(self, engine: Engine) -> None:
        problems = {problem.name: problem for problem in engine.problems}
        self.generator, self.discriminator, self.segmentor, self.architecture = (
            problems[name].module
            for name in ("generator", "discriminator", "segmentor", "architecture")
        )
        self.optimizers = {name: problem.optimizer for name, problem in problems.items()}
        self.batches = {
            name: _forever(problem)
            for name, problem in problems.items()
            if problem.train_data_loader
        }
        level: Any = problems["segmentor"]
        self.masks, self.draws = level.masks, level.mask_generator
        self.criterion, self.weight = level.criterion, level.synthetic_weight
        upper: Any = problems["generator"]
        self.l1, self.num_classes = upper.l1, upper.num_classes
        self.hops = {"segmentor": Hop(level), "generator": Hop(upper)}
        self.device = engine.device

    def parameters(self) -> list[Tensor]:
        """Of all networks, in the order of the engine's problems."""
        networks = (self.generator, self.discriminator, self.segmentor, self.architecture)
        return [p for network in networks for p in network.parameters()]

    def iterate(self) -> None:
        """One iteration of the three levels."""
        g, w = list(self.generator.parameters()), list(self.segmentor.parameters())
        alphas = list(self.architecture.parameters())

        # Level 1: the generator.
        image, mask = next(self.batches["generator"])
        generator_state = _random_state(self.device)
        self.hops["generator"].remember()
        label = encode(mask, self.num_classes)
        loss, fake = self._generator_loss(label, image)
        loss.backward(inputs=g)
        self._step("generator")

        # Level 2: the segmentor, on real pairs and on synthetic ones.
        real_image, real_mask = next(self.batches["segmentor"])
        made_of, augmented = self.masks(real_mask, self.masks.draw(real_mask, self.draws))
        self.hops["segmentor"].remember()
        synthetic = self.generator(made_of, self.architecture()).float()
        segmentor_state = _random_state(self.device)
        synthetic_loss = self.weight * self.criterion(self.segmentor(synthetic), augmented)
        real_loss = self.criterion(self.segmentor(real_image), real_mask)
        (real_loss + synthetic_loss).backward(inputs=w)
        self._step("segmentor")

        # Level 3: the alphas, by the validation loss, through W and through G.
        image_val, mask_val = next(self.batches["architecture"])
        self.segmentor.eval()
        validation = self.criterion(self.segmentor(image_val), mask_val)
        self.segmentor.train()
        vector = list(torch.autograd.grad(validation, w))
        vector = one_step_scale(vector, w, self.optimizers["segmentor"], preconditioned=True)
        leaf = synthetic.detach().requires_grad_()
        (q,) = self._difference(
            "segmentor",
            vector,
            [leaf],
            lambda: self.weight * self.criterion(self.segmentor(leaf), augmented),
            segmentor_state,
        )
        pulled = torch.autograd.grad(synthetic, [*g, *alphas], grad_outputs=q.neg())
        total, vector = list(pulled[len(g) :]), list(pulled[: len(g)])
        vector = one_step_scale(vector, g, self.optimizers["generator"], preconditioned=True)
        through_g = self._difference(
            "generator",
            vector,
            alphas,
            lambda: self._generator_loss(label, image)[0],
            generator_state,
        )
        for p, direct, indirect in zip(alphas, total, through_g, strict=True):
            p.grad = direct - indirect
        self._step("architecture")

        # Level 1 again: the discriminator, on the same fake. It is a leaf of its own, and leaves
        # step in order, the first one followed by all that waits for it.
        judged = gan_loss(self._judge(label, image), real=True)
        judged = 0.5 * (judged + gan_loss(self._judge(label, fake.detach()), real=False))
        judged.backward(inputs=list(self.discriminator.parameters()))
        self._step("discriminator")

    def _generator_loss(self, label: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.generator(label, self.architecture()).float()
        adversarial = gan_loss(self._judge(label, fake), real=True)
        return adversarial + self.l1 * functional.l1_loss(fake, image), fake

    def _judge(self, label: Tensor, image: Tensor) -> Tensor:
        return self.discriminator(torch.cat([label, image], dim=1))

    def _step(self, name: str) -> None:
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def _difference(
        self,
        name: str,
        vector: Sequence[Tensor],
        inputs: Sequence[Tensor],
        loss: Callable[[], Tensor],
        state: dict[str, Tensor],
    ) -> list[Tensor]:
        networks = (self.generator, self.discriminator, self.segmentor)
        with _untouched(networks, self.device):
            return self.hops[name].difference(
                vector, inputs, loss, lambda: _set_random_state(state, self.device)
            )


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([t.detach() for t in tensors])))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def _untouched(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Put buffers and random state back at the end."""
    buffers = [b for network in networks for b in network.buffers()]
    kept = [b.clone() for b in buffers]
    state = _random_state(device)
    yield
    _set_random_state(state, device)
    for buffer, value in zip(buffers, kept, strict=True):
        buffer.data.copy_(value)


def _forever(problem: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from the problem's loader; its first pass has begun with the engine's set-up."""
    yield from problem.train_data_iterator[0]
    while True:
        yield from problem.train_data_loader[0]


# --------------------------------------------------------------------- the two-level toy


class Weights(Problem):
    """Lower level: a small network on a fixed batch, with a learned weight decay."""

    def training_step(self, batch: Any) -> Tensor:
        """Cross-entropy, and half the squared norm of each parameter times its decay."""
        return decayed_loss(self.module, self.decay.module, batch)


class Decay(Problem):
    """Upper level: the logarithm of a weight decay for each parameter tensor."""

    def training_step(self, batch: Any) -> Tensor:
        """Validation cross-entropy."""
        x, y = batch
        return functional.cross_entropy(self.weights(x), y)


class LogDecay(nn.Module):
    """One number per parameter tensor of the lower level."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.full((count,), -6.0))


def decayed_loss(network: nn.Module, decay: LogDecay, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The lower loss of the toy."""
    x, y = batch
    squares = torch.stack([p.square().sum() for p in network.parameters()])
    return functional.cross_entropy(network(x), y) + 0.5 * (decay.logs.exp() @ squares)


def decay_engine(device: str, out: Path | None, iterations: int) -> Engine:
    """The toy as problems on an engine: 20 000 parameters, batches of 64."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU())
    network.append(nn.Linear(96, 10))
    batches = [
        [(torch.randn(64, 64).to(device), torch.randint(10, (64,)).to(device)) for _ in range(4)]
        for _ in range(2)
    ]
    decay = LogDecay(len(list(network.parameters())))
    lower = Weights(
        "weights",
        network.to(device),
        torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
        batches[0],
        Config(hypergradient={"method": "finite_difference", "scale": "optimizer"}),
    )
    upper = Decay(
        "decay", decay.to(device), torch.optim.Adam(decay.parameters(), lr=1e-3), batches[1]
    )
    stage = Stage("training", iterations, None, {upper: [lower]}, {lower: [upper]})
    return Engine(
        [lower, upper],
        EngineSettings(iterations=iterations, validate_every=0),
        stages=[stage],
        device=device,
        out=out,
        quiet=True,
    )


class HandWrittenDecay:
    """The same two levels in a plain loop."""

    def __init__(self, engine: Engine) -> None:
        problems = {problem.name: problem for problem in engine.problems}
        self.network, self.decay = problems["weights"].module, problems["decay"].module
        self.lower, self.upper = problems["weights"].optimizer, problems["decay"].optimizer
        self.hop = Hop(problems["weights"])
        self.train = _forever(problems["weights"])
        self.val = _forever(problems["decay"])

    def parameters(self) -> list[Tensor]:
        """Of the network and its decay."""
        return [*self.network.parameters(), *self.decay.parameters()]

    def iterate(self) -> None:
        """A step of each level."""
        w, batch = list(self.network.parameters()), next(self.train)
        self.hop.remember()
        decayed_loss(self.network, self.decay, batch).backward(inputs=w)
        self.lower.step()
        self.lower.zero_grad()
        x, y = next(self.val)
        vector = list(torch.autograd.grad(functional.cross_entropy(self.network(x), y), w))
        vector = one_step_scale(vector, w, self.lower, preconditioned=True)
        (q,) = self.hop.difference(
            vector, [self.decay.logs], lambda: decayed_loss(self.network, self.decay, batch)
        )
        self.decay.logs.grad = -q
        self.upper.step()
        self.upper.zero_grad()
