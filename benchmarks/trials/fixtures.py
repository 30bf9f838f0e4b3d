"""What trials start from: untouched runs of toy systems, images, archives."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlseg.problems.systems import all_systems
from trials.child import Task, call
from trials.judge import clean

TOYS = Path(__file__).parent / "toys"
PLAIN = "supervised"
"""The smallest system, for trials in which the system plays no part."""


@dataclass(frozen=True)
class Reference:
    """A run that nobody touched.

    Attributes:
        directory: what it left.
        config: its config.
        seconds: that it took.
        operations: on files.
    """

    directory: Path
    config: Path
    seconds: float
    operations: int


class Fixtures:
    """Made once, when first asked for.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[str, Reference] = {}

    @functools.cached_property
    def systems(self) -> list[str]:
        """With several levels, that have a toy and are installed."""
        known = {system.name for system in all_systems()}
        return sorted(p.stem for p in TOYS.glob("*.yaml") if p.stem in known - {PLAIN})

    def run(self, system: str = PLAIN) -> Reference:
        """The untouched run of a system."""
        if system not in self._runs:
            place, directory = self.folder / system / "place", self.folder / system / "run"
            config = TOYS / f"{system}.yaml"
            task = Task("run", (str(config), "--out", str(directory)), place, "untouched")
            ended = call(Task(**{**vars(task), "name": "warm"}))  # what is loaded late, is loaded
            clean(ended, (0,))
            shutil.rmtree(directory)
            ended = call(task)
            clean(ended, (0,))
            self._runs[system] = Reference(directory, config, ended.seconds, ended.operations)
        return self._runs[system]

    @functools.cached_property
    def pictures(self) -> dict[str, Path]:
        """A photograph-like image of 40x30 pixels in every format and mode that is read."""
        folder = self.folder / "pictures"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        colour = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        grey = colour.convert("L")
        sixteen = Image.fromarray(rng.integers(0, 65536, (30, 40), np.uint16))
        turned = Image.Exif()
        turned[0x0112] = 6
        made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
            "colour.png": (colour, {}),
            "grey.png": (grey, {}),
            "alpha.png": (colour.convert("RGBA"), {}),
            "palette.png": (colour.convert("P"), {}),
            "bits.png": (colour.convert("1"), {}),
            "sixteen.png": (sixteen, {}),
            "colour.jpg": (colour, {}),
            "turned.jpg": (colour, {"exif": turned}),
            "progressive.jpg": (colour, {"progressive": True}),
            "print.jpg": (colour.convert("CMYK"), {}),
            "colour.bmp": (colour, {}),
            "colour.gif": (colour, {}),
            "colour.webp": (colour, {}),
            "colour.tif": (colour, {}),
            "packed.tif": (colour, {"compression": "tiff_lzw"}),
            "sixteen.tif": (sixteen, {}),
        }
        for name, (image, options) in made.items():
            image.save(folder / name, **options)
        return {name: folder / name for name in made}

    @functools.cached_property
    def pairs(self) -> Path:
        """A folder of own data: 8 images and masks."""
        folder = self.folder / "pairs"
        rng = np.random.default_rng(1)
        for number in range(8):
            for kind, suffix in (("images", "jpg" if number % 2 else "png"), ("masks", "png")):
                path = folder / kind / f"{number}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (32, 40, 3) if kind == "images" else (32, 40)
                values = rng.integers(0, 256, shape, np.uint8)
                if kind == "masks":
                    values = np.where(values > 127, 255, 0).astype(np.uint8)
                Image.fromarray(values).save(path)
        return folder
