"""Who is who among the processes, how they meet, how they part."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mlseg.errors import RunError, UserError, one_line

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
class Group:
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


_group: Group | None = None


def group() -> Group | None:
    """The processes that this one works with; None for a process by itself."""
    return _group


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
    _group = Group(place, store, control)
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


@contextmanager
def waiting() -> Iterator[None]:
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
