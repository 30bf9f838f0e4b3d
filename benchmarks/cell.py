"""Cells one by one: three convolutions against one merged kernel, forward and backward.

    python benchmarks/cell.py [--channels 64] [--batches 1 2 4 8] [--device cpu] [--largest 16]

For each level of the generator at 256x256 it prints the time of forward and backward (gradients of
the input, the kernels and the selection weights) both ways, their ratio, and the MiB that
the graph of each way keeps besides its inputs. `MERGE_FROM` of the cells comes from this table.
"""

import argparse

import torch
from torch import Tensor
from turns import take_turns

from mlseg import command_line, machine
from mlseg.commands import as_script
from mlseg.problems.e2eaug.networks.cells import SIZES, mix


def _shapes(channels: int, transposed: bool) -> list[tuple[int, int, int]]:
    """(Cin, Cout, positions a side of the smaller map) of the levels at 256x256."""
    widths = [channels * min(2**level, 8) for level in range(8)]
    sides = [128 >> level for level in range(8)]
    if not transposed:
        return list(zip([3, *widths[:-1]], widths, sides, strict=True))
    inputs = [2 * width for width in widths[:-1]] + [widths[-1]]
    return list(zip(inputs, [3, *widths[:-1]], sides, strict=True))


def _measure(
    shape: tuple[int, int, int], transposed: bool, batch: int, device: torch.device, repeats: int
) -> tuple[float, float, float, float]:
    cin, cout, positions = shape
    first, second = (cin, cout) if transposed else (cout, cin)
    side = positions if transposed else 2 * positions
    x = torch.randn(batch, cin, side, side, device=device, requires_grad=True)
    kernels = [
        torch.randn(first, second, size, size, device=device).mul_(0.02).requires_grad_()
        for size in SIZES
    ]
    weights = torch.full((3,), 1 / 3, device=device, requires_grad=True)
    inputs = [x, *kernels, weights]
    upstream = torch.randn_like(mix(x, kernels, weights, transposed))

    def run(merge: bool) -> None:
        y = mix(x, kernels, weights, transposed, merge)
        torch.autograd.grad(y, inputs, upstream)

    def kept(merge: bool) -> float:
        saved: dict[int, int] = {}
        given = {tensor.untyped_storage().data_ptr() for tensor in inputs}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = mix(x, kernels, weights, transposed, merge)
        assert y.requires_grad
        return sum(saved.values()) / 2**20

    ways = {"separate": lambda: run(False), "merged": lambda: run(True)}
    seconds = take_turns(ways, repeats, torch.get_num_threads())
    return seconds["separate"], seconds["merged"], kept(False), kept(True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, default=128, help="skip larger maps (positions)")
    arguments = command_line.parse(parser)
    torch.set_num_threads(arguments.threads)
    device = machine.choose_device(arguments.device)
    print(f"torch {torch.__version__}, {device}, {arguments.threads} thread(s)")
    print(
        "| operator | Cin | Cout | positions | batch | separate ms | merged ms | ratio | "
        "separate MiB | merged MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for transposed in (False, True):
        for shape in _shapes(arguments.channels, transposed):
            if shape[2] > arguments.largest:
                continue
            for batch in arguments.batches:
                separate, merged, kept_separate, kept_merged = _measure(
                    shape, transposed, batch, device, arguments.repeats
                )
                name = "up" if transposed else "down"
                print(
                    f"| {name} | {shape[0]} | {shape[1]} | {shape[2]}x{shape[2]} | {batch} | "
                    f"{1e3 * separate:.2f} | {1e3 * merged:.2f} | {separate / merged:.2f} | "
                    f"{kept_separate:.1f} | {kept_merged:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    raise SystemExit(as_script(main))
