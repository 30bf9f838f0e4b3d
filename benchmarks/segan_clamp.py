"""What the critic's clamp does to its layers: SegAN's game with and without BatchNorm in it.

    OMP_NUM_THREADS=1 python benchmarks/segan_clamp.py --steps 200

The same game three times from the same start: every parameter clamped (the paper), all but
BatchNorm's, none. After the last step, on one batch: the mean size of gamma in each layer, the mean
distance |f_i - f'_i| of each feature map, and each map's share of the gradient that the segmentor
gets (the norm of d L_i / d S(x), L_i the term of map i, over the sum of these norms).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlseg import command_line, config, machine
from mlseg.commands import as_script
from mlseg.problems.systems import parse_run
from mlseg.randomness import seed_everything

VARIANTS = {
    "all clamped": [],
    "norm layers free": ["critic.clamp_norm=false"],
    "no clamp": ["critic.clamp=null"],
}


def measure(path: Path, overrides: Sequence[str], steps: int) -> list[dict[str, float]]:
    """Figures of each feature map after ``steps`` iterations, the pixel level first."""
    settings, build = parse_run(config.load(path, overrides))
    seed_everything(settings.seed)
    engine = build(settings, None)
    for _ in range(steps):
        engine.iterate()
    critic, segmentor = engine.critic, engine.segmentor
    image, label, counted = critic.cur_batch
    with critic.again.untraced():
        maps = segmentor.maps(image, counted).detach().requires_grad_()
        masked = (image + 1.0) / 2.0
        with torch.no_grad():
            (true,) = critic(masked, label)
        (predicted,) = critic(masked, maps)
    terms = [(p - t).abs().mean() for p, t in zip(predicted, true, strict=True)]
    norms = [float(torch.autograd.grad(t, maps, retain_graph=True)[0].norm()) for t in terms]
    found: list[dict[str, float]] = []
    blocks: list[Any] = [None, *critic.module.critics[0].blocks]
    for block, term, norm in zip(blocks, terms, norms, strict=True):
        gammas = [] if block is None else [m.weight for m in block if isinstance(m, nn.BatchNorm2d)]
        found.append(
            {
                "gamma": float(gammas[0].detach().abs().mean()) if gammas else float("nan"),
                "distance": float(term.detach()),
                "share": norm / sum(norms),
            }
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--config", type=Path, default=Path("configs/segan_isic_small.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    arguments = command_line.parse(parser)
    print(f"# The clamp, {arguments.config.name} after {arguments.steps} steps\n")
    print(machine.head(machine.describe()), flush=True)
    own = ["device=cpu", "data.val=1", "data.test=0"]
    found = {
        name: measure(arguments.config, [*arguments.overrides, *own, *more], arguments.steps)
        for name, more in VARIANTS.items()
    }
    for key, title in (
        ("gamma", "mean size of gamma in the layer's BatchNorm"),
        ("distance", "mean distance of the feature map"),
        ("share", "share of the segmentor's gradient"),
    ):
        print(f"\n| {title} | " + " | ".join(found) + " |")
        print("|---" * (len(found) + 1) + "|")
        for index in range(len(found["no clamp"])):
            cells = []
            for rows in found.values():
                value = rows[index][key]
                cells.append("" if value != value else f"{value:.2g}")
            name = "masked image" if index == 0 else f"layer {index}"
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    raise SystemExit(as_script(main))
