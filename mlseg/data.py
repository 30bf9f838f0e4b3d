"""python -m mlseg.data [NAME --root DIR [--limit N] [--part PART ...]]: list, fetch data sets."""

import argparse
import sys
from collections.abc import Sequence

from rich.table import Table

from mlseg import signals

if __name__ == "__main__":
    signals.end_at_once()

from mlseg.commands import guarded, make_console, print_whole, worded
from mlseg.errors import EXIT_USER_ERROR, UserError
from mlseg.segmentation.data.entry import DATA_SETS, data_set
from mlseg.segmentation.data.fetch import fetch, how_to_get
from mlseg.segmentation.data.settings import resolve_root


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done; 2 a mistake, or a set that must be got by hand; 1 the network failed."""
    return guarded(_data, parser().parse_args(arguments))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(
        "python -m mlseg.data",
        description="Fetch a data set, or say where it is. Without a name: list all.",
    )
    made.add_argument("name", nargs="?", help="data set, as in a config")
    made.add_argument("--root", type=worded, help="its folder (default data/NAME; see $MLSEG_DATA)")
    made.add_argument("--limit", type=int, help="fetch only the first N examples of each part")
    made.add_argument("--part", action="append", help="official part: train, val or test")
    return made


def _data(given: argparse.Namespace) -> int:
    if given.name is None:
        _list()
        return 0
    entry = data_set(given.name)
    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit must be at least 1, got {given.limit}")
    if entry.synthetic:
        raise UserError(f"{given.name} is drawn when a run needs it; there is nothing to fetch")
    if not entry.archives:
        print(how_to_get(entry), file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        fetch(entry, resolve_root(entry.spec.name, given.root), given.limit, given.part)
    except KeyboardInterrupt:
        print("what is there is whole, and the same command goes on", file=sys.stderr)
        raise
    return 0


def _list() -> None:
    table = Table("name", "classes", "channels", "metric", "fetch", "from")
    for name in DATA_SETS.names():
        entry = data_set(name)
        spec = entry.spec
        by = "drawn" if entry.synthetic else "yes" if entry.archives else "by hand"
        table.add_row(
            name, str(spec.num_classes), str(spec.channels), spec.metric, by, entry.source
        )
    print_whole(make_console(), table)


if __name__ == "__main__":
    sys.exit(main())
