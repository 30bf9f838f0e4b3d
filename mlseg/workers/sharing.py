"""The loop that brings pieces of work to their end: in order of need, shared with other callers."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from mlseg.errors import UserError
from mlseg.workers.pool import Died, Ended, Pool, Raised, Resources, Returned

HELD = "held"
"""What a piece of work returns that another process is at work on."""

STOPPED = "stopped"
"""What a piece of work returns that was asked to end, and has saved."""


@dataclass(frozen=True)
class Failed:
    """What a piece of work returns that can't be done.

    Attributes:
        text: one line.
    """

    text: str


_POLL = 0.2
_RETRY = 2.0
"""Seconds until it is looked again whether another caller has ended a piece."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Work(Generic[K]):
    """A piece of work.

    Attributes:
        key: its own.
        function: does it; returns :data:`HELD`, :data:`STOPPED`, :class:`Failed`, or what it likes.
        arguments: gives the function's when all of ``after`` is done; a UserError is a failure.
        done: whether it is, whoever did it.
        free: whether no other process is at work on it, as far as can be seen.
        after: keys of the pieces that it builds on.
        needs: of a machine.
    """

    key: K
    function: Callable[..., Any]
    arguments: Callable[[], Sequence[Any]]
    done: Callable[[], bool]
    free: Callable[[], bool] = lambda: True
    after: Sequence[K] = ()
    needs: Resources = field(default_factory=dict)


@dataclass
class Tally(Generic[K]):
    """What has become of the pieces so far.

    Attributes:
        waiting, running, held: not begun; at work here; at work elsewhere.
        done: with what each returned, None for what was found done.
        failed: with one line each.
        seconds: that those done here took.
    """

    waiting: list[K]
    running: dict[K, float] = field(default_factory=dict)
    held: dict[K, float] = field(default_factory=dict)
    done: dict[K, Any] = field(default_factory=dict)
    failed: dict[K, str] = field(default_factory=dict)
    seconds: dict[K, float] = field(default_factory=dict)


def shard(keys: Sequence[K], part: str | None) -> list[K]:
    """Those of one part of ``I/N``, I from 0: every N-th.

    Raises:
        UserError: it isn't of that form.
    """
    if part is None:
        return list(keys)
    first, slash, parts = part.partition("/")
    if not (slash and first.isdecimal() and parts.isdecimal() and int(first) < int(parts)):
        raise UserError(
            f"--shard: {part!r} is no part; write I/N with I from 0 to N - 1, as in 0/4"
        )
    return list(keys[int(first) :: int(parts)])


def work_off(
    pieces: Sequence[Work[K]],
    pool: Pool,
    *,
    told: Callable[[Tally[K], K, Ended | None], None],
    stop: Callable[[], bool],
    saves: bool = False,
    strict: bool = False,
    retries: int = 0,
) -> Tally[K]:
    """Do all pieces, each once among all callers that see the same files.

    Args:
        told: called when a piece has ended, or was found done (None), or isn't done since what it
            builds on has failed (None).
        stop: whether no further one is to be started.
        saves: after a stop, ask what is at work to save, and wait for it; else leave at once.
        strict: a failure is a stop.
        retries: how often a piece whose process died is taken up again.

    Returns:
        What became of each; after a stop some may still be waiting.
    """
    by_key = {piece.key: piece for piece in pieces}
    tally: Tally[K] = Tally([piece.key for piece in pieces])
    deaths: dict[K, int] = {}

    def finish(key: K, value: Any, ended: Ended | None) -> None:
        tally.done[key] = value
        told(tally, key, ended)

    def fail(key: K, text: str, ended: Ended | None) -> None:
        tally.failed[key] = text
        told(tally, key, ended)

    while tally.waiting or tally.running or tally.held:
        stopping = stop() or (strict and bool(tally.failed))
        if stopping:
            if not (saves and tally.running):
                break
            pool.interrupt()
        else:
            for key in _startable(by_key, tally, fail):
                piece = by_key[key]
                if piece.done():
                    _take(tally, key)
                    finish(key, None, None)
                elif not piece.free():
                    _take(tally, key)
                    tally.held[key] = time.monotonic() + _RETRY
                elif pool.room() > 0:
                    _take(tally, key)
                    try:
                        arguments = piece.arguments()
                    except UserError as error:
                        fail(key, str(error), None)
                        continue
                    tally.running[key] = time.monotonic()
                    pool.start(key, piece.function, arguments, piece.needs)
                if stop():
                    break
        for ended_key, ended in pool.wait(_POLL if tally.running or tally.held else 0.0):
            key = cast(K, ended_key)
            begun = tally.running.pop(key)
            value = ended.value if isinstance(ended, Returned) else STOPPED
            if isinstance(ended, Raised):
                fail(key, ended.text, ended)
            elif isinstance(value, Failed):
                fail(key, value.text, ended)
            elif value == HELD:
                tally.held[key] = time.monotonic() + _RETRY
            elif value != STOPPED:
                tally.seconds[key] = time.monotonic() - begun
                finish(key, value, ended)
            elif stopping or deaths.get(key, 0) < retries:
                deaths[key] = deaths.get(key, 0) + 1
                tally.waiting.insert(0, key)
            else:
                fail(key, ended.text if isinstance(ended, Died) else "it was told to end", ended)
    return tally


def _take(tally: Tally[K], key: K) -> None:
    if key in tally.held:
        del tally.held[key]
    else:
        tally.waiting.remove(key)


def _startable(
    by_key: Mapping[K, Work[K]], tally: Tally[K], fail: Callable[[K, str, Ended | None], None]
) -> Iterator[K]:
    """What could begin now; what never can has failed."""
    now = time.monotonic()
    for key in [key for key, retry in tally.held.items() if retry <= now]:
        tally.held[key] = now + _RETRY
        yield key
    for key in list(tally.waiting):
        after = by_key[key].after
        broken = next((other for other in after if other in tally.failed), None)
        if broken is not None:
            tally.waiting.remove(key)
            fail(key, f"left out: what it builds on, {broken}, has failed", None)
        elif all(other in tally.done for other in after):
            yield key
