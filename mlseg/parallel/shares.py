"""The share of a batch that each process takes, and what is put together of shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlseg.errors import UserError
from mlseg.parallel.processes import rank, several, size
from mlseg.parallel.tensors import summed
from mlseg.parallel.values import gather


class Part(NamedTuple):
    """A part of a batch: examples ``start`` to ``stop`` of ``total``."""

    start: int
    stop: int
    total: int

    @property
    def span(self) -> slice:
        """As a slice."""
        return slice(self.start, self.stop)


def part(total: int) -> Part:
    """This process's part of some examples: all parts are as nearly equal as can be."""
    count, place = size(), rank()
    return Part(total * place // count, total * (place + 1) // count, total)


def part_of_share(own: int) -> Part:
    """The part that a share of ``own`` examples is, of a batch shared out equally."""
    return Part(own * rank(), own * (rank() + 1), own * size())


def require_equal_parts(batch_size: int, what: str) -> None:
    """Refuse a batch that can't be shared out equally.

    Args:
        what: it is the size of, for the message.

    Raises:
        UserError: with the mend.
    """
    count = size()
    if batch_size % count:
        raise UserError(
            f"{what}: {batch_size} can't be shared equally by {count} processes; give a multiple "
            f"of {count}"
        )


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """A batch's total by its count, at least 1, of this process's share of either.

    The count is that of the whole batch, so that the mean over processes is the batch's own ratio.

    Args:
        count: a constant: pixels that are labelled.
    """
    if not several():
        return total / count.clamp_min(1)
    return total * size() / summed(count).clamp_min(1)


def as_mean(total: Tensor) -> Tensor:
    """A share's total, such that the mean over processes is that of the whole batch."""
    return total if not several() else total * size()


def join(parts: Tensor) -> Tensor:
    """Everybody's part of some examples, one after the other, on the CPU."""
    if not several():
        return parts
    return torch.cat(gather(parts.cpu()))
