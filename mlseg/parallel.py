"""Several processes that train one program together, each on its share of every batch.

``torchrun --nproc-per-node=2 -m mlseg.run CONFIG`` starts them: gloo between CPUs, NCCL between
GPUs, the same code. What the levels keep, weights, buffers, optimizers' states, is the same in all
of them, bit for bit; batches are shared out, and what is computed of a share is averaged. A loss
that is a mean over the examples of a batch is the mean of the losses of its equal shares, and so is
every derivative of it, of any order. A loss that isn't takes :func:`summed` for its sums.

Alone, every function here gives back what it was given: no collective, no copy, no waiting.

:func:`summed` is differentiable any number of times: the derivative of a sum over processes is the
sum over processes of the derivatives. All of them have to differentiate it then, in the same order,
and to average what they find: each finds the derivative of the sum of everybody's losses by its own
copy of the variables.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mlseg.errors import RunError, UserError, one_line

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""That a process waits for the others; one that has ended is noticed at once."""


class Lost(RunError):
    """Another process has ended, or hasn't come to where this one waits for it."""


class Launch(NamedTuple):
    """Which process of how many this one is, as its launcher says; here and on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass
class _Group:
    """The processes that work together.

    Attributes:
        launch: this one's place.
        store: where the first that fails says so.
        control: a group of gloo's for what is on the host.
        collectives: of tensors, so far.
        over: this process has failed, and nobody waits for it any more.
        asked: a question to all that is under way.
    """

    launch: Launch
    store: Any
    control: Any
    collectives: int = 0
    over: bool = False
    asked: tuple[Any, Tensor] | None = field(default=None)


_group: _Group | None = None


# --------------------------------------------------------------------------- who is who


def launch() -> Launch | None:
    """What the environment says, as torchrun sets it; None for a process by itself.

    Raises:
        UserError: it says what can't be.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    try:
        rank, size, local = (int(os.environ[name]) for name in names[:3])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError:
        rank = size = local = local_size = -1
    if not (0 <= rank < size and 0 <= local < local_size):
        said = ", ".join(f"{name}={os.environ[name]}" for name in names[:3])
        raise UserError(f"{said}: no place among several processes; start them with torchrun")
    return Launch(rank, size, local, local_size) if size > 1 else None


def start() -> None:
    """Join the other processes of this launch; nothing for a process by itself, or a second time.

    Raises:
        UserError: they aren't there.
    """
    global _group
    place = launch()
    if place is None or _group is not None:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        if dist.is_initialized():  # by a program of the user's own
            store = None
        else:
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            store.set_timeout(TIMEOUT)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
            )
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"process {place.rank} of {place.size} can't reach the others "
            f"({one_line(error)}); check MASTER_ADDR and MASTER_PORT, or the command of torchrun"
        ) from error
    _group = _Group(place, store, control)
    atexit.register(stop)


def stop() -> None:
    """Leave the others, all being done; a process that has failed just ends."""
    global _group
    if _group is not None and not _group.over:
        dist.destroy_process_group()
    _group = None


def abandon() -> None:
    """This process has failed: whatever it still does, it does by itself."""
    if _group is not None:
        _group.over = True


def several() -> bool:
    """Whether there is more than this process."""
    return _group is not None


def size() -> int:
    """How many there are."""
    return 1 if _group is None else _group.launch.size


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if _group is None else _group.launch.rank


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return _group is None or _group.launch.rank == 0


def local_size() -> int:
    """How many share this machine."""
    return 1 if _group is None else _group.launch.local_size


def local_device(wanted: str) -> str:
    """The device of this process, where the config says ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: several of them would share a GPU.
    """
    if _group is None or wanted == "cpu" or not torch.cuda.is_available():
        return wanted
    place, there = _group.launch, torch.cuda.device_count()
    if wanted not in ("auto", "cuda", f"cuda:{place.local_rank}"):
        raise UserError(
            f"device: {wanted} would be shared by {place.local_size} processes; give cuda or auto, "
            "with which each takes one of its own"
        )
    if place.local_size > there:
        raise UserError(
            f"{place.local_size} processes on a machine with {there} GPU(s): give "
            f"--nproc-per-node={there}, or device=cpu"
        )
    return f"cuda:{place.local_rank}"


def speaks() -> bool:
    """Whether this process is to say why it ends: the first of all that asks is."""
    if _group is None:
        try:
            place = launch()
        except UserError:
            return os.environ.get("RANK", "0") == "0"
        return place is None or place.rank == 0
    if _group.store is None:
        return is_first()
    mine = str(_group.launch.rank)
    try:
        said = _group.store.compare_set("mlseg/said", "", mine)
        return bool(said.decode() == mine)
    except (RuntimeError, ValueError):  # the process that kept the store has ended
        return True


# ---------------------------------------------------------------------------- of tensors


def collectives() -> int:
    """Collectives of tensors so far, for tests."""
    return 0 if _group is None else _group.collectives


def average(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The mean over all processes of each tensor; one collective (per type of number)."""
    if _group is None:
        return tensors
    found: list[Any] = [None] * len(tensors)
    for places in _alike(tensors):
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
        _reduce(flat)
        flat /= _group.launch.size
        parts = flat.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            found[i] = part.view(tensors[i].shape)
    return found


def average_some(
    tensors: Sequence[Tensor | None], like: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """:func:`average`, where None is zero; None where it is None in all processes.

    On CUDA, where asking would make the host wait: where it is None here.
    """
    if _group is None or not tensors:
        return tensors
    there = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)]
    first = there[0]
    if first.device.type != "cpu":
        found = average(there)
        return [None if t is None else g for t, g in zip(tensors, found, strict=True)]
    known = first.new_tensor([float(t is not None) for t in tensors])
    *found, known = average([*there, known])
    return [g if share > 0 else None for g, share in zip(found, known.tolist(), strict=True)]


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, differentiable; see the module for how to."""
    return tensor if _group is None else _Sum.apply(tensor)


def averaged(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """:func:`average`, differentiable; None stays None."""
    if _group is None:
        return tensors
    found = list(tensors)
    places = [i for i, t in enumerate(tensors) if t is not None]
    given = [t for t in tensors if t is not None]
    for some in _alike(given):
        flat = summed(torch.cat([given[i].reshape(-1) for i in some])) / _group.launch.size
        parts = flat.split([given[i].numel() for i in some])
        for i, part in zip(some, parts, strict=True):
            found[places[i]] = part.view(given[i].shape)
    return found


class _Sum(torch.autograd.Function):
    """Its own adjoint, and its own tangent."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """The sum."""
        result = tensor.clone(memory_format=torch.contiguous_format)
        _reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Everybody's losses depend on everybody's share."""
        return _Sum.apply(gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        """Linear."""
        return _Sum.apply(tangents[0])


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Give the tensors, in place, the values that they have in the first process."""
    if _group is not None:
        for tensor in tensors:
            value = tensor.detach().contiguous()
            with _waiting():
                dist.broadcast(value, 0)
            tensor.detach().copy_(value)


def _reduce(tensor: Tensor) -> None:
    assert _group is not None
    _group.collectives += 1
    with _waiting():
        dist.all_reduce(tensor)


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the tensors of each type."""
    found: dict[str, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(f"{tensor.dtype} {tensor.device.type}", []).append(i)
    return [found[key] for key in sorted(found)]


# ------------------------------------------------------------------------ of plain values


def gather(value: T) -> list[T]:
    """Everybody's value, in their order; on the host."""
    if _group is None:
        return [value]
    found: list[Any] = [None] * _group.launch.size
    with _waiting():
        dist.all_gather_object(found, value, group=_group.control)
    return found


def from_first(value: T) -> T:
    """The first process's value."""
    if _group is None:
        return value
    found: list[Any] = [value]
    with _waiting():
        dist.broadcast_object_list(found, 0, group=_group.control)
    return found[0]


def done_by_first(work: Callable[[], T]) -> T:
    """What ``work`` gives in the first process, which alone does it; its UserError is everybody's.

    Raises:
        UserError: as it does there.
    """
    if _group is None:
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
    if _group is not None and not _group.over:
        gather(None)


def most(number: int) -> int:
    """The largest of everybody's numbers, as they were at the call before; 0 at the first.

    The question goes round while the work goes on: nobody waits. The host's alone, so that a
    device isn't asked.
    """
    if _group is None:
        return number
    answer = end_of_questions()
    value = torch.tensor(number)
    with _waiting():
        asked = dist.all_reduce(value, dist.ReduceOp.MAX, group=_group.control, async_op=True)
    _group.asked = (asked, value)
    return answer


def end_of_questions() -> int:
    """The answer to the last :func:`most`; 0 where none is due."""
    if _group is None or _group.asked is None:
        return 0
    (asked, value), _group.asked = _group.asked, None
    with _waiting():
        asked.wait()
    return int(value)


@contextmanager
def _waiting() -> Iterator[None]:
    """Within this block others are waited for.

    Raises:
        Lost: one of them has ended.
    """
    assert _group is not None
    if _group.over:
        raise Lost("this process has left the others")
    try:
        yield
    except RuntimeError as error:
        abandon()
        raise Lost(
            f"process {_group.launch.rank} of {_group.launch.size} waits for another one that has "
            f"ended, or doesn't answer ({one_line(error, 80)})"
        ) from error


# --------------------------------------------------------------------------------- shares


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
    if _group is None:
        return total / count.clamp_min(1)
    return total * _group.launch.size / summed(count).clamp_min(1)


def as_mean(total: Tensor) -> Tensor:
    """A share's total, such that the mean over processes is that of the whole batch."""
    return total if _group is None else total * _group.launch.size


def join(parts: Tensor) -> Tensor:
    """Everybody's part of some examples, one after the other, on the CPU."""
    if _group is None:
        return parts
    return torch.cat(gather(parts.cpu()))
