"""Segment images with a finished run, or an ensemble of runs.

    python -m mlseg.predict runs/try images/ --out masks/
    python -m mlseg.predict runs/try lesion.jpg --out masks/
    python -m mlseg.predict runs/try 'images/*_left.png' --out masks/
    python -m mlseg.predict runs/a runs/b runs/c images/ --out masks/

For each image two PNGs at its own size: ``<name>.png``, the mask (0 and 255 for two classes, else
class indices with the classes' colours as palette), and ``<name>_overlay.png``. Several runs: the
mean of their probabilities. What ``mlseg.calibrate`` chose for exactly these weights is used.
"""

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from mlseg import threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from mlseg.commands import guarded, make_console
from mlseg.errors import EXIT_USER_ERROR, UserError
from mlseg.evaluate import add_choices, choose_threads, load_chosen
from mlseg.files import writing
from mlseg.machine import choose_device
from mlseg.segmentation.data import PADDING, DatasetSpec, padded, placed, to_float
from mlseg.segmentation.data.decode import read_image
from mlseg.segmentation.nets import decide
from mlseg.segmentation.pictures import overlay
from mlseg.segmentation.trained import Ensemble

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(prog="mlseg predict", description="Segment images with a run.")
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    made.add_argument("images", help="a folder, a file, or a glob in quotes")
    made.add_argument("--out", type=Path, required=True, help="folder for masks and overlays")
    add_choices(made)
    threads.add_flag(made)
    return made


def _run(arguments: argparse.Namespace) -> int:
    paths = find_images(arguments.images)
    ensemble = load_chosen(arguments, choose_device(arguments.device))
    choose_threads(arguments).use()
    spec = ensemble.first.spec
    with writing(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    console = make_console(stderr=True)
    failed = 0
    for path in track(paths, "Segmenting", console=console, disable=not console.is_terminal):
        try:
            image = read_image(path, spec.channels)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        mask = segment(ensemble, image)
        with writing(arguments.out):
            _mask_image(mask, spec).save(arguments.out / f"{path.stem}.png")
            shown = overlay(_rgb(image), mask, spec.palette)
            Image.fromarray(shown).save(arguments.out / f"{path.stem}_overlay.png")
    console.print(f"{len(paths) - failed} masks and overlays in {arguments.out}")
    return EXIT_USER_ERROR if failed else 0


def find_images(where: str) -> list[Path]:
    """The images that a folder, a file or a glob means, sorted.

    Raises:
        UserError: there are none, or two would get the same mask's name.
    """
    path = Path(where)
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(p) for p in glob.glob(where, recursive=True) if Path(p).is_file()]
    if not found:
        kinds = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{where}: no images there (a folder, a file or a glob of {kinds})")
    names: dict[str, Path] = {}
    for p in sorted(found):
        if p.stem in names:
            raise UserError(f"{p} and {names[p.stem]} would both become {p.stem}.png; rename one")
        names[p.stem] = p
    for stem, p in names.items():
        if f"{stem}_overlay" in names:
            raise UserError(f"{p}: its overlay would be {stem}_overlay.png, another's mask; rename")
    return sorted(found)


def segment(ensemble: Ensemble, image_CHW: np.ndarray) -> np.ndarray:
    """Label map of one image, at its own size.

    The image is brought to the size the networks were trained at as in training (bilinear,
    antialiased; stretched or padded), and the class probabilities back to the image's size.

    Args:
        image_CHW: uint8, (C, H, W).

    Returns:
        (H, W) uint8 class indices.
    """
    device = next(ensemble.first.module.parameters()).device
    native, size = (image_CHW.shape[1], image_CHW.shape[2]), ensemble.first.image_size
    resized = _resized(image_CHW, placed(native, size, ensemble.first.fit))
    tensor = torch.from_numpy(padded(resized, size, PADDING)).unsqueeze(0).to(device)
    found = ensemble.probabilities(to_float(tensor), native)
    return decide(found, ensemble.threshold)[0].to("cpu", torch.uint8).numpy()


def _resized(image_CHW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image_CHW.shape[1:] == size:
        return image_CHW
    height, width = size
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in image_CHW
    ]
    return np.stack(channels)


def _rgb(image_CHW: np.ndarray) -> np.ndarray:
    return np.broadcast_to(image_CHW, (3, *image_CHW.shape[1:])).transpose(1, 2, 0)


def _mask_image(mask: np.ndarray, spec: DatasetSpec) -> Image.Image:
    if spec.num_classes == 2:
        return Image.fromarray(mask * 255)
    image = Image.fromarray(mask).convert("P")
    image.putpalette([value for colour in spec.palette for value in colour])
    return image


if __name__ == "__main__":
    sys.exit(main())
