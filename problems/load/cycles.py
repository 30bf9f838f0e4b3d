"""Label maps of a few images across the cycles: the paper's figures 6 and 7."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.lookahead.loop import LookaheadLoop
from mlseg.files import replacing, write_json, writing
from mlseg.problems.load.maps import save_sheet
from mlseg.problems.load.records import read_events
from mlseg.segmentation.pictures import Row, colour, to_rgb

STAGES = 6
"""Label maps between the first and the last of a row, at most."""
_IMAGES = "images.json"


class CycleMaps(Hooks):
    """Keeps the label maps of a few hold-out images by every model that enters the buffer, and
    draws them: image, truth, the start model, where cycles ended, the peaks that they found.

    The images are those that the start model gets most wrong: no look at what came of them. A file
    of each model lies in ``samples/cycles/``, class indices of the images one below the other.

    Args:
        loop: whose buffer has the maps.
        images: how many; 0 for none.
    """

    def __init__(self, loop: LookaheadLoop, images: int) -> None:
        self.loop = loop
        self.images = images
        self._chosen: list[int] = []
        self._seen: list[str] = []

    def stepped(self, engine: Engine) -> None:
        """Keep what has come into the buffer."""
        directory, entries = engine.recorder.directory, self.loop.entries
        if not self.images or directory is None or not entries or entries == self._seen:
            return
        folder = directory / "samples" / "cycles"
        if not self._chosen:
            self._chosen = self._choose(folder)
        for position, label in enumerate(entries):
            if label not in self._seen:
                maps = self._gather(position, self._chosen)
                _write_stack(folder / f"{label}.png", maps.numpy())
        self._seen = entries

    def _choose(self, folder: Path) -> list[int]:
        """Images of the hold-out: as before in a run that goes on, else by the start's mistakes."""
        held = self.loop.hold_out.samples
        places = {name: index for index, name in enumerate(held.ids)}
        try:
            names = json.loads((folder / _IMAGES).read_text(encoding="utf-8"))["images"]
            return [places[name] for name in names]
        except (OSError, ValueError, KeyError, TypeError):
            # A run that begins; or its file is lost, and with it what the maps there are of.
            for path in folder.glob("g*.png"):
                path.unlink(missing_ok=True)
        wrong = torch.zeros(len(held), dtype=torch.int64)
        for index in range(len(held)):
            truth = held.masks[index]
            found = self._gather(0, [index])[0] != truth
            if held.spec.ignore_index is not None:
                found &= truth != held.spec.ignore_index
            wrong[index] = found.sum()
        chosen = wrong.argsort(descending=True, stable=True)[: self.images].tolist()
        write_json(folder / _IMAGES, {"images": [held.ids[index] for index in chosen]})
        return [int(index) for index in chosen]

    def _gather(self, position: int, images: Sequence[int]) -> Tensor:
        buffer = self.loop.buffer
        assert buffer is not None
        first = buffer.shape[0] - len(self.loop.hold_out)  # training images come before
        places = torch.tensor(images) + first
        return buffer.gather(torch.full_like(places, position), places)

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """Draw ``samples/cycles.png``."""
        directory = engine.recorder.directory
        if directory is not None and self.images:
            self._draw(directory)
        return {}

    def _draw(self, directory: Path) -> None:
        folder = directory / "samples" / "cycles"
        stages = stages_of(read_events(directory))
        there = [(label, words) for label, words in stages if (folder / f"{label}.png").exists()]
        if len(there) < 2:
            return
        held = self.loop.hold_out.samples
        chosen = self._chosen or self._choose(folder)
        maps = [_read_stack(folder / f"{label}.png", len(chosen)) for label, _ in there]
        rows = [
            Row(
                [
                    to_rgb(held.images[i]),
                    *(
                        colour(m, held.spec.palette)
                        for m in (held.masks[i].numpy(), *(stack[row] for stack in maps))
                    ),
                ],
                held.ids[i],
            )
            for row, i in enumerate(chosen)
        ]
        heads = ["image", "truth", *(words for _, words in there)]
        save_sheet(directory / "samples" / "cycles.png", heads, rows, held, chosen)


def stages_of(events: Sequence[Mapping[str, Any]], most: int = STAGES) -> list[tuple[str, str]]:
    """Models to show of a run, in order, each with its heading.

    The start, where each cycle ended and what peak it found, up to the last peak, or, where there
    was none, all; of many those between the first and the last evenly.
    """
    found = [("g0", "start")] if any(e["event"] == "start" for e in events) else []
    ends = [e for e in events if e["event"] == "cycle_end"]
    last = max((i for i, end in enumerate(ends) if end["peak"] is not None), default=len(ends) - 1)
    for end in ends[: last + 1]:
        found.append((end["ending"], f"cycle {end['cycle']}: {end['reason']}"))
        if end["peak"] is not None:
            found.append((end["peak"], f"cycle {end['cycle']}: peak"))
    if len(found) > most + 2:
        places = [round(i * (len(found) - 1) / (most + 1)) for i in range(most + 2)]
        found = [found[place] for place in places]
    return found


def _write_stack(path: Path, maps_NHW: np.ndarray) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Image.fromarray(maps_NHW.reshape(-1, maps_NHW.shape[-1])).save(temporary, "PNG")


def _read_stack(path: Path, number: int) -> np.ndarray:
    with writing(path), Image.open(path) as picture:
        stack = np.asarray(picture)
    return stack.reshape(number, -1, stack.shape[-1])
