"""What several processes share of a level: its batches, draws and buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from mlseg import parallel, randomness
from mlseg.errors import UserError
from mlseg.hypergradients.modules import submodules

# ------------------------------------------------------------------------------ batches


def own_share(batch: Any, loader: Any, name: str) -> Any:
    """This process's share of a batch, which all of them have drawn alike.

    A batch is shared out along the first dimension of its tensors. One whose tensors differ there
    has no examples to tell apart: every process takes all of it, and comes to the same.

    Args:
        batch: tensors, and lists of as many plain values, in tuples, lists and mappings.
        loader: that gave it; one with an attribute ``shared_out`` that is true has shared it out
            itself, and so has a ``DataLoader`` with a ``DistributedSampler``.
        name: of the problem, for messages.

    Raises:
        UserError: it can't be shared out equally.
    """
    sampler = getattr(loader, "sampler", None)
    if getattr(loader, "shared_out", False) or isinstance(sampler, DistributedSampler):
        return batch
    lengths = {len(t) if t.dim() else 1 for t in _tensors(batch)}
    if len(lengths) != 1:
        return batch
    (length,) = lengths
    if length % parallel.size():
        raise UserError(
            f"problem {name!r}: a batch of {length} can't be shared equally by {parallel.size()} "
            f"processes; give batches of a multiple of {parallel.size()}, and drop a last one that "
            "is smaller (drop_last)"
        )
    return _cut(batch, parallel.part(length).span, length)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)


def _cut(batch: Any, span: slice, length: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[span]
    if isinstance(batch, Mapping):
        return {key: _cut(value, span, length) for key, value in batch.items()}
    if not isinstance(batch, (list, tuple)):
        return batch
    if len(batch) == length and not any(True for _ in _tensors(batch)):
        return batch[span]
    parts = [_cut(value, span, length) for value in batch]
    if hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*parts)
    return type(batch)(parts)


# --------------------------------------------------------------------------------- draws

_common: randomness.RandomState | None = None
"""Where the draws are that all processes share: those of loaders from torch's, numpy's and Python's
global generators. What a step draws, dropout, is each process's own."""


def part_streams() -> None:
    """From here on each process draws for itself, but in :func:`shared_draws`.

    The first one goes on as a process by itself would.
    """
    global _common
    if not parallel.several():
        _common = None
        return
    _common, seed = parallel.from_first((randomness.capture(), torch.initial_seed()))
    if not parallel.is_first():
        randomness.seed_everything(randomness.derived(seed, f"process {parallel.rank()}"))


@contextmanager
def shared_draws(training: bool) -> Iterator[None]:
    """A block in which all processes draw the same.

    Args:
        training: whether the batch is one of training's; others have streams of their own anyway.
    """
    global _common
    if _common is None or not training:
        yield
        return
    with randomness.replayed(_common):
        yield
        _common = randomness.capture()


def draws() -> randomness.RandomState | None:
    """Where the shared ones are; None for a process by itself."""
    return _common


def set_draws(state: randomness.RandomState | None) -> None:
    """Go on from :func:`draws`."""
    global _common
    _common = state


# ------------------------------------------------------------------------------- buffers


class Buffers:
    """Buffers that a step moves, BatchNorm's running statistics: their mean over all processes.

    Each process normalises its share of a batch by that share's own statistics. The running ones
    are averaged after every step, so that all processes keep, validate and save the same.

    Args:
        modules: whose.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._holders = [m for m in submodules(modules) if m._buffers]
        self._before = [_versions(holder) for holder in self._holders]

    def average_moved(self) -> None:
        """One collective (per type of number), or none where nothing has moved."""
        # torch takes no note of what BatchNorm's kernels write, but of the count beside it.
        holders = [
            holder
            for holder, before in zip(self._holders, self._before, strict=True)
            if _versions(holder) != before
        ]
        buffers = {id(b): b for holder in holders for b in holder._buffers.values()}
        moved = [b for b in buffers.values() if b is not None and b.is_floating_point()]
        if not moved:
            return
        for buffer, value in zip(moved, parallel.average(moved), strict=True):
            # Through ``data``: a graph that is still to be walked may have saved the buffer.
            buffer.data.copy_(value)


def _versions(holder: nn.Module) -> list[tuple[int, int]]:
    return [(id(b), b._version) for b in holder._buffers.values() if b is not None]
