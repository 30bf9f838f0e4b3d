"""Rows of a comparison over seeds: every run in a process of its own, resumed where it stopped.

Shared by ``e2eaug_rows.py`` and ``segan_rows.py``, whose tables differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlseg import config, machine
from mlseg.errors import UserError
from mlseg.problems.systems import load_system
from mlseg.run import parse_run


@dataclass(frozen=True)
class Row:
    """One row: a system and what its config says differently.

    Attributes:
        system: which of the configs.
        overrides: for this row alone.
        after: begins with what the seed's prelude has made.
    """

    system: str
    overrides: list[str] = field(default_factory=list)
    after: bool = False


@dataclass(frozen=True)
class Prelude:
    """A run, once per seed, that rows begin with.

    Attributes:
        name: of its row.
        row: what it is.
        override: from its run directory to the override by which a row takes it up.
    """

    name: str
    row: Row
    override: Callable[[Path], str]


class Experiment:
    """Runs rows over seeds below one directory.

    Args:
        out: ``<out>/<row>/seed_<n>`` are the run directories, ``<out>/logs`` what they printed.
        configs: system to config file.
        common: overrides for every row.
        split_follows: whether ``data.split_seed`` is the seed.
        prelude: what rows with ``after`` begin with.
    """

    def __init__(
        self,
        out: Path,
        configs: Mapping[str, Path],
        common: Sequence[str],
        split_follows: bool,
        prelude: Prelude | None = None,
    ) -> None:
        self.out = out
        self.configs = configs
        self.common = list(common)
        self.split_follows = split_follows
        self.prelude = prelude
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def directory(self, name: str, seed: int) -> Path:
        """Of one run."""
        return self.out / name / f"seed_{seed}"

    def overrides(self, row: Row, seed: int) -> list[str]:
        """All of a run's overrides; those that its system has no place for are left out."""
        split = [f"data.split_seed={seed}"] if self.split_follows else []
        shared = []
        if row.after and self.prelude is not None:
            shared = [self.prelude.override(self.directory(self.prelude.name, seed))]
        common = [text for text in self.common if self._has_place(row.system, text)]
        return [f"seed={seed}", *split, *common, *shared, *row.overrides]

    def _has_place(self, system: str, override: str) -> bool:
        """Whether a common override is for a system: its key is one of its, or of none's."""
        places = {name: _has_key(name, override) for name in self.configs}
        return places[system] or not any(places.values())

    def settings(self, row: Row, seed: int) -> dict[str, Any]:
        """The resolved config of a run.

        Raises:
            UserError: an override is wrong.
        """
        tree = config.load(self.configs[row.system], self.overrides(row, seed))
        return parse_run(tree)[0].model_dump(mode="json")

    def run(self, name: str, row: Row, seed: int, after: Future[bool] | None) -> bool:
        """Bring one run to its end; False if it failed, which has been said."""
        directory = self.directory(name, seed)
        if after is not None and not after.result():
            print(f"{name}, seed {seed}: left out, what it begins with is missing", flush=True)
            return False
        if (directory / "config.yaml").exists():
            stored = parse_run(config.load(directory / "config.yaml"))[0].model_dump(mode="json")
            if stored != self.settings(row, seed):
                raise UserError(
                    f"{directory} holds a run with other settings; choose another --out, or "
                    "remove that run"
                )
            if (directory / "results.json").exists():
                return True
            where = ["--resume", str(directory)]
        else:
            source, overrides = self.configs[row.system], self.overrides(row, seed)
            where = [str(source), *overrides, "--out", str(directory)]
        started = time.monotonic()
        code, log = self._call(f"{name}_{seed}", [sys.executable, "-m", "mlseg.run", *where])
        minutes = (time.monotonic() - started) / 60
        if code == 0:
            print(f"{name}, seed {seed}: {minutes:.1f} min, {_figure(directory)}", flush=True)
        elif not self._stopping:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no output"]
            print(f"{name}, seed {seed}: exit code {code}: {last[0]} (see {log})", flush=True)
        return code == 0

    def _call(self, name: str, command: list[str]) -> tuple[int, Path]:
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            with self._lock:
                if self._stopping:
                    return -1, log
                # Its own session: Ctrl-C comes to this process, which passes one signal on.
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        return code, log

    def stop(self) -> None:
        """Have the present runs save and end; none is started any more."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.terminate()

    def run_all(self, rows: dict[str, Row], seeds: Sequence[int], jobs: int) -> bool:
        """Run them all, seed by seed; whether every one has finished."""
        for row in rows.values():
            self.settings(row, seeds[0])  # a wrong override is told before any work
        pool = ThreadPoolExecutor(jobs)
        futures: list[Future[bool]] = []
        try:
            for seed in seeds:
                # Tasks start in this order, so that one that waits never blocks what it waits for.
                first, prelude = None, self.prelude
                if prelude is not None and any(row.after for row in rows.values()):
                    first = pool.submit(self.run, prelude.name, prelude.row, seed, None)
                    futures.append(first)
                for name, row in sorted(rows.items(), key=lambda item: item[1].after):
                    after = first if row.after else None
                    futures.append(pool.submit(self.run, name, row, seed, after))
            wait(futures)
        except KeyboardInterrupt:
            print("stopping: the present runs save; the same command goes on", flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()
            raise
        finally:
            pool.shutdown()
        finished = [future.result() for future in futures]
        return all(finished)


def _has_key(system: str, override: str) -> bool:
    """Whether a system's settings have the first key of an override, and the level it names."""
    key = override.partition("=")[0].split(".")
    fields = load_system(system).settings.model_fields
    if key[0] == "problems" and len(key) > 1:
        return key[1] in getattr(fields["problems"].annotation, "model_fields", {})
    return key[0] in fields


def _figure(directory: Path) -> str:
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    metric = results["metric"]
    parts = [
        f"{which} {results['scores'][which]['test'][metric]:.3f}"
        for which in ("best", "last")
        if "test" in results["scores"].get(which, {})
    ]
    return f"test {metric} {', '.join(parts)}"


def variants(
    values: Sequence[Sequence[str]], rows: Mapping[str, Row], of_the_prelude: Sequence[str] = ()
) -> dict[str, Row]:
    """Further rows from the option ``--variant``.

    Args:
        values: each NAME ROW KEY=VALUE ...
        of_the_prelude: beginnings of keys which, once changed, forbid to take the prelude up.

    Raises:
        UserError: one isn't of that form.
    """
    made = {}
    for value in values:
        if len(value) < 3 or value[1] not in rows or value[0] in rows:
            raise UserError(
                "--variant: give a new NAME, one of the rows, and at least one KEY=VALUE, not "
                + " ".join(value)
            )
        name, base, own = value[0], rows[value[1]], list(value[2:])
        after = base.after and not any(text.startswith(tuple(of_the_prelude)) for text in own)
        made[name] = replace(base, overrides=[*base.overrides, *own], after=after)
    return made


def remember(out: Path, rows: dict[str, Row], common: Sequence[str], command: str) -> None:
    """Keep in ``rows.json`` what was asked for, for the head of the table."""
    path = out / "rows.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known.setdefault("rows", {}).update({name: asdict(row) for name, row in rows.items()})
    entry = f"{command}  (at {machine.revision()})"
    commands = known.setdefault("commands", [])
    if entry not in commands:
        commands.append(entry)
    known["common"] = list(common)
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def add_arguments(parser: argparse.ArgumentParser, rows: Sequence[str], seeds: int) -> None:
    """Arguments that every comparison has."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--config-dir", type=Path, default=Path("configs"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--rows", nargs="+", choices=list(rows), default=list(rows))
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "ROW KEY=VALUE"),
        help="a further row; put this option last or follow it by another option",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")


def run(
    experiment: Experiment, rows: dict[str, Row], seeds: Sequence[int], jobs: int, command: str
) -> bool:
    """Run rows with one thread each, unless OMP_NUM_THREADS says otherwise; SIGTERM is Ctrl-C.

    Args:
        command: what was typed, for the head of the table.
    """
    signal.signal(signal.SIGTERM, _terminated)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    remember(experiment.out, rows, experiment.common, command)
    return experiment.run_all(rows, seeds, jobs)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of ``work``; a mistake is one line and 2, an interruption 130."""
    try:
        return work()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def typed(script: str, given: Sequence[str]) -> str:
    """The command as it was typed."""
    return f"python benchmarks/{script} {shlex.join(given)}"


def overrides_first(given: Sequence[str]) -> list[str]:
    """Move overrides that stand behind ``--rows`` or ``--seeds`` to the front."""
    front: list[str] = []
    rest: list[str] = []
    option = ""
    for text in given:
        if text.startswith("--"):
            option = text
        moved = "=" in text and not text.startswith("--") and option in ("--rows", "--seeds")
        (front if moved else rest).append(text)
    return [*front, *rest]
