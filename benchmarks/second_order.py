"""A Hessian-vector product of a U-Net, in units of a forward and backward pass.

    OMP_NUM_THREADS=1 python benchmarks/second_order.py --rounds 9

By torch's formulas and by mlseg's (``second_order: fused``), in both memory layouts, the graph of
the gradient being there. In double precision the two have to agree to 1e-9 before anything is
timed. Then the pass and the two products take turns, round by round; a ratio is the median over
rounds of the ratio within a round. Time is this process's CPU time (CUDA: time in the stream).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from spans import CpuClock, CudaClock
from torch import Tensor
from torch.nn import functional
from two_levels import CLASSES, SIZES, Size

from mlseg import command_line, machine
from mlseg.commands import as_script
from mlseg.hypergradients.second_order.fused import SecondOrder, formulas
from mlseg.segmentation.nets.unet import UNet

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FORMULAS: Sequence[SecondOrder] = ("torch", "fused")
MEASURED = {"tiny": SIZES["tiny"], "small": SIZES["small"], "wide": Size(32, 3, 128, 4)}


class Work:
    """A U-Net, a batch, and the graphs of its gradient by either formulas."""

    def __init__(
        self, size: Size, layout: torch.memory_format, device: torch.device, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        self.net = UNet(3, CLASSES, size.channels, size.levels).to(device, dtype)
        self.net.to(memory_format=layout)
        image = torch.randn(size.batch, 3, size.pixels, size.pixels)
        self.image = image.to(device, dtype).contiguous(memory_format=layout)
        masks = torch.randint(CLASSES, (size.batch, size.pixels, size.pixels))
        self.masks = masks.to(device)
        self.weights = list(self.net.parameters())
        self.along = [torch.randn(w.shape).to(w) for w in self.weights]
        self.gradients = {by: self._gradient(by, create_graph=True) for by in FORMULAS}

    def _gradient(self, by: SecondOrder, create_graph: bool = False) -> tuple[Tensor, ...]:
        with formulas(by):
            loss = functional.cross_entropy(self.net(self.image), self.masks)
        return torch.autograd.grad(loss, self.weights, create_graph=create_graph)

    def run(self, what: str) -> tuple[Tensor, ...]:
        """``pass``, or the product by ``torch``'s or ``fused`` formulas."""
        if what == "pass":
            return self._gradient("torch")
        gradient = self.gradients["fused" if what == "fused" else "torch"]
        return torch.autograd.grad(gradient, self.weights, self.along, retain_graph=True)


def check(work: Work) -> float:
    """The relative difference of the two products, which has to be rounding."""
    ours, theirs = work.run("fused"), work.run("torch")
    norm = torch.nn.utils.get_total_norm
    off = norm([a - b for a, b in zip(ours, theirs, strict=True)]) / norm(list(theirs))
    if not float(off) < 1e-9:
        raise SystemExit(f"the two products differ by {float(off):.1e}")
    return float(off)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", choices=MEASURED, default=["small", "wide"])
    parser.add_argument("--device", default="cpu")
    arguments = command_line.parse(parser)
    torch.set_num_threads(1)
    device = machine.choose_device(arguments.device)
    cuda = device.type == "cuda"
    clock = CudaClock(device) if cuda else CpuClock()
    print(machine.head(machine.describe(device)), "\n", sep="")
    print("| U-Net | layout | pass, ms | product by torch, in passes | by mlseg | differ by |")
    print("|---|---|---|---|---|---|")
    for name in arguments.sizes:
        size = MEASURED[name]
        for layout, memory_format in LAYOUTS.items():
            off = check(Work(size, memory_format, device, torch.float64))
            work = Work(size, memory_format, device, torch.float32)
            seconds: dict[str, list[float]] = {"pass": [], "torch": [], "fused": []}
            for number in range(arguments.rounds + 1):
                for what, times in seconds.items():
                    clock.mark()
                    work.run(what)
                    clock.mark()
                    (reading,) = clock.stretches()
                    if number:  # the first round warms up
                        times.append(reading["stream" if cuda else "cpu"])
            cells = [f"{1e3 * statistics.median(seconds['pass']):.1f}"]
            for by in FORMULAS:
                ratios = [a / b for a, b in zip(seconds[by], seconds["pass"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
            what = f"{size.channels} channels, {size.batch} of {size.pixels}x{size.pixels}"
            print(f"| {what} | {layout} | " + " | ".join(cells) + f" | {off:.0e} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(as_script(main))
