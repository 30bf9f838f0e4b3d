"""Commands beside training, killed before random operations on files and called again."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

from trials.child import LOGS, Task, call
from trials.disks import whole
from trials.fixtures import Fixtures
from trials.judge import Outcome, clean, expect, files, unchanged


def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """``predict``, ``evaluate``, or decoding into the cache."""
    reference, place, out = fixtures.run(), folder / "place", folder / "out"
    kind = draw.choice(("predict", "evaluate", "cache"))
    run = str(reference.directory)
    if kind == "predict":
        some = str(fixtures.pictures["colour.png"].parent / "*.png")
        task = Task("predict", (run, some, "--out", str(out)), place)
    elif kind == "evaluate":
        run = str(shutil.copytree(reference.directory, folder / "run"))  # it adds to its records
        task = Task("evaluate", (run, "--out", str(out / "scores.json")), place)
    else:
        settings = "data={name: folder, root: %s, image_size: 32, train: 4, val: 2, test: 2}"
        more = ["engine.iterations=1", "engine.tensorboard=false", f"data.cache_dir={out}"]
        begin = (str(reference.config), settings % fixtures.pairs, *more)
        task = Task("run", (*begin, "--out", str(folder / "run")), place)
    most = {"predict": 25, "evaluate": 12, "cache": 12}[kind]
    kills = draw.randint(1, 3)
    but = (out, folder / "run", folder / LOGS)
    before = files(folder, but=but)
    for number in range(kills):
        values = {**vars(task), "name": f"killed_{number}", "die_at": draw.randint(1, most)}
        killed = call(Task(**values))
        refused = "holds a run already" in killed.error
        clean(killed, (0, 2) if refused else (0, -signal.SIGKILL), lines=False)
        for path in out.rglob("*.png") if kind == "predict" else ():
            if not path.name.startswith("."):
                expect(path.stat().st_size > 0, f"{path.name} is empty")
    if kind == "cache":
        begin_anew = (*begin, "--out", str(folder / "again"))
        ended = call(Task("run", begin_anew, place))
        clean(ended, (0,))
        expect(len(list(out.iterdir())) == 3, f"{len(list(out.iterdir()))} folders in the cache")
        return Outcome("right", kills=kills)
    clean(call(task), (0,))
    unchanged(before, files(folder, but=but))
    if kind == "predict":
        whole(out)
    else:
        record = Path(run, "evaluation.json")
        for path in (out / "scores.json", record):
            json.loads(path.read_text(encoding="utf-8"))
        rests = [path.name for path in Path(run).rglob("*.partial")]
        expect(not rests, f"{rests} are left")
    return Outcome("right", kills=kills)
