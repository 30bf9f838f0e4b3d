"""Label maps of test images whose masks a benchmark's server keeps, in the layout that it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mlseg.errors import UserError
from mlseg.files import require_file
from mlseg.segmentation.data import palettes
from mlseg.segmentation.data.layout import list_files, pattern

_MAX_LIST = 2**22


@dataclass(frozen=True)
class Server:
    """What a server takes.

    Attributes:
        classes: of the benchmark, in the order of a run's class indices.
        images: finds the test images below the data set's folder; by the path that a map has below
            the folder that is handed in.
        number: of them.
        values: what stands in a map for each class.
        palette: of the classes, for maps with colours; None: grey ones.
    """

    classes: tuple[str, ...]
    images: Callable[[Path], Mapping[str, Path]]
    number: int
    values: tuple[int, ...]
    palette: palettes.Palette | None = None

    def check(self, classes: tuple[str, ...], run: Path) -> None:
        """Raise UserError for a run of other classes."""
        if classes != self.classes:
            raise UserError(
                f"--server: {run} has the classes {', '.join(classes)[:120]}, the server "
                f"{', '.join(self.classes)[:120]}; name a run on that data set"
            )

    def picture(self, labels_HW: np.ndarray) -> Image.Image:
        """A label map of class indices as the server reads it."""
        table = np.zeros(256, np.uint8)
        table[: len(self.values)] = self.values
        image = Image.fromarray(table[labels_HW])
        if self.palette is not None:
            image = image.convert("P")  # of a grey image: its values are the indices
            image.putpalette([value for colour in self.palette for value in colour])
        return image


def _voc(competition: str) -> Callable[[Path], Mapping[str, Path]]:
    def images(root: Path) -> dict[str, Path]:
        lists = [name for name in _files(root) if name.endswith("ImageSets/Segmentation/test.txt")]
        if len(lists) != 1:
            found = f"{len(lists)} lists" if lists else "no list"
            raise UserError(
                f"{root}: {found} ImageSets/Segmentation/test.txt; name the folder VOC2012 with "
                "the test images in it (VOC2012test.tar, from the server)"
            )
        base = (root / lists[0]).parents[2]
        require_file(root / lists[0], _MAX_LIST)
        text = (root / lists[0]).read_text(encoding="utf-8", errors="replace")
        ids = text.split()
        for name in ids:
            if not re.fullmatch(r"\d{4}_\d{6}", name):
                raise UserError(f"{root / lists[0]}: {name[:40]!r} is no image of VOC 2012")
        found_images = {name: base / "JPEGImages" / f"{name}.jpg" for name in ids}
        for path in found_images.values():
            if not path.is_file():
                raise UserError(f"{path}: missing, {lists[0]} has it; unpack VOC2012test.tar there")
        folder = f"results/VOC2012/Segmentation/{competition}_test_cls"
        return {f"{folder}/{name}.png": path for name, path in found_images.items()}

    return images


def _cityscapes(root: Path) -> dict[str, Path]:
    wanted = pattern("**/leftImg8bit/test/*/{id}_leftImg8bit.png", r"[^/]+_\d{6}_\d{6}")
    found = {}
    for name in _files(root):
        match = wanted.fullmatch(name)
        if match:
            found[f"{match['id']}.png"] = root / name
    if not found:
        raise UserError(
            f"{root}: no leftImg8bit/test/*/*_leftImg8bit.png; name the folder that "
            "leftImg8bit_trainvaltest.zip was unpacked in"
        )
    return found


def _files(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; with --server name the data set's")
    return list_files(root)


_LABELS = {index: raw for raw, index in palettes.CITYSCAPES_LABELS.items()}

SERVERS: Mapping[str, Server] = {
    # comp5 is for models that have seen VOC 2012 alone, comp6 for all others.
    **{
        f"voc2012_{competition}": Server(
            palettes.VOC_CLASSES,
            _voc(competition),
            1456,
            tuple(range(len(palettes.VOC_CLASSES))),
            palettes.VOC_PALETTE,
        )
        for competition in ("comp5", "comp6")
    },
    # The 19 classes that are trained on stand for some of the 34 ids of its label files.
    "cityscapes": Server(
        palettes.CITYSCAPES_CLASSES,
        _cityscapes,
        1525,
        tuple(_LABELS[index] for index in range(len(palettes.CITYSCAPES_CLASSES))),
    ),
}
"""By the names that ``mlseg.predict --server`` takes."""
