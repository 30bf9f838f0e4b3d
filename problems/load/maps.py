"""Pictures of label maps before and after: the paper's figures 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mlseg.engines.engine import Engine
from mlseg.engines.lookahead.loop import BEST, START, LookaheadLoop
from mlseg.engines.segmentation import Segmentation
from mlseg.files import writing
from mlseg.segmentation.data import Samples
from mlseg.segmentation.pictures import Row, colour, legend, sheet, to_rgb


@torch.no_grad()
def draw_changes(
    engine: Engine, segmentation: Segmentation, loop: LookaheadLoop, number: int
) -> None:
    """Write ``changed.png`` and ``improved.png``: rows of image, truth, label map before and after.

    The one has the images whose maps differ most; the other those of whose pixels most became
    right, less those that became wrong.

    Images are of the validation split; pixels that are ignored in the truth don't count. A picture
    that nothing belongs in isn't made.

    Args:
        number: images in each, at most.

    Raises:
        RunError: a file can't be written.
    """
    samples, folder = segmentation.data.val, engine.recorder.directory
    if folder is None or not {START, BEST} <= segmentation.counts.keys():
        return
    found = {}
    for name in (START, BEST):
        with segmentation.weights(engine, name) as there:
            if not there:
                return
            found[name] = _maps(loop, segmentation.problem.module, samples)
    changed, gained = pixels(found[START], found[BEST], samples)
    for stem, order in (("changed", changed), ("improved", gained)):
        most = min(number, int((order > 0).sum()))
        chosen = order.argsort(descending=True, stable=True)[:most].tolist()
        if not chosen:
            continue
        rows = [
            Row(
                [
                    to_rgb(samples.images[i]),
                    *(
                        colour(m[i].numpy(), samples.spec.palette)
                        for m in (samples.masks, *found.values())
                    ),
                ],
                f"{samples.ids[i]}   {changed[i]} pixels changed, {gained[i]:+d} right",
            )
            for i in chosen
        ]
        heads = ("image", "truth", "before", "after")
        save_sheet(folder / "samples" / f"{stem}.png", heads, rows, samples, chosen)


def pixels(before: Tensor, after: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Of each image the pixels that changed, and by how many more are right: (N,) int64 each.

    Args:
        before, after: (N, H, W) uint8.
    """
    changed = torch.zeros(len(samples), dtype=torch.int64)
    gained = torch.zeros_like(changed)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        truth = samples.masks[i]  # image by image: the split may be large
        counted = torch.ones_like(truth, dtype=torch.bool)
        if samples.spec.ignore_index is not None:
            counted = truth != samples.spec.ignore_index
        changed[i] = ((a != b) & counted).sum()
        gained[i] = ((b == truth) & counted).sum() - ((a == truth) & counted).sum()
    return changed, gained


def _maps(loop: LookaheadLoop, module: torch.nn.Module, samples: Samples) -> Tensor:
    held = loop.hold_out
    return torch.cat([held.maps(module, x).cpu() for x in samples.images.split(held.batch_size)])


def save_sheet(
    path: Path, heads: Sequence[str], rows: Sequence[Row], samples: Samples, shown: Sequence[int]
) -> None:
    """Write a sheet with a legend.

    Args:
        shown: indices of the rows' images in ``samples``.

    Raises:
        RunError: it can't be written.
    """
    colours = legend(samples.spec, samples.masks[torch.tensor(shown)], tinted=False)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet(heads, rows, colours)).save(path)
