"""The rows of E2EAug's comparison, over seeds, and the table of them.

    OMP_NUM_THREADS=1 python benchmarks/e2eaug_rows.py --out runs/rows --seeds 0 1 2 3 4
    python benchmarks/e2eaug_rows.py --out runs/rows --table          # the table of what is there
    python benchmarks/e2eaug_rows.py --out runs/rows --rows ours vanilla engine.iterations=2000
    python benchmarks/e2eaug_rows.py --out runs/rows --rows ours \\
        --variant fast_alphas ours problems.architecture.optimizer.lr=0.1

Every run is ``python -m mlseg.run`` in a process of its own, with ``seed`` and ``data.split_seed``
both set to the row's seed: the spread is over initial weights, order and split together, and within
a seed all rows share split, initial segmentor and order of its real batches. Segmentor, optimizer,
steps and selection rule come from the two configs and from the overrides, which reach every row.

The GAN is pre-trained once per seed, in a run of its own (row ``pretraining``), for the rows that
begin with the same one: ours, frozen_alphas and separate. gan (no cells) and random_alphas (other
alphas) pre-train their own. A variant is another row with further overrides; it shares the GAN
unless it changes a setting of generator, discriminator or gan.

Calling it again goes on: a finished run (``results.json``) is kept, provided it was made with the
same settings; an interrupted one is resumed.
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
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import rows_table

from mlseg import config, machine
from mlseg.errors import UserError
from mlseg.problems.systems import load_system
from mlseg.run import parse_run


@dataclass(frozen=True)
class Row:
    """One row: a system and what its config says differently.

    Attributes:
        system: which of the two configs.
        overrides: for this row alone.
        shares_gan: begins with the seed's pre-trained GAN.
    """

    system: str
    overrides: list[str] = field(default_factory=list)
    shares_gan: bool = False


FROZEN_GAN = "gan.frozen=true"
ROWS = {
    "vanilla": Row("supervised", ["augmentation=off"]),
    "rotate": Row("supervised", ["augmentation=rotate"]),
    "flip": Row("supervised", ["augmentation=flip"]),
    "translate": Row("supervised", ["augmentation=translate"]),
    "combine": Row("supervised", ["augmentation=combine"]),
    "gan": Row("e2eaug", ["generator.search=none", FROZEN_GAN]),
    "separate": Row("e2eaug", ["architecture.mode=frozen", FROZEN_GAN], shares_gan=True),
    "frozen_alphas": Row("e2eaug", ["architecture.mode=frozen"], shares_gan=True),
    "random_alphas": Row("e2eaug", ["architecture.mode=random"]),
    "ours": Row("e2eaug", [], shares_gan=True),
}
# One iteration of the segmentor after the GAN's, since a run has to have a last stage.
PRETRAINING = Row("e2eaug", [FROZEN_GAN, "engine.iterations=1"])
DEFAULT_ROWS = ["vanilla", "combine", "gan", "separate", "frozen_alphas", "random_alphas", "ours"]
OF_THE_GAN = ("generator.", "discriminator.", "gan.")


class Experiment:
    """Runs rows over seeds below one directory.

    Args:
        out: ``<out>/<row>/seed_<n>`` are the run directories, ``<out>/logs`` what they printed.
        configs: system to config file.
        common: overrides for every row.
        split_follows: whether ``data.split_seed`` is the seed.
    """

    def __init__(
        self, out: Path, configs: dict[str, Path], common: Sequence[str], split_follows: bool
    ) -> None:
        self.out = out
        self.configs = configs
        self.common = list(common)
        self.split_follows = split_follows
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def directory(self, name: str, seed: int) -> Path:
        """Of one run."""
        return self.out / name / f"seed_{seed}"

    def overrides(self, row: Row, seed: int) -> list[str]:
        """All of a run's overrides; those that its system has no place for are left out."""
        split = [f"data.split_seed={seed}"] if self.split_follows else []
        gan = self.directory("pretraining", seed) / "checkpoints" / "gan.pt"
        shared = [f"gan.pretrained={gan}"] if row.shares_gan else []
        common = [text for text in self.common if row.system == "e2eaug" or _is_general(text)]
        return [f"seed={seed}", *split, *common, *shared, *row.overrides]

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
            print(f"{name}, seed {seed}: left out, its GAN is missing", flush=True)
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
                gan = None
                if any(row.shares_gan for row in rows.values()):
                    gan = pool.submit(self.run, "pretraining", PRETRAINING, seed, None)
                    futures.append(gan)
                for name, row in sorted(rows.items(), key=lambda item: item[1].shares_gan):
                    after = gan if row.shares_gan else None
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


def _is_general(override: str) -> bool:
    """Whether the override is for ``supervised`` too: not one of e2eaug's own keys."""
    key = override.partition("=")[0].split(".")
    special = [load_system(name).settings.model_fields for name in ("e2eaug", "supervised")]
    if key[0] == "problems" and len(key) > 1:
        special = [getattr(f["problems"].annotation, "model_fields", {}) for f in special]
        key = key[1:]
    return not (key[0] in special[0] and key[0] not in special[1])


def _figure(directory: Path) -> str:
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    metric = results["metric"]
    parts = [
        f"{which} {results['scores'][which]['test'][metric]:.3f}"
        for which in ("best", "last")
        if "test" in results["scores"].get(which, {})
    ]
    return f"test {metric} {', '.join(parts)}"


def _variants(values: Sequence[Sequence[str]]) -> dict[str, Row]:
    made = {}
    for value in values:
        if len(value) < 3 or value[1] not in ROWS or value[0] in ROWS:
            raise UserError(
                "--variant: give a new NAME, one of the rows, and at least one KEY=VALUE, not "
                + " ".join(value)
            )
        name, base, own = value[0], ROWS[value[1]], list(value[2:])
        shares = base.shares_gan and not any(text.startswith(OF_THE_GAN) for text in own)
        made[name] = replace(base, overrides=[*base.overrides, *own], shares_gan=shares)
    return made


def _remember(out: Path, rows: dict[str, Row], common: Sequence[str], command: str) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--config-dir", type=Path, default=Path("configs"))
    parser.add_argument("--e2eaug", default="e2eaug_isic_small.yaml", help="in --config-dir")
    parser.add_argument("--supervised", default="supervised_isic_small.yaml", help="the same")
    parser.add_argument("--out", type=Path, default=Path("runs/rows"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=DEFAULT_ROWS)
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "ROW KEY=VALUE"),
        help="a further row; put this option last or follow it by another option",
    )
    parser.add_argument(
        "--split-seeds-follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw another split with each seed; with --no-... the configs' split for all",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    # `--rows a b KEY=VALUE` and `--seeds 0 1 KEY=VALUE` leave the overrides to neither option.
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(_overrides_first(given))
    try:
        if not arguments.table:
            finished = _run(arguments, given)
            if not finished:
                return 1
        rows_table.write(arguments.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(arguments: argparse.Namespace, given: Sequence[str]) -> bool:
    rows = {name: ROWS[name] for name in ROWS if name in arguments.rows}
    rows |= _variants(arguments.variant)
    configs = {
        "e2eaug": arguments.config_dir / arguments.e2eaug,
        "supervised": arguments.config_dir / arguments.supervised,
    }
    signal.signal(signal.SIGTERM, _terminated)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    experiment = Experiment(
        arguments.out, configs, arguments.overrides, arguments.split_seeds_follow
    )
    command = f"python benchmarks/e2eaug_rows.py {shlex.join(given)}"
    _remember(arguments.out, rows, arguments.overrides, command)
    return experiment.run_all(rows, arguments.seeds, arguments.jobs)


def _overrides_first(given: Sequence[str]) -> list[str]:
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


if __name__ == "__main__":
    sys.exit(main())
