"""Plain values of all processes put together, on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mlseg.errors import UserError
from mlseg.parallel.processes import group, is_first, several, size, waiting

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Everybody's value, in their order; on the host."""
    here = group()
    if here is None:
        return [value]
    found: list[Any] = [None] * size()
    with waiting():
        dist.all_gather_object(found, value, group=here.control)
    return found


def from_first(value: T) -> T:
    """The first process's value."""
    here = group()
    if here is None:
        return value
    found: list[Any] = [value]
    with waiting():
        dist.broadcast_object_list(found, 0, group=here.control)
    return found[0]


def done_by_first(work: Callable[[], T]) -> T:
    """What ``work`` gives in the first process, which alone does it; its UserError is everybody's.

    Raises:
        UserError: as it does there.
    """
    if not several():
        return work()
    value: Any = None
    failure: UserError | None = None
    if is_first():
        try:
            value = work()
        except UserError as error:
            failure = error
    value, text = from_first((value, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    if text is not None:
        raise UserError(text)
    return value


def together() -> None:
    """Wait for all the others."""
    here = group()
    if here is not None and not here.over:
        gather(None)


def most(number: int) -> int:
    """The largest of everybody's numbers, as they were at the call before; 0 at the first.

    The question goes round while the work goes on: nobody waits. The host's alone, so that a
    device isn't asked.
    """
    here = group()
    if here is None:
        return number
    answer = end_of_questions()
    value = torch.tensor(number)
    with waiting():
        asked = dist.all_reduce(value, dist.ReduceOp.MAX, group=here.control, async_op=True)
    here.asked = (asked, value)
    return answer


def end_of_questions() -> int:
    """The answer to the last :func:`most`; 0 where none is due."""
    here = group()
    if here is None or here.asked is None:
        return 0
    (asked, value), here.asked = here.asked, None
    with waiting():
        asked.wait()
    return int(value)
