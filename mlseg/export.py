"""Write a trained model as a file for other programs, checked against mlseg's own prediction.

    python -m mlseg.export runs/try                               onnx, to runs/try/segmentor.onnx
    python -m mlseg.export runs/try --format torchscript --out lesions.ts
    python -m mlseg.export runs/try --format torch                weights and description
    python -m mlseg.export runs/try --what generator              of E2EAug: mask in, image out

``onnx`` and ``torchscript`` take images of any size as bytes and give probabilities and a mask:
resizing or padding, normalisation, windows, softmax and threshold are inside. ``torch`` is for
``mlseg.load``. Beside the file stands FILE.json: class names, threshold, shapes, where it comes
from, how it was checked. What differs from mlseg's own prediction by more than 1e-5 in
probabilities isn't written.

Nothing is overwritten but an earlier export; with ``--overwrite`` any file outside the run.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlseg import signals, threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded
    signals.end_at_once()

from mlseg import config
from mlseg.commands import guarded, make_console, named
from mlseg.errors import UserError
from mlseg.evaluate import above_zero, add_trust, probability
from mlseg.files import replacing, require_file, require_writable, writing
from mlseg.segmentation.exporting import SOFTWARE, SUFFIXES, Source, find, require, write
from mlseg.segmentation.trained import run_threads


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(prog="mlseg export", description="Write a trained model.")
    made.add_argument("run", type=named, metavar="RUN", help="run directory")
    made.add_argument("--out", type=named, metavar="FILE", help="default: RUN/WHAT, by its format")
    made.add_argument(
        "--format", default="onnx", metavar="FORMAT", help=f"{', '.join(SUFFIXES)}; default: onnx"
    )
    made.add_argument(
        "--what", default="segmentor", help="segmentor, or what the run's system has besides"
    )
    made.add_argument("--weights", choices=("best", "last"), default="best")
    made.add_argument("--k", type=above_zero, help="temperature; default: the calibrated or own")
    made.add_argument("--threshold", type=probability, help="default: the same")
    made.add_argument(
        "--precision", choices=("fp32",), help="of a run that predicts in bfloat16, as an export"
    )
    made.add_argument("--overwrite", action="store_true", help="also a file that isn't an export")
    add_trust(made)
    threads.add_flag(made)
    return made


def _run(arguments: argparse.Namespace) -> int:
    run, form = arguments.run, arguments.format
    if form not in SUFFIXES:
        raise UserError(f"--format {form}: no such format; there are {', '.join(SUFFIXES)}")
    if run.is_file():
        raise UserError(f"{run}: a file; name the run directory that its weights are of")
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    path = arguments.out or run / f"{arguments.what}{SUFFIXES[form]}"
    check_output(path, run, arguments.overwrite)
    require(form)
    run_threads(run, arguments.threads).use()
    source = Source(
        run,
        form,
        arguments.weights,
        arguments.k,
        arguments.threshold,
        full_precision=arguments.precision == "fp32",
    )
    thing = find(arguments.what, _system(run), source)
    with writing(path), ExitStack() as both:
        beside = both.enter_context(replacing(sidecar(path)))
        temporary = both.enter_context(replacing(path))
        facts = write(thing, form, temporary, run)
        about = {"file": path.name, "what": arguments.what, "run": str(run), **facts}
        about["weights"] = arguments.weights
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(about, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # Both are whole; one without the other would be nobody's, and in the way of the next.
        with signals.held_back():
            both.pop_all().close()
    checked = facts["checked"]
    make_console().print(
        f"{path}: {form}, {path.stat().st_size / 2**20:.1f} MiB; differs from mlseg's own by "
        f"{checked['largest_difference']:.1e} at most\n{sidecar(path)}: what a program has to know"
    )
    return 0


def _system(run: Path) -> str | None:
    path = run / "config.yaml"
    found = config.load(path).values.get("system") if path.is_file() else None
    return found if isinstance(found, str) else None


def sidecar(path: Path) -> Path:
    """Where an export is described."""
    return path.with_name(f"{path.name}.json")


def check_output(path: Path, run: Path, overwrite: bool = False) -> None:
    """Refuse to write over what isn't an earlier export.

    Raises:
        UserError: something else is there, or nothing can be written.
    """
    require_writable(path)
    about = sidecar(path)
    known = _described(about)
    for file, own in ((path, known is not None and known == _digest(path)), (about, known)):
        if not os.path.lexists(file):
            continue
        if file.is_dir():
            raise UserError(f"--out: {file} is a folder; name a file")
        inside = Path(os.path.realpath(run)) in Path(os.path.realpath(file)).parents
        if not own and (inside or not overwrite or not (file.is_file() or file.is_symlink())):
            mend = "" if inside else " or give --overwrite"
            raise UserError(
                f"--out: {file} is there already, and not by export; name another file{mend}"
            )


def _described(about: Path) -> str | None:
    """The digest that a sidecar of an earlier call gives; None where there is none."""
    try:
        if about.is_symlink():
            return None
        require_file(about, 2**24)
        found: Any = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    own = isinstance(found, dict) and found.get("software") == SOFTWARE
    return str(found.get("sha256")) if own else None


def _digest(path: Path) -> str | None:
    try:
        if path.is_symlink():
            return None
        require_file(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
