"""Segment images with a finished run, or an ensemble of runs.

    python -m mlseg.predict runs/try images/ --out masks/
    python -m mlseg.predict runs/try lesion.jpg --out masks/
    python -m mlseg.predict runs/try 'images/*_left.png' --out masks/
    python -m mlseg.predict runs/a runs/b runs/c images/ --out masks/
    python -m mlseg.predict runs/voc VOCdevkit/VOC2012 --server voc2012_comp6 --out upload/

For each image two PNGs at its own size, upright as it is shown (EXIF): ``<name>.png``, the mask (0
and 255 for two classes, else class indices with the classes' colours as palette), and
``<name>_overlay.png``. Several runs: the mean of their probabilities. What ``mlseg.calibrate``
chose for exactly these weights is used. Hidden files are left out.

``--server`` names a benchmark whose test masks nobody else has, and the images are the test images
below its data set's folder. Their label maps alone are written, as its server takes them:
``voc2012_comp5`` and ``voc2012_comp6`` palette PNGs below ``results/VOC2012/Segmentation/``,
``cityscapes`` the ids of its label files.

Nothing is overwritten but what an earlier call has written, which the files say of themselves; with
``--overwrite`` any file of these names but the images. A run that names code from outside mlseg
needs ``--trust``.
"""

import argparse
import glob
import os
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from mlseg import threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.progress import track

from mlseg.commands import guarded, make_console, named
from mlseg.config.registry import strangers
from mlseg.errors import EXIT_RUN_ERROR, UserError, printable
from mlseg.evaluate import add_choices, choose_threads, load_chosen
from mlseg.files import reachable, replacing, require_writable, writing
from mlseg.machine import choose_device
from mlseg.segmentation.data import PADDING, DatasetSpec, padded, placed, to_float
from mlseg.segmentation.data.decode import limit_pixels, read_image
from mlseg.segmentation.data.layout import is_hidden, list_files
from mlseg.segmentation.data.servers import SERVERS
from mlseg.segmentation.pictures import overlay
from mlseg.segmentation.scoring import label_map
from mlseg.segmentation.trained import Ensemble

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run_guarded, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(prog="mlseg predict", description="Segment images with a run.")
    made.add_argument("runs", type=named, nargs="+", metavar="RUN", help="run directories")
    made.add_argument("images", help="a folder, a file, or a glob in quotes")
    made.add_argument("--out", type=named, required=True, help="folder for masks and overlays")
    made.add_argument(
        "--server", choices=tuple(SERVERS), help="of a benchmark, for its test images; see above"
    )
    made.add_argument(
        "--overwrite", action="store_true", help="also files there that predict hasn't written"
    )
    add_choices(made)
    threads.add_flag(made)
    return made


def _run_guarded(arguments: argparse.Namespace) -> int:
    with strangers(arguments.trust):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    limit_pixels(arguments.max_megapixels)
    server = None if arguments.server is None else SERVERS[arguments.server]
    if server is None:
        paths = find_images(arguments.images)
        made = {path: list(outputs(path, arguments.out)) for path in paths}
    else:
        taken = server.images(reachable(arguments.images))
        made = {path: [arguments.out / name] for name, path in taken.items()}
        paths = list(made)
    check_outputs(made, arguments.out, arguments.overwrite)
    require_writable(arguments.out)
    ensemble = load_chosen(arguments, choose_device(arguments.device))
    choose_threads(arguments).use()
    spec = ensemble.first.spec
    if server is not None:
        server.check(spec.classes, ensemble.first.run)
    with writing(arguments.out):
        for folder in {file.parent for files in made.values() for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
    console = make_console(stderr=True)
    failed: list[Path] = []
    for path in track(paths, "Segmenting", console=console, disable=not console.is_terminal):
        try:
            image = read_image(path, spec.channels)
            mask = segment(ensemble, image, str(path))
        except UserError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            failed.append(path)
            continue
        if server is None:
            shown = Image.fromarray(overlay(_rgb(image), mask, spec.palette))
            pictures = [_mask_image(mask, spec), shown]
        else:
            pictures = [server.picture(mask)]
        for file, picture in zip(made[path], pictures, strict=True):
            with writing(file), replacing(file) as temporary:
                picture.save(temporary, "PNG", pnginfo=_mark())
    what = "masks and overlays" if server is None else "label maps for the server"
    console.print(f"{len(paths) - len(failed)} {what} in {arguments.out}")
    if server is not None and len(paths) != server.number:
        console.print(f"The server wants {server.number}: here were {len(paths)} test images.")
    if failed:
        names = ", ".join(path.name for path in failed)
        print(printable(f"failed: {len(failed)} of {len(paths)} images: {names}"), file=sys.stderr)
    return EXIT_RUN_ERROR if failed else 0


def find_images(where: str) -> list[Path]:
    """The images that a folder, a file or a glob means, sorted.

    Raises:
        UserError: there are none, or two would get the same mask's name.
    """
    path = reachable(where)
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and _may_be_image(p)]
    elif path.is_file():
        found = [path]
    elif "**" in path.parts:
        found = _below(path)
    else:
        found = [p for p in map(Path, glob.glob(str(path))) if _may_be_image(p)]
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


def _may_be_image(path: Path) -> bool:
    """Whether it is a file, or a link to nothing, of which the user shall hear."""
    there = path.is_file() or (path.is_symlink() and not path.exists())
    return there and not is_hidden(path.name)


def _below(pattern: Path) -> list[Path]:
    """Files that a glob with ** means; each folder once, whatever links lead to it."""
    first = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    base = Path(*pattern.parts[:first])
    if not base.is_dir():
        return []
    wanted = pattern.parts[first:]
    return [base / name for name in list_files(base) if _fits(name.split("/"), wanted)]


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[start:], wanted[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def outputs(image: Path, folder: Path) -> tuple[Path, Path]:
    """Where an image's mask and overlay go."""
    return folder / f"{image.stem}.png", folder / f"{image.stem}_overlay.png"


def check_outputs(
    images: Mapping[Path, Sequence[Path]], folder: Path, overwrite: bool = False
) -> None:
    """Refuse to write where somebody else's file lies.

    Args:
        images: and the files that each becomes.
        overwrite: that is as it should be; an image still isn't overwritten.

    Raises:
        UserError: a mask or an overlay would take an image's place, or that of a file, a link or a
            folder that no earlier call has made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a folder")
    # realpath, not resolve: a loop of links leads nowhere, and is said when its image is read.
    read = {os.path.realpath(image) for image in images}
    for file in (file for files in images.values() for file in files):
        if os.path.realpath(file) in read:
            raise UserError(f"--out: {file} is one of the images; name another folder")
        if not os.path.lexists(file) or (overwrite and (file.is_symlink() or file.is_file())):
            continue
        if file.is_symlink() or not _own(file):
            raise UserError(
                f"--out: {file} is there already, and not by predict; name another folder"
                + (" or give --overwrite" if file.is_symlink() or file.is_file() else "")
            )


_SOFTWARE = "mlseg predict"


def _mark() -> PngInfo:
    """By which a file says where it comes from."""
    made = PngInfo()
    made.add_text("Software", _SOFTWARE)
    return made


def _own(file: Path) -> bool:
    """Whether an earlier call has written it."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            return picture.info.get("Software") == _SOFTWARE
    except OSError:
        return False


def segment(ensemble: Ensemble, image_CHW: np.ndarray, name: str = "image") -> np.ndarray:
    """Label map of one image, at its own size.

    The image is brought to the size the networks were trained at as in training (bilinear,
    antialiased; stretched or padded), and the class probabilities back to the image's size.

    Args:
        image_CHW: uint8, (C, H, W).
        name: of the image, for errors.

    Returns:
        (H, W) uint8 class indices.

    Raises:
        UserError: probabilities are NaN or infinite.
    """
    device = next(ensemble.first.module.parameters()).device
    native, size = (image_CHW.shape[1], image_CHW.shape[2]), ensemble.first.image_size
    resized = _resized(image_CHW, placed(native, size, ensemble.first.fit))
    tensor = torch.from_numpy(padded(resized, size, PADDING)).unsqueeze(0).to(device)
    found = ensemble.probabilities(to_float(tensor))
    if not found.isfinite().all():
        raise UserError(f"{name}: its class probabilities by {ensemble.first.run} are not finite")
    return label_map(found, native, ensemble.first.fit, ensemble.threshold).cpu().numpy()


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
