"""The most memory that a computation has at one time beyond what was there before it.

On CUDA the caching allocator counts: ``torch.cuda.max_memory_allocated`` less what was allocated
at the start.

On the CPU torch's allocator reports every block that it hands out or takes back to the profiler,
temporary ones within an operator included. The peak of their running sum is what is given here.
Nothing else counts: not Python's own objects, not buffers that a BLAS library allocates itself,
and not the fragmentation that the process's resident size has in it, which makes that size useless
for differences of a few MiB.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch.autograd.profiler import profile

T = TypeVar("T")

_MEMORY_EVENT = "[memory]"


def peak(function: Callable[[], T], device: str | torch.device = "cpu") -> tuple[T, int]:
    """Run ``function`` and count.

    Returns:
        its result, and the peak in bytes.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gc.collect()  # what is freed within would be missing from the difference
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    profiler = profile(use_cpu=True, profile_memory=True)
    with _silenced(), profiler:
        result = function()
    assert profiler.kineto_results is not None
    # Any, since the stubs of torch's own class leave nbytes out.
    events: list[Any] = [e for e in profiler.kineto_results.events() if e.name() == _MEMORY_EVENT]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return result, most


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing on file descriptor 2, to which the profiler's library says when it starts and stops,
    and which older blocks it sees released; other runs show what the function itself has to say.
    """
    with suppress(ValueError, OSError):
        sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
