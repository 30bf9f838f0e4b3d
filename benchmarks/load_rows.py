"""Rows of LoAd over seeds, and the table of them: a grid that a YAML file describes.

    python benchmarks/load_rows.py configs/load_camvid_small_seeds.yaml --out runs/load_seeds
    python benchmarks/load_rows.py configs/load_ablation.yaml --out runs/load_ablation
    python benchmarks/load_rows.py configs/load_ablation.yaml --out runs/load_ablation --table

The file names a config, seeds, and rows: overrides of that config. A row may begin with the start
model of another row (``start_of``), so that stage 1 is trained once, and be the control with as
many further cross-entropy updates as another row has made (``updates_of``).

Every run is ``python -m mlseg.run`` in a process of its own. Calling this again goes on: a finished
run (``results.json``) is kept, an interrupted one is resumed; with other settings than the grid
asks for, or from a start model that has been made anew since, neither is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import NonNegativeInt

from mlseg import config, machine
from mlseg.config import Settings
from mlseg.errors import UserError
from mlseg.files import write_json, write_text
from mlseg.problems.load.records import read_events
from mlseg.run import parse_run

SPLITS = ("val", "val_hold_out", "val_rest", "test")
CLASS_SPLITS = ("test", "val_rest")
TAKEN = ("start", "control", "threads")  # what a row takes from another row's run, or a machine


class RowSettings(Settings):
    """One row.

    Attributes:
        overrides: of the grid's config.
        start_of: another row, run before, whose start model this one begins with.
        updates_of: another row; this one makes as many cross-entropy updates instead of LoAd's.
    """

    overrides: list[str] = []
    start_of: str | None = None
    updates_of: str | None = None


class GridSettings(Settings):
    """A grid.

    Attributes:
        config: file, relative to the grid's.
        seeds: each row is run with each of them.
        rows: by name, in the order in which they are run.
    """

    config: str
    seeds: list[NonNegativeInt] = [0]
    rows: dict[str, RowSettings]


class Grid:
    """Runs a grid's rows below ``out``: ``<out>/<row>/seed_<n>``."""

    def __init__(self, path: Path, out: Path, common: Sequence[str], seeds: list[int] | None):
        self.settings = config.parse(GridSettings, config.load(path))
        self.source = path.parent / self.settings.config
        self.out = out
        self.common = list(common)
        self.seeds = seeds or self.settings.seeds
        known: list[str] = []
        for name, row in self.settings.rows.items():
            for key in ("start_of", "updates_of"):
                other = getattr(row, key)
                if other is not None and other not in known:
                    raise UserError(f"{path}: rows.{name}.{key}: {other!r} is no row above it")
            known.append(name)
            # A wrong override is told before any work.
            parse_run(config.load(self.source, [*self.common, *row.overrides]))

    def directory(self, name: str, seed: int) -> Path:
        """Of one run."""
        return self.out / name / f"seed_{seed}"

    def overrides(self, name: str, seed: int) -> list[str]:
        """Of the config, for one run, without what it takes from another row's."""
        return [f"seed={seed}", *self.common, *self.settings.rows[name].overrides]

    def command(self, name: str, seed: int) -> list[str]:
        """That runs a row, or goes on with it."""
        directory, row = self.directory(name, seed), self.settings.rows[name]
        if (directory / "config.yaml").exists():
            return ["--resume", str(directory)]
        overrides = self.overrides(name, seed)
        if row.start_of is not None:
            start = self.directory(row.start_of, seed) / "checkpoints" / "start.pt"
            overrides.append(f"start={start}")
        if row.updates_of is not None:
            other = self.directory(row.updates_of, seed) / "results.json"
            overrides.append(f"control={json.loads(other.read_text())['updates']}")
        return [str(self.source), *overrides, "--out", str(directory)]

    def check(self) -> None:
        """That every run found belongs to this grid, so that no table mixes settings.

        Raises:
            UserError: one has other settings, has been cut off, or begins with another start model
                or makes other updates than the run that it is to be compared with.
        """
        for name in self.settings.rows:
            for seed in self.seeds:
                path = self.directory(name, seed) / "config.yaml"
                if not path.exists():
                    continue
                asked = config.load(self.source, self.overrides(name, seed))
                before, now = (
                    parse_run(tree)[0].model_dump(mode="json")
                    for tree in (config.load(path), asked)
                )
                changed = [key for key in config.differences(before, now) if key not in TAKEN]
                if changed:
                    raise UserError(
                        f"{path}: {changed[0]} is not what this grid asks for; name another --out, "
                        f"or remove {path.parent}"
                    )
                self._check_result(name, seed)

    def _check_result(self, name: str, seed: int) -> None:
        row, result = self.settings.rows[name], self.result(name, seed)
        if result is None:
            return
        wrong = []
        if not result["stopped_early"]:
            wrong.append("engine.iterations has cut it off")
        start = self.result(row.start_of, seed) if row.start_of else None
        if start is not None and start["models"]["start"] != result["models"]["start"]:
            wrong.append(f"{row.start_of} has another start model by now")
        other = self.result(row.updates_of, seed) if row.updates_of else None
        if other is not None and other["updates"] != result["updates"]:
            wrong.append(f"{result['updates']} updates, {row.updates_of} has {other['updates']}")
        if wrong:
            directory = self.directory(name, seed)
            raise UserError(f"{directory}: {'; '.join(wrong)}; remove it to run it again")

    def result(self, name: str, seed: int) -> dict[str, Any] | None:
        """Of a run; None if it hasn't finished."""
        path = self.directory(name, seed) / "results.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def run(self) -> None:
        """Bring every run to its end, seed by seed.

        Raises:
            UserError: one failed; its log is named.
        """
        for seed in self.seeds:
            for name in self.settings.rows:
                if self.result(name, seed) is not None:
                    continue
                log = self.out / "logs" / f"{name}_{seed}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("wb") as file:
                    code = _call(["-m", "mlseg.run", *self.command(name, seed)], file)
                if code:
                    said = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
                    raise UserError(f"{name}, seed {seed}: exit code {code}: {said} (see {log})")
                print(f"{name}, seed {seed}: done", flush=True)

    # --------------------------------------------------------------------- table

    def found(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Results of the finished runs, by row and seed."""
        result: dict[str, dict[int, dict[str, Any]]] = {}
        for name in self.settings.rows:
            for seed in self.seeds:
                if (finished := self.result(name, seed)) is not None:
                    result.setdefault(name, {})[seed] = finished
        if not result:
            raise UserError(f"no run below {self.out} has finished yet")
        for key in ("provenance", "data", "split_hash"):
            values = {str(r[key]) for seeds in result.values() for r in seeds.values()}
            if len(values) > 1:
                raise UserError(f"the runs differ in {key}; keep them apart")
        return result

    def changes(self, name: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
        """``classes.json`` of a row's finished runs."""
        paths = (self.directory(name, seed) / "classes.json" for seed in seeds)
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def cycles(self, name: str, seeds: Iterable[int]) -> dict[int, list[dict[str, Any]]]:
        """How each cycle of a row's finished runs ended; nothing for a control."""
        found = {}
        for seed in seeds:
            events = read_events(self.directory(name, seed))
            found[seed] = [event for event in events if event["event"] == "cycle_end"]
        return found if any(found.values()) else {}

    def write(self, command: str) -> None:
        """Write ``table.md`` and ``table.json``; print the first."""
        found = self.found()
        some = next(iter(next(iter(found.values())).values()))
        rows = {name: _row(list(seeds.values())) for name, seeds in found.items()}
        head = machine.describe()
        lines = [f"# LoAd on {some['data']}, {some['provenance']} images", "", machine.head(head)]
        lines += [f"- runs on: {some['device']}", f"- command: `{command}`"]
        for name, row in self.settings.rows.items():
            if name in found:
                said = " ".join(f"`{text}`" for text in row.overrides)
                said += f" from the start of {row.start_of}" if row.start_of else ""
                said += f", as many updates as {row.updates_of}" if row.updates_of else ""
                lines.append(f"- {name}: {said.strip() or 'as configured'}")
        lines += _scores(rows, {name: sorted(seeds) for name, seeds in found.items()})
        lines += _cycles({name: self.cycles(name, seeds) for name, seeds in found.items()})
        lines += _classes({name: self.changes(name, seeds) for name, seeds in found.items()})
        write_json(self.out / "table.json", {"machine": head, "rows": rows})
        write_text(self.out / "table.md", "\n".join(lines) + "\n")
        print("\n".join(lines))


def _call(arguments: Sequence[str], log: BinaryIO) -> int:
    """Run Python; its exit code. Ctrl-C reaches it as well: it is given the time to save."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def _row(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "updates": _spread([r["updates"] for r in results]),
        "cycles": _spread([r["cycles"] for r in results]),
        "seconds": _spread([r["seconds"] for r in results]),
    }
    for split in SPLITS:
        if not all(split in r["scores"]["start"] for r in results):
            continue
        start, best = (
            [100 * r["scores"][which][split]["miou"] for r in results]
            for which in ("start", "best")
        )
        gains = [b - a for a, b in zip(start, best, strict=True)]
        row[split] = {"start": _spread(start), "best": _spread(best), "gain": _spread(gains)}
    return row


def _scores(rows: Mapping[str, Any], seeds: Mapping[str, Sequence[int]]) -> list[str]:
    lines: list[str] = []
    for split in SPLITS:
        if not any(split in row for row in rows.values()):
            continue
        lines += ["", f"## mIoU, {split}, per cent: mean ± standard deviation over seeds", ""]
        head = ["row", "seeds", "start", "final", "gain", "updates", "cycles", "seconds"]
        body = [
            [name, str(len(seeds[name]))]
            + [_show(row[split][key], 2, "+" if key == "gain" else "") for key in row[split]]
            + [_show(row[key], 0) for key in ("updates", "cycles", "seconds")]
            for name, row in rows.items()
            if split in row
        ]
        lines += _table(head, body)
    return lines


def _cycles(ends: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """Of each run: how many cycles ended how, how long they were, which of them had a peak.

    Args:
        ends: ``cycle_end`` events by row and seed.
    """
    rows = []
    for name, seeds in ends.items():
        for seed, cycles in seeds.items():
            stops = [cycle["update"] for cycle in cycles]
            lengths = [after - before for before, after in itertools.pairwise([0, *stops])]
            late = lengths[len(lengths) // 2 :]
            diverged = sum(cycle["reason"] == "divergence" for cycle in cycles)
            peaks = [str(cycle["cycle"]) for cycle in cycles if cycle["peak"] is not None]
            span = f"{min(late)} to {max(late)}, median {statistics.median(late):g}"
            figures = [str(number) for number in (seed, len(cycles), diverged, lengths[0])]
            rows.append([name, *figures, span, ", ".join(peaks) or "none"])
    if not rows:
        return []
    head = ["row", "seed", "cycles", "diverged", "updates in the first"]
    head += ["in the latter half of the cycles", "cycles with a peak"]
    return ["", "## Cycles", "", *_table(head, rows)]


def _classes(changes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """IoU of every class before and after, by mean gain, with its spread over seeds.

    Args:
        changes: ``classes.json`` of each seed, by row.
    """
    lines: list[str] = []
    for name, seeds in changes.items():
        split = next((s for s in CLASS_SPLITS if all(s in seed for seed in seeds)), None)
        if split is None:
            continue
        rows: list[Any] = []
        for key in seeds[0][split]["classes"]:
            pairs = [[100 * iou for iou in seed[split]["classes"][key]] for seed in seeds]
            start, best = ([pair[which] for pair in pairs] for which in (0, 1))
            rows.append((key, start, best, _spread([b - a for a, b in pairs])))
        rows.sort(key=lambda row: -row[-1]["mean"])
        lines += ["", f"## {name}: IoU by class, {split}, per cent, by gain", ""]
        lines += _table(
            ["class", "start", "final", "gain"],
            [
                [key, _show(_spread(start), 2), _show(_spread(best), 2), _show(gain, 2, "+")]
                for key, start, best, gain in rows
            ],
        )
    return lines


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None for a single value's."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation}


def _show(spread: Mapping[str, float | None], digits: int, sign: str = "") -> str:
    mean = f"{spread['mean']:{sign}.{digits}f}"
    return mean if spread["std"] is None else f"{mean} ± {spread['std']:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_intermixed_args(given)
    try:
        grid = Grid(arguments.grid, arguments.out, arguments.overrides, arguments.seeds)
        grid.check()
        if not arguments.table:
            grid.run()
            grid.check()
        grid.write(f"python benchmarks/load_rows.py {shlex.join(given)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
