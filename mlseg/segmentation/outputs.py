"""What a prediction leaves beside an image's name: masks, overlays, probabilities, a table.

A file says of itself that it is a prediction's, so that nobody else's is written over.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlseg.files import replacing, require_file, write_json, writing
from mlseg.segmentation.data import DatasetSpec, medical
from mlseg.segmentation.pictures import overlay

SOFTWARE = medical.SOFTWARE
CLASSES = "classes.json"
COLUMNS = ("image", "class", "name", "pixels", "share", "confidence")


@dataclass(frozen=True)
class Outputs:
    """Which files there are of an image.

    Attributes:
        folder: they go into.
        spec: what the classes are.
        probabilities: ``npz``, ``png`` or None.
    """

    folder: Path
    spec: DatasetSpec
    probabilities: str | None = None

    def files(self, image: Path) -> list[Path]:
        """All of an image, the mask first, then the overlay."""
        stem = medical.stem(image)
        names = [f"{stem}.png", f"{stem}_overlay.png"]
        if medical.suffix(image):
            names.append(f"{stem}{medical.suffix(image)}")
        if self.probabilities == "npz":
            names.append(f"{stem}_probabilities.npz")
        elif self.probabilities == "png":
            names += [f"{stem}_probability{part}.png" for part in self._parts()]
        return [self.folder / name for name in names]

    def _parts(self) -> list[str]:
        if self.spec.num_classes == 2:
            return [""]
        return [f"_{index}" for index in range(self.spec.num_classes)]

    def write(
        self,
        image: Path,
        image_CHW: NDArray[np.uint8],
        mask: NDArray[np.uint8],
        probabilities: NDArray[np.float32] | None,
        slice_: medical.Slice | None = None,
    ) -> None:
        """Write them.

        Args:
            probabilities: (K, H, W), where they are wanted.
            slice_: what the image is of, where that is a medical file.

        Raises:
            RunError: a file can't be written.
        """
        shown = np.broadcast_to(image_CHW, (3, *image_CHW.shape[1:])).transpose(1, 2, 0)
        picture, over, *more = self.files(image)
        save_png(_mask_image(mask, self.spec), picture, Classes=json.dumps(_classes(self.spec)))
        save_png(Image.fromarray(overlay(shown, mask, self.spec.palette)), over)
        if slice_ is not None:
            medical.write_mask(mask, slice_, more.pop(0))
        if probabilities is None or self.probabilities is None:
            return
        if self.probabilities == "npz":
            _save_npz(probabilities, self.spec, more[0])
            return
        parts = probabilities[1:] if self.spec.num_classes == 2 else probabilities
        for part, file in zip(parts, more, strict=True):
            wide = np.rint(np.clip(part.astype(np.float64), 0, 1) * 65535).astype(np.uint16)
            save_png(Image.fromarray(wide), file)

    def of_all(self) -> list[Path]:
        """Files that there is one of: ``classes.json``, where there are more than two."""
        return [self.folder / CLASSES] if self.spec.num_classes > 2 else []

    def write_classes(self) -> None:
        """Which value of a mask, and which colour, is which class, in the file of :meth:`of_all`.

        Raises:
            RunError: it can't be written.
        """
        for file in self.of_all():
            write_json(file, {"software": SOFTWARE, "classes": _classes(self.spec)})


def is_own(file: Path) -> bool:
    """Whether an earlier call has written it."""
    try:
        require_file(file)
        if medical.suffix(file):
            return medical.is_own(file)
        if file.suffix == ".json":
            require_file(file, 2**20)
            found: Any = json.loads(file.read_text(encoding="utf-8"))
            return isinstance(found, dict) and found.get("software") == SOFTWARE
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return archive.comment == SOFTWARE.encode()
        if file.suffix == ".png":
            with Image.open(file, formats=("PNG",)) as picture:
                return picture.info.get("Software") == SOFTWARE
        with file.open(encoding="utf-8", newline="") as text:
            return text.readline(200).rstrip("\r\n") == ",".join(COLUMNS)
    except Exception:  # noqa: BLE001, somebody's file may be anything
        return False


def rows(
    image: Path,
    mask: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
) -> list[dict[str, Any]]:
    """A row per class, of :data:`COLUMNS`: area in pixels and as a share, and confidence.

    Confidence is the mean probability of the class over the pixels that have it; none where no
    pixel has.
    """
    made = []
    for index, name in enumerate(classes):
        where = mask == index
        pixels = int(where.sum())
        sure = f"{float(probabilities[index][where].mean(dtype=np.float64)):.6f}" if pixels else ""
        values = (str(image), index, name, pixels, f"{pixels / mask.size:.6f}", sure)
        made.append(dict(zip(COLUMNS, values, strict=True)))
    return made


def write_table(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """All rows as CSV.

    Raises:
        RunError: it can't be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with writing(path), replacing(path) as temporary:
        data = text.getvalue().encode("utf-8", "surrogateescape")  # names of files may be anything
        temporary.write_bytes(data)


def _classes(spec: DatasetSpec) -> list[dict[str, Any]]:
    step = 255 if spec.num_classes == 2 else 1
    return [
        {"class": index, "name": name, "value": step * index, "colour": list(colour)}
        for index, (name, colour) in enumerate(zip(spec.classes, spec.palette, strict=True))
    ]


def save_png(picture: Image.Image, file: Path, **texts: str) -> None:
    """A PNG that says that it is ours, and these texts.

    Raises:
        RunError: it can't be written.
    """
    made = PngInfo()
    for key, text in {"Software": SOFTWARE, **texts}.items():
        made.add_text(key, text)
    with writing(file), replacing(file) as temporary:
        picture.save(temporary, "PNG", pnginfo=made)


def _save_npz(probabilities: NDArray[np.float32], spec: DatasetSpec, file: Path) -> None:
    with writing(file), replacing(file) as temporary:
        with temporary.open("wb") as plain:
            np.savez_compressed(
                plain,
                probabilities=probabilities.astype(np.float16),
                classes=np.array(spec.classes),
            )
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.comment = SOFTWARE.encode()


def _mask_image(mask: NDArray[np.uint8], spec: DatasetSpec) -> Image.Image:
    if spec.num_classes == 2:
        return Image.fromarray(mask * 255)
    image = Image.fromarray(mask).convert("P")
    image.putpalette([value for colour in spec.palette for value in colour])
    return image
