"""What a place that work is done at has to offer, and the simplest of them: this process."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from mlseg.errors import UserError

Resources = Mapping[str, float]
"""``cpus``, ``gpus`` (fractions of one allowed), ``memory_gib``; what isn't named isn't bounded."""


@dataclass(frozen=True)
class Returned:
    """What the function gave back."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """The function raised something.

    Attributes:
        text: one line.
        traceback: all of it.
    """

    text: str
    traceback: str


@dataclass(frozen=True)
class Died:
    """The process ended before the function did.

    Attributes:
        text: how, as far as that is known.
    """

    text: str


Ended = Returned | Raised | Died


class Pool(Protocol):
    """Takes pieces of work and says when they have ended; a context, in which its processes live.

    Leaving the context ends every process that is still at work, at once after an exception.
    """

    def room(self) -> int:
        """How many pieces it would start at once now."""

    def start(
        self,
        key: Hashable,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        needs: Resources,
    ) -> None:
        """Have ``function(*arguments)`` done; both have to be picklable."""

    def wait(self, seconds: float) -> list[tuple[Hashable, Ended]]:
        """What has ended, after at most so long; an empty list if nothing has."""

    def interrupt(self) -> None:
        """Ask everything at work to save and end; may be called again and again."""

    def __enter__(self) -> Pool: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Here:
    """One piece after the other, in this process; what a piece raises comes through."""

    def __init__(self) -> None:
        self._ended: list[tuple[Hashable, Ended]] = []

    def room(self) -> int:
        """One, since a piece has ended before the next is asked for."""
        return 1 - len(self._ended)

    def start(
        self,
        key: Hashable,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        needs: Resources,
    ) -> None:
        """Do it now."""
        self._ended.append((key, Returned(function(*arguments))))

    def wait(self, seconds: float) -> list[tuple[Hashable, Ended]]:
        """What was done since."""
        ended, self._ended = self._ended, []
        return ended

    def interrupt(self) -> None:
        """Nothing is at work when this is called."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def make_pool(jobs: int, ray: str | None, *, fresh: bool, what: str) -> Pool:
    """Processes of this machine, or of a Ray cluster.

    Args:
        jobs: processes at a time, on this machine.
        ray: ``local``, the address of a cluster, or None.
        fresh: a process of its own for each piece of work.
        what: the command, for messages.

    Raises:
        UserError: there is no such number of processes, no Ray, or no such cluster.
    """
    if jobs < 1:
        raise UserError(f"--jobs: {jobs} processes; give 1 or more")
    if ray is None:
        from mlseg.workers.local import Processes  # here, since both know this module

        return Processes(jobs, fresh=fresh)
    from mlseg.workers.on_ray import Cluster

    return Cluster(ray, fresh=fresh, what=what)
