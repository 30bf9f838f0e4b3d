"""Disks that are full: a bound on the size of files, a small file system, a full output."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mlseg.segmentation.data.cache import PARTIAL
from trials.child import Ended, Task, call
from trials.fixtures import Fixtures
from trials.judge import Outcome, clean, expect, failures
from trials.kills import finishing, same


def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """A run, or ``predict``, that can't write any more; and once more when there is room."""
    kind = draw.choice(("files", "files", "disk", "output", "predict", "cache"))
    if kind == "disk":
        return _disk(draw, folder, fixtures)
    if kind == "output":
        return _output(draw, folder, fixtures)
    if kind == "predict":
        return _predict(draw, folder, fixtures)
    if kind == "cache":
        return _cache(draw, folder, fixtures)
    reference = fixtures.run(draw.choice(["supervised", *fixtures.systems]))
    out, place = folder / "run", folder / "place"
    largest = max(p.stat().st_size for p in reference.directory.rglob("*") if p.is_file())
    size = int(largest ** draw.uniform(0.0, 1.05))
    begin = (str(reference.config), "--out", str(out))
    ended = call(Task("run", begin, place, "full", file_size=size))
    return _then(ended, reference.config, reference.directory, out, place)


def _then(ended: Ended, config: Path, reference: Path, out: Path, place: Path) -> Outcome:
    """Check how a run without room has ended; then it goes on with room enough."""
    clean(ended)
    expect(ended.code != 2, "a full disk is no mistake in the command")
    expect(not list(out.rglob("*.partial")), "a partial file is left")
    clean(call(finishing(config, out, place)), (0,))
    same(reference, out)
    return Outcome("refused" if ended.code else "right")


def _disk(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    reference = fixtures.run(draw.choice(["supervised", *fixtures.systems]))
    place, disk = folder / "place", folder / "disk"
    total = sum(p.stat().st_size for p in reference.directory.rglob("*") if p.is_file())
    with small_disk(disk, int(draw.uniform(0.02, 1.3) * total)) as mounted:
        if not mounted:
            return Outcome("skipped", "small file systems need root and mount")
        out = disk / "run"
        begin = (str(reference.config), "--out", str(out))
        ended = call(Task("run", begin, place, "full"))
        # What couldn't be begun is begun again; what is there is as if the disk had grown.
        if not out.exists():
            clean(ended, (1, 2))
            return Outcome("refused")
        shutil.copytree(out, folder / "run")
    return _then(ended, reference.config, reference.directory, folder / "run", place)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of so many bytes; False where there can't be one."""
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(folder)]
    made = (
        bool(mount)
        and not subprocess.run(
            [mount or "mount", *options], capture_output=True, check=False
        ).returncode
    )
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", str(folder)], check=True)


def _output(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """Standard output that takes nothing, or that nobody reads."""
    reference = fixtures.run()
    out, place = folder / "run", folder / "place"
    where = draw.choice(("/dev/full", "pipe"))
    begin = (str(reference.config), "--out", str(out))
    ended = call(Task("run", begin, place, stdout=where))
    clean(ended, (1,) if where == "/dev/full" else (0,))
    same(reference.directory, out)
    return Outcome("refused" if ended.code else "right")


def _predict(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    run, out, place = fixtures.run().directory, folder / "out", folder / "place"
    given = fixtures.pictures["colour.png"].parent
    some = str(given / draw.choice(("*.png", "*.tif")))
    task = Task("predict", (str(run), some, "--out", str(out)), place)
    size = draw.randint(1, 4000)
    ended = call(Task(**{**vars(task), "file_size": size}))
    clean(ended)
    whole(out)
    clean(call(task), (0,))
    whole(out)
    return Outcome("refused" if ended.code else "right")


def whole(out: Path) -> None:
    """Check that a folder holds whole pictures and nothing else."""
    for path in out.rglob("*"):
        expect(path.suffix == ".png", f"{path.name} is left")
        with Image.open(path) as image:
            image.load()


def _cache(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    cache, place = folder / "cache", folder / "place"
    with small_disk(cache, draw.choice((4096, 8192, 16384, 32768, 65536))) as mounted:
        if not mounted:
            return Outcome("skipped", "small file systems need root and mount")
        settings = "data={name: folder, root: %s, image_size: 32, train: 4, val: 2, test: 2}"
        more = ["engine.iterations=2", "engine.tensorboard=false", f"data.cache_dir={cache}"]
        config, root = str(fixtures.run().config), fixtures.pairs
        begin = (config, settings % root, *more, "--out", str(folder / "run"))
        ended = call(Task("run", begin, place))
        clean(ended)
        # The folder of a split that was decoded whole stays: it is of use.
        left = [path.name for path in cache.iterdir() if path.name.endswith((PARTIAL, ".lock"))]
        expect(not left, f"of a failed decoding are left: {left}")
    return Outcome("refused" if ended.code else "right", " ".join(failures(ended)))
