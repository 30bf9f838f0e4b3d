"""Kill a run with SIGKILL at random moments, resume it each time, compare its end.

    python benchmarks/kill_and_resume.py                       # a small synthetic E2EAug, ten kills
    python benchmarks/kill_and_resume.py configs/e2eaug_isic_small.yaml --kills 10 --seed 1

One run goes through untouched; another is killed and resumed until it has been killed often
enough, then left to finish. Everything that a run leaves must agree bit for bit: the weights,
optimizers and random states of ``last.pt``, the weights of ``best.pt``, ``results.json``,
``metrics.jsonl``, ``events.jsonl`` and ``architecture.json``, TensorBoard's curves, pictures; only
the seconds that it took may differ. Exit code 1 if anything else does. Moments are drawn uniformly,
counted from when a process has built or restored everything and starts to train.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlseg import checkpoint, command_line
from mlseg.commands import as_script

CONFIG = Path(__file__).parent.parent / "configs" / "e2eaug_isic_small.yaml"
SMALL = [
    "data.when_missing=synthetic",
    "data.root=/nonexistent",
    "data.image_size=32",
    "data.test=8",
    "segmentor.channels=8",
    "segmentor.levels=2",
    "generator.channels=8",
    "generator.levels=4",
    "gan.pretrain=60",
    "engine.iterations=120",
    "engine.validate_every=20",
    "engine.checkpoint_every=7",
    "device=cpu",
]
"""What makes :data:`CONFIG` run in a minute when no config is given."""
CURVES = "tensorboard"
RECORDS = ("metrics.jsonl", "events.jsonl", "architecture.json", "splits.json", "config.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if the killed run ended as the untouched one."""
    arguments = command_line.parse(_parser(), argv)
    overrides = list(arguments.overrides)
    if arguments.config is None:
        arguments.config, overrides = CONFIG, [*SMALL, *overrides]
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="kill_and_resume_"))
    start = [str(arguments.config), *overrides]
    out = folder / "through"
    process = _mlseg([*start, "--out", str(out)], folder / "through.log")
    _wait_for_training(process, out, None)
    started = time.monotonic()
    code = process.wait()
    if code != 0:
        print(f"the untouched run failed with {code}: see {folder / 'through.log'}")
        return 1
    length = time.monotonic() - started
    print(f"untouched: {length:.0f} s")
    _kill(start, folder, arguments.kills, random.Random(arguments.seed), length)
    different = differences(folder / "through", folder / "killed")
    for key in different:
        print(f"differs: {key}")
    print(f"{arguments.kills} kills: {'different' if different else 'the same, bit for bit'}")
    return 1 if different else 0


def _kill(start: list[str], folder: Path, kills: int, draw: random.Random, length: float) -> None:
    """Run under ``folder/killed``, with ``kills`` kills."""
    out = folder / "killed"
    command = [*start, "--out", str(out)]
    for number in range(1, kills + 1):
        before = _written(out)
        process = _mlseg(command, folder / f"killed_{number}.log")
        _wait_for_training(process, out, before)
        time.sleep(draw.uniform(0.0, 2 * length / (kills + 1)))
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        print(f"kill {number}: {'dead' if code == -signal.SIGKILL else 'already done'} {_at(out)}")
        command = ["--resume", str(out)]
    code = _mlseg(command, folder / "killed_last.log").wait()
    if code != 0:
        raise SystemExit(f"the resumed run failed with {code}: see {folder / 'killed_last.log'}")


def _written(out: Path) -> int | None:
    """When ``config.yaml`` was written, which a process does just before it trains; nanoseconds."""
    path = out / "config.yaml"
    return path.stat().st_mtime_ns if path.exists() else None


def _wait_for_training(process: subprocess.Popen[bytes], out: Path, before: int | None) -> None:
    while process.poll() is None and _written(out) == before:
        time.sleep(0.02)


def _mlseg(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlseg.run", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _at(out: Path) -> str:
    path = out / "checkpoints" / "last.pt"
    if not path.exists():
        return "before its first checkpoint"
    return f"with a checkpoint of step {checkpoint.load(path)['engine']['global_step']}"


def differences(a: Path, b: Path) -> list[str]:
    """Keys and files in which two run directories differ, seconds apart."""
    found = []
    for name in ("last", "best"):
        states = [checkpoint.load(run / "checkpoints" / f"{name}.pt") for run in (a, b)]
        for state in states:
            state["engine"].pop("seconds", None)
            # A count of bytes, seconds written out among them; the lines are compared below.
            state.get("records", {}).get("offsets", {}).pop("metrics.jsonl", None)
        found += [f"{name}.pt: {key}" for key in _unequal(states[0], states[1])]
    results = [json.loads((run / "results.json").read_text()) for run in (a, b)]
    for result in results:
        del result["seconds"]
        result["threads"].pop("chosen_by")  # a resumed run takes those that it began with
    found += [f"results.json: {key}" for key in _unequal(*results)]
    for name in RECORDS:
        if (a / name).exists() and _untimed(a / name) != _untimed(b / name):
            found.append(name)
    files = [
        {p.relative_to(run): p for p in run.rglob("*") if p.is_file() and p.parent.name != CURVES}
        for run in (a, b)
    ]
    found += [f"only in one: {name}" for name in sorted(files[0].keys() ^ files[1].keys())]
    found += [
        str(name)
        for name in sorted(files[0].keys() & files[1].keys())
        if name.suffix == ".png" and files[0][name].read_bytes() != files[1][name].read_bytes()
    ]
    curves = _unequal(_curves(a / CURVES), _curves(b / CURVES))
    return found + [f"{CURVES}: {tag}" for tag in curves]


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves as it shows them: steps and values by tag, but for seconds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    shown.Reload()
    tags = shown.Tags()
    scalars = [tag for tag in tags["scalars"] if not tag.endswith("_seconds")]
    curves = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in scalars}
    return curves | {tag: [(e.step, 0.0) for e in shown.Images(tag)] for tag in tags["images"]}


def _untimed(path: Path) -> Any:
    """A record's content; of its lines without the seconds that hops took."""
    if path.suffix != ".jsonl":
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in lines]


def _unequal(a: Any, b: Any, key: str = "") -> list[str]:
    """Dotted keys at which two nested structures differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = [name for name in a if name in b]
        missing = [f"{key}.{name}" for name in {*a, *b} - set(names)]
        return missing + [k for n in names for k in _unequal(a[n], b[n], f"{key}.{n}".lstrip("."))]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [k for i, (x, y) in pairs for k in _unequal(x, y, f"{key}.{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if torch.equal(a, b) else [key]
    return [] if a == b else [key]


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("config", nargs="?", type=Path)
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    made.add_argument("--kills", type=int, default=10)
    made.add_argument("--seed", type=int, default=0, help="of the moments")
    made.add_argument("--out", type=Path, help="where the runs go (a temporary folder)")
    return made


if __name__ == "__main__":
    raise SystemExit(as_script(main))
