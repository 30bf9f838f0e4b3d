"""Segment images with a finished run, or an ensemble of runs.

    python -m mlseg.predict runs/try images/ --out masks/
    python -m mlseg.predict runs/try lesion.jpg --out masks/ --probabilities npz --tta flips
    python -m mlseg.predict runs/try 'images/*_left.png' --out masks/ --csv masks/areas.csv
    python -m mlseg.predict runs/a runs/b runs/c images/ --out masks/
    python -m mlseg.predict runs/voc VOCdevkit/VOC2012 --server voc2012_comp6 --out upload/

For each image two PNGs at its own size, upright as it is shown (EXIF): ``<name>.png``, the mask (0
and 255 for two classes, else class indices with the classes' colours as palette), and
``<name>_overlay.png``. What the values mean stands in the mask's text (``Classes``), and beside
masks of several classes in ``classes.json``. Several runs: the mean of their probabilities. What
``mlseg.calibrate`` chose for exactly these weights is used. Hidden files are left out.

Slices of DICOM and NIfTI (``.dcm``, ``.nii``, ``.nii.gz``) have their masks in their own format
too, with place and spacing; that needs the extra ``medical``.

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
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlseg import signals, threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded
    signals.end_at_once()

from rich.progress import track

from mlseg.commands import guarded, make_console, named, worded
from mlseg.errors import EXIT_RUN_ERROR, UserError, printable
from mlseg.evaluate import add_choices, add_tta, choose_threads, load_chosen
from mlseg.files import reachable, require_writable, writing
from mlseg.machine import choose_device
from mlseg.segmentation.data import DatasetSpec, medical
from mlseg.segmentation.data.decode import limit_pixels, read_image
from mlseg.segmentation.data.layout import is_hidden, list_files
from mlseg.segmentation.data.servers import SERVERS, Server
from mlseg.segmentation.outputs import Outputs, is_own, rows, save_png, write_table
from mlseg.segmentation.segmenting import decided, enlarged, probabilities
from mlseg.segmentation.trained import Ensemble

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(prog="mlseg predict", description="Segment images with a run.")
    made.add_argument("runs", type=named, nargs="+", metavar="RUN", help="run directories")
    made.add_argument("images", type=worded, help="a folder, a file, or a glob in quotes")
    made.add_argument("--out", type=named, required=True, help="folder for masks and overlays")
    made.add_argument(
        "--server", choices=tuple(SERVERS), help="of a benchmark, for its test images; see above"
    )
    made.add_argument(
        "--overwrite", action="store_true", help="also files there that predict hasn't written"
    )
    made.add_argument(
        "--probabilities",
        choices=("npz", "png"),
        help="of the classes too: float16 (K, H, W) in <name>_probabilities.npz, or 16-bit PNGs, "
        "<name>_probability.png of the foreground or one a class",
    )
    made.add_argument(
        "--csv",
        type=named,
        metavar="FILE",
        help="table of area (pixels, share) and confidence of every image and class",
    )
    add_choices(made)
    add_tta(made)
    threads.add_flag(made)
    return made


def _run(arguments: argparse.Namespace) -> int:
    limit_pixels(arguments.max_megapixels)
    if arguments.server is not None:
        return _hand_in(arguments, SERVERS[arguments.server])
    for run in arguments.runs:
        if run.is_file() and _has_suffix(run):
            raise UserError(
                f"{run}: an image, where runs are to be named; all images are the last argument: a "
                "folder, a file, or a glob in quotes"
            )
    paths = find_images(arguments.images)
    any_two = DatasetSpec("", 3, ("", ""))  # names of files depend on the number of classes alone
    outputs = Outputs(arguments.out, any_two, arguments.probabilities)
    check_outputs(paths, outputs, arguments.csv, arguments.overwrite)
    require_writable(arguments.out)
    if arguments.csv is not None:
        require_writable(arguments.csv, "--csv")
    ensemble = load_chosen(arguments, choose_device(arguments.device))
    outputs = replace(outputs, spec=ensemble.first.spec)
    check_outputs(paths, outputs, arguments.csv, arguments.overwrite)
    choose_threads(arguments).use()
    with writing(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    outputs.write_classes()
    console = make_console(stderr=True)
    failed: list[Path] = []
    table: list[dict[str, Any]] = []
    for path in track(paths, "Segmenting", console=console, disable=not console.is_terminal):
        try:
            table += _segment(path, ensemble, outputs, arguments.csv is not None)
        except UserError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            failed.append(path)
    if arguments.csv is not None:
        write_table(arguments.csv, table)
    console.print(f"{len(paths) - len(failed)} masks and overlays in {arguments.out}")
    if failed:
        names = ", ".join(path.name for path in failed)
        print(printable(f"failed: {len(failed)} of {len(paths)} images: {names}"), file=sys.stderr)
    return EXIT_RUN_ERROR if failed else 0


def _hand_in(arguments: argparse.Namespace, server: Server) -> int:
    """Write the label maps of a benchmark's test images; the exit code."""
    for option in ("probabilities", "csv"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option}: no server takes it; drop it or --server")
    taken = server.images(reachable(arguments.images))
    made = {arguments.out / name: path for name, path in taken.items()}
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out: {arguments.out} is a file; name a folder")
    check_files([("--out", file) for file in made], list(made.values()), arguments.overwrite)
    require_writable(arguments.out)
    ensemble = load_chosen(arguments, choose_device(arguments.device))
    server.check(ensemble.first.spec.classes, ensemble.first.run)
    choose_threads(arguments).use()
    console = make_console(stderr=True)
    failed: list[Path] = []
    for file, path in track(
        made.items(), "Segmenting", console=console, disable=not console.is_terminal
    ):
        try:
            image = read_image(path, ensemble.first.spec.channels)
            found = probabilities(ensemble, image, str(path))
        except UserError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            failed.append(path)
            continue
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        save_png(server.picture(decided(ensemble, found, image.shape[1:])), file)
    console.print(f"{len(made) - len(failed)} label maps for the server in {arguments.out}")
    if len(made) != server.number:
        console.print(f"The server wants {server.number}: here were {len(made)} test images.")
    if failed:
        names = ", ".join(path.name for path in failed)
        print(printable(f"failed: {len(failed)} of {len(made)} images: {names}"), file=sys.stderr)
    return EXIT_RUN_ERROR if failed else 0


def _segment(
    path: Path, ensemble: Ensemble, outputs: Outputs, tabled: bool
) -> list[dict[str, Any]]:
    """Write what belongs to one image; its rows of the table, if there is one."""
    channels, slice_ = ensemble.first.spec.channels, None
    if medical.suffix(path):
        slice_ = medical.read_slice(path, channels)
    image = read_image(path, channels) if slice_ is None else slice_.image
    found = probabilities(ensemble, image, str(path))
    mask = decided(ensemble, found, image.shape[1:])
    wanted = tabled or outputs.probabilities is not None
    chances = enlarged(ensemble, found, image.shape[1:]) if wanted else None
    outputs.write(path, image, mask, chances, slice_)
    if not tabled or chances is None:
        return []
    return rows(path, mask, chances, outputs.spec.classes)


def find_images(where: str) -> list[Path]:
    """The images that a folder, a file or a glob means, sorted.

    Raises:
        UserError: there are none.
    """
    path = reachable(where)
    if path.is_dir():
        found = [p for p in path.iterdir() if _has_suffix(p) and _may_be_image(p)]
    elif path.is_file():
        found = [path]
    elif "**" in path.parts:
        found = _below(path)
    else:
        found = [p for p in map(Path, glob.glob(str(path))) if _may_be_image(p)]
    if not found:
        kinds = ", ".join(sorted({*SUFFIXES, *medical.DICOM, *medical.NIFTI}))
        raise UserError(f"{where}: no images there (a folder, a file or a glob of {kinds})")
    return sorted(found)


def _has_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or bool(medical.suffix(path))


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


def check_outputs(
    images: Sequence[Path], outputs: Outputs, table: Path | None = None, overwrite: bool = False
) -> None:
    """Refuse to write where somebody else's file lies, or two of ours would.

    Args:
        table: the file of ``--csv``.
        overwrite: somebody's file is as it should be; an image still isn't overwritten.

    Raises:
        UserError: a mask or another output would take an image's place, or that of a file, a link
            or a folder that no earlier call has made, or one another's.
    """
    folder = outputs.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a folder")
    made = {file: Path(file.name) for file in outputs.of_all()}
    for image in images:
        for file in outputs.files(image):
            if file in made:
                raise UserError(
                    f"{made[file]} and {image} would both become {file.name}; rename one"
                )
            made[file] = image
    wanted = [("--out", file) for file in made]
    if table is not None:
        if os.path.realpath(table) in {os.path.realpath(file) for file in made}:
            raise UserError(f"--csv: {table} is a file of --out already; name another")
        if os.path.realpath(table) in _with_parents(os.path.realpath(folder)):
            raise UserError(f"--csv: {table} is the folder of --out; name a file")
        wanted.append(("--csv", table))
    check_files(wanted, images, overwrite)


def _with_parents(path: str) -> set[str]:
    return {path, *map(str, Path(path).parents)}


def check_files(
    wanted: Sequence[tuple[str, Path]], images: Sequence[Path], overwrite: bool
) -> None:
    """Refuse to write where an image lies, or somebody else's file.

    Args:
        wanted: files that are to be written, with the option that names each.

    Raises:
        UserError: one is there already.
    """
    # realpath, not resolve: a loop of links leads nowhere, and is said when its image is read.
    read = {os.path.realpath(image) for image in images}
    for option, file in wanted:
        if os.path.realpath(file) in read:
            raise UserError(f"{option}: {file} is one of the images; name another folder")
        if not os.path.lexists(file) or (overwrite and (file.is_symlink() or file.is_file())):
            continue
        if file.is_symlink() or not is_own(file):
            raise UserError(
                f"{option}: {file} is there already, and not by predict; name another "
                + ("folder" if option == "--out" else "file")
                + (" or give --overwrite" if file.is_symlink() or file.is_file() else "")
            )


if __name__ == "__main__":
    sys.exit(main())
