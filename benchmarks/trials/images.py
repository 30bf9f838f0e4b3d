"""Images, masks and folders of them that are damaged, or something else under an image's name."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from trials.child import LOGS, Task, call
from trials.fixtures import Fixtures
from trials.judge import Outcome, clean, expect, failures, files, unchanged
from trials.mutations import damaged

GOOD = "z_good"
"""Comes after the damaged one: a bad image doesn't end a folder."""


def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """One damaged file: among images to segment, or among those to train on."""
    if draw.random() < 0.75:
        return _predicted(draw, folder, fixtures)
    return _trained_on(draw, folder, fixtures)


def _predicted(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    run = fixtures.run().directory
    given, out = folder / "given", folder / "out"
    given.mkdir()
    shutil.copy(fixtures.pictures["colour.png"], given / f"{GOOD}.png")
    _put_bad(draw, given / "bad", fixtures)
    before = files(folder, but=(out, folder / LOGS))
    task = Task("predict", (str(run), str(given), "--out", str(out)), given)
    ended = call(task)
    clean(ended, lines=False)
    unchanged(before, files(folder, but=(out, folder / LOGS)))
    made = {path.stem for path in out.iterdir()} if out.is_dir() else set()
    if ended.code == 2:  # the folder was refused before any work
        expect(len(failures(ended)) == 1 and not made, "refused, and not in one line")
        return Outcome("refused")
    expect(GOOD in made, "the image beside the damaged one was left out")
    done = "bad" in made or not any(path.stem == "bad" for path in given.iterdir())
    said = failures(ended)
    if ended.code == 0:
        expect(not said, f"exit code 0 and {said[:1]}")
        with Image.open(out / f"{GOOD}.png") as mask:
            expect(mask.size == (40, 30), f"a mask of {mask.size}")
        return Outcome("right")
    # A line for the file, and one at the end that counts them.
    kinds = [line.partition(":")[0] for line in said]
    expect(kinds == ["error", "failed"] and not done, f"exit code {ended.code}, lines {said[:3]}")
    expect("bad" in said[0], f"names no file: {said[0]}")
    return Outcome("refused")


def _trained_on(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    given, out = folder / "given", folder / "run"
    shutil.copytree(fixtures.pairs, given)
    path = draw.choice(sorted(given.glob("*/*")))
    if draw.random() < 0.7:
        path.write_bytes(damaged(draw, path.read_bytes()))
    else:
        path.unlink()
        _odd(draw, path)
    settings = f"data={{name: folder, root: {given}, image_size: 32, train: 4, val: 2, test: 2}}"
    more = ["engine.iterations=2", "engine.validate_every=0", "engine.tensorboard=false"]
    if draw.random() < 0.5:
        more.append(f"data.cache_dir={folder / 'cache'}")
    own = (out, folder / "cache", folder / LOGS)
    before = files(folder, but=own)
    config = str(fixtures.run().config)
    ended = call(Task("run", (config, settings, *more, "--out", str(out)), folder / "given"))
    clean(ended)
    unchanged(before, files(folder, but=own))
    return Outcome("refused" if ended.code else "right")


def _put_bad(draw: random.Random, path: Path, fixtures: Fixtures) -> None:
    if draw.random() < 0.85:
        name = draw.choice(sorted(fixtures.pictures))
        source = fixtures.pictures[name]
        content = damaged(draw, source.read_bytes())
        suffix = source.suffix if draw.random() < 0.8 else draw.choice((".png", ".jpg", ".tif"))
        path.with_suffix(suffix).write_bytes(content)
    else:
        _odd(draw, path.with_suffix(draw.choice((".png", ".jpg", ".tif", ".gif"))))


def _odd(draw: random.Random, path: Path) -> None:
    """Something else under this name."""
    kind = draw.randrange(9)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.symlink_to("nowhere")
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.symlink_to(draw.choice(("/dev/zero", "/dev/full", "/dev/null", "/")))
    elif kind == 5:
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    elif kind == 6:
        Image.fromarray(np.zeros((13000, 13000), np.uint8)).save(path, "PNG", compress_level=1)
    elif kind == 7:
        path.write_bytes(draw.choice((b"", b"<svg/>", b"PK\x03\x04", draw.randbytes(300))))
    else:
        shape = draw.choice(((1, 1), (1, 4000), (4000, 1), (7, 3)))
        Image.fromarray(np.full(shape, draw.randrange(256), np.uint8)).save(path, "PNG")
