"""How a segmentor that was trained on windows should be shown a whole image.

    cd runs/segan_rows && python ../../benchmarks/segan_views.py segan/seed_0 cross_entropy/seed_0

Scores on the validation images of each run, by its selected weights and threshold, the image

* in overlapping windows of the training size, their logits averaged (what mlseg does);
* resized to the training size;
* whole, at the size that windows are cut from, its edges repeated where the levels need it;
* whole, at half as much again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from mlseg import machine
from mlseg.commands import as_script
from mlseg.evaluate import own_data
from mlseg.segmentation.data import Samples
from mlseg.segmentation.metrics import SCORES
from mlseg.segmentation.scoring import score
from mlseg.segmentation.trained import Ensemble, load_runs

SHOWN = [name for name in SCORES if name not in ("precision", "thresholded_jaccard")]


def views(ensemble: Ensemble) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to predict an image, by name."""
    window = ensemble.first.window
    assert window is not None
    whole = Ensemble(
        tuple(replace(member, window=None) for member in ensemble.members), ensemble.threshold
    )

    def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.interpolate(image, size, mode="bilinear", antialias=True)

    height, width = ensemble.first.image_size
    larger = (height * 3 // 2, width * 3 // 2)
    return {
        f"windows of {window[0]}x{window[1]}": ensemble,
        f"resized to {window[0]}x{window[1]}": lambda image: whole(resize(image, window)),
        f"whole, {height}x{width}": whole,
        f"whole, {larger[0]}x{larger[1]}": lambda image: whole(resize(image, larger)),
    }


def row(name: str, by: Callable[[Tensor], Tensor], samples: Samples, threshold: float) -> str:
    """A line of the table."""

    def at_their_size(image: Tensor) -> Tensor:
        found = by(image)
        if samples.native_mask is not None or found.shape[2:] == image.shape[2:]:
            return found  # scoring brings it to the mask's size
        return functional.interpolate(found, image.shape[2:], mode="bilinear")

    found = score(at_their_size, samples, "cpu", threshold=threshold, native=True).compute()
    return f"| {name} | " + " | ".join(f"{found[key]:.3f}" for key in SHOWN) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    arguments = parser.parse_args()
    print(machine.head(machine.describe()))
    for run in arguments.runs:
        ensemble = load_runs([run], torch.device("cpu"))
        if ensemble.first.window in (None, ensemble.first.image_size):
            parser.error(f"{run} wasn't trained on windows")
        samples = own_data([run]).val
        print(f"\n{run}, {len(samples)} validation images\n")
        print(f"| seen | {' | '.join(SHOWN)} |")
        print("|---" * (len(SHOWN) + 1) + "|")
        for name, by in views(ensemble).items():
            print(row(name, by, samples, ensemble.threshold), flush=True)


if __name__ == "__main__":
    raise SystemExit(as_script(main))
