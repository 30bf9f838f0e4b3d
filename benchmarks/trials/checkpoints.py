"""Checkpoints of strangers: damaged bytes, odd values, code in the place of data."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from mlseg import checkpoint
from trials.child import LOGS, Task, call
from trials.fixtures import Fixtures
from trials.judge import Failure, Outcome, clean, expect, files, unchanged
from trials.kills import same
from trials.mutations import changed, damaged


class Code:
    """What a pickle would run."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """A run with another ``last.pt``, resumed; or with another ``best.pt``, used."""
    reference = fixtures.run(draw.choice(["supervised", *fixtures.systems]))
    place, run, out = folder / "place", folder / "run", folder / "out"
    shutil.copytree(reference.directory, run)
    precious = folder / "precious.txt"
    precious.write_text("precious\n" * 9, encoding="utf-8")
    name = draw.choice(("last", "best"))
    path = run / "checkpoints" / f"{name}.pt"
    meant = _damage(draw, path, folder)
    but = (run, out, folder / LOGS)
    before = files(folder, but=but)
    if name == "last":
        if draw.random() < 0.5:
            (run / "results.json").unlink()
        task = Task("run", ("--resume", str(run)), place)
    elif draw.random() < 0.5:
        given = str(fixtures.pictures["colour.png"])
        task = Task("predict", (str(run), given, "--out", str(out)), place)
    else:
        task = Task("evaluate", (str(run), "--out", str(out / "scores.json")), place)
    try:
        ended = call(task)
        clean(ended)
        unchanged(before, files(folder, but=but))
        if ended.code == 0 and meant is None and name == "last":
            same(reference.directory, run)
    except Failure as failure:
        raise Failure(f"{failure} [{meant or 'bytes'}]") from None
    if ended.code == 0 and meant is None:
        # What loads in spite of damage must be what was written.
        original = checkpoint.load(reference.directory / "checkpoints" / f"{name}.pt")
        expect(_same(checkpoint.load(path), original), "damage was loaded unnoticed")
    return Outcome("refused" if ended.code else "right")


def _damage(draw: random.Random, path: Path, folder: Path) -> str | None:
    """Change a checkpoint; None where only bytes were, so that it has to be noticed or is none."""
    kind = draw.random()
    if kind < 0.4:
        path.write_bytes(damaged(draw, path.read_bytes()))
        return None
    if kind < 0.9:
        state, said = changed(draw, checkpoint.load(path), tensors=True)
        try:
            if not isinstance(state, dict):
                raise TypeError
            checkpoint.save(path, state)
        except Exception:  # noqa: BLE001, what it doesn't take is written all the same
            torch.save(state, path)
        return "; ".join(said)
    if kind < 0.95:
        state = {**checkpoint.load(path), draw.choice(("engine", "x")): Code(str(folder / "ran"))}
        content = io.BytesIO()
        torch.save(state, content)
        raw = pickle.dumps(state["x"] if "x" in state else state["engine"])
        path.write_bytes(draw.choice((content.getvalue(), raw)))
        return "code"
    _bomb(draw, path)
    return "an archive that grows"


def _bomb(draw: random.Random, path: Path) -> None:
    """The same archive, compressed, with a member of zeros."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    victim = draw.choice(sorted(members))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, b"\0" * 5 * 2**28 if name == victim else content)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
