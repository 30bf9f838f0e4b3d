"""Steps of an optimizer that has weights without a gradient: torch's, and mlseg's.

    OMP_NUM_THREADS=1 python benchmarks/underflow.py --steps 800

E2EAug's generator of `e2eaug_isic_small`, even weights: on its 2x2 map the outer taps of an 8x8
kernel meet padding alone. Two optimizers of one kind take the same gradients, of an L1 loss to
random images, one of them followed by :func:`mlseg.multilevel.underflow.clear`. Time is this
process's CPU time, of a step and what follows it; they take turns. In the end both must generate
the same images up to rounding.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn

from mlseg import command_line, machine
from mlseg.commands import as_script, counted
from mlseg.errors import RunError
from mlseg.multilevel import underflow
from mlseg.problems.e2eaug.networks.pix2pix import SearchableGenerator


class Side:
    """A generator, its optimizer, and the milliseconds of its steps."""

    def __init__(self, generator: nn.Module, rate: float, clears: bool) -> None:
        self.generator, self.clears = generator, clears
        self.optimizer = torch.optim.Adam(
            generator.parameters(), rate, (0.5, 0.999), weight_decay=1e-3, fused=True
        )
        self.times: list[float] = []
        self.image = torch.empty(0)

    def step(self, gradients: list[Tensor | None]) -> None:
        """Along these gradients."""
        for parameter, gradient in zip(self.generator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        started = time.process_time()
        self.optimizer.step()
        if self.clears:
            underflow.clear(self.optimizer)
        self.times.append(1e3 * (time.process_time() - started))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=counted, default=800)
    parser.add_argument("--block", type=counted, default=100, help="steps of a row")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    given = command_line.parse(parser)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = SearchableGenerator(3, 3, 64, channels=12, levels=5)
    weights = torch.full((generator.num_cells, 3), 1 / 3)
    plain, ours = (Side(copy.deepcopy(generator), given.rate, clears) for clears in (False, True))
    labels, images = torch.randn(2, 8, 3, 64, 64)
    for step in range(given.steps):
        at = torch.tensor([step % 8, (step + 1) % 8])
        loss = (plain.generator(labels[at], weights) - images[at].tanh()).abs().mean()
        found = torch.autograd.grad(100.0 * loss, list(plain.generator.parameters()))
        for side in (plain, ours) if step % 2 else (ours, plain):
            side.step(list(found))
    with torch.no_grad():
        for side in (plain, ours):
            torch.manual_seed(0)  # dropout's; BatchNorm goes by the batch
            side.image = side.generator(labels[:2], weights)
    apart = float((plain.image - ours.image).abs().max())
    if apart > 1e-4:
        raise RunError(f"the two generate different images: {apart:.1e}")
    print(f"{machine.head(machine.describe())}\n")
    print("| steps | ms of torch's | ms of ours | ours to torch's |\n|---|---|---|---|")
    for first in range(0, given.steps, given.block):
        one, other = (side.times[first : first + given.block] for side in (plain, ours))
        ratio = statistics.median(b / a for a, b in zip(one, other, strict=True))
        cells = f"{statistics.fmean(one):.2f} | {statistics.fmean(other):.2f} | {ratio:.2f}"
        print(f"| {first + 1} to {first + len(one)} | {cells} |")
    print(f"\nLargest difference of a pixel in [-1, 1]: {apart:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(as_script(main))
