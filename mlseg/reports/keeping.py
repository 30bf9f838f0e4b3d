"""What ``evaluate`` and ``calibrate`` leave in a run that has ended, and its page, made anew.

The scores that training ended with stay as they are, in ``results.json`` and first on the page.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlseg.engines.evaluation import EVALUATION, write
from mlseg.errors import UserError, unharmed
from mlseg.files import at_rest, require_file
from mlseg.reports.page import PAGE, require_ours, write_page
from mlseg.reports.reading import LATER, MOST_BYTES

MOST = 200
"""Evaluations that are kept; older ones go."""
_SAME = ("data", "root", "layout", "checkpoint", "k", "threshold", "tta", "scored_at")
"""What two evaluations have in common of which the second takes the first one's place."""


def keep(run: Path, found: Sequence[Mapping[str, Any]]) -> bool:
    """Add evaluations to a run's ``evaluation.json``, and write its page anew.

    Args:
        found: of each the keys of `_SAME`, and ``weights``, ``step``, ``metric``, ``images``,
            ``scores`` and ``intervals``.

    Returns:
        whether it was done. Else it was said why not, on stderr: the directory can't be written,
        another process is at work in it, or the page there is somebody else's.
    """
    if not (run / "config.yaml").is_file():
        return False  # weights without a run's records
    done = False
    with unharmed(f"{EVALUATION} and {PAGE} of {run} with these scores"), at_rest(run):
        require_ours(run / PAGE)
        record = _record(run / EVALUATION)
        own = record.get(LATER)
        kept = list(own) if isinstance(own, list) else []
        date = time.strftime("%Y-%m-%d %H:%M")
        for entry in found:
            kept = [former for former in kept if not _same(former, entry)]
            kept.append({**entry, "date": date})
        write(run, {**record, LATER: kept[-MOST:]})
        write_page([run], run / PAGE)
        done = True
    return done


def refresh(run: Path) -> bool:
    """Write a run's page anew; returns as :func:`keep`."""
    done = False
    with unharmed(f"{PAGE} of {run} with this choice"), at_rest(run):
        write_page([run], run / PAGE)
        done = True
    return done


def _record(path: Path) -> dict[str, Any]:
    """What the file holds; nothing, where there is none."""
    if path.is_symlink():
        raise UserError(f"{path} is a link")
    if not path.exists():
        return {}
    try:
        require_file(path, MOST_BYTES)
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not {"scores", LATER} & found.keys():
        raise UserError(f"{path} can't be read; remove it")
    return found


def _same(former: Any, entry: Mapping[str, Any]) -> bool:
    return isinstance(former, dict) and all(former.get(key) == entry.get(key) for key in _SAME)
