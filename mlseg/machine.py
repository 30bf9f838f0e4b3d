"""The device to run on, and what a measurement was made on."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from mlseg import parallel
from mlseg._version import __version__
from mlseg.errors import UserError

VERSIONED = ("torch", "torchvision", "betty-ml", "numpy")


def choose_device(name: str | torch.device) -> torch.device:
    """``auto`` is CUDA when there is one; of several processes each takes a GPU of its own.

    Raises:
        UserError: CUDA is asked for and there is none, or the name is no device.
    """
    name = parallel.local_device(str(name))
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise UserError(f"device: {name!r} is none; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: {str(name)!r} isn't supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is not available here; use device=cpu or device=auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: there is no {name}, only {torch.cuda.device_count()} GPU(s)")
    return device


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had at most: of the GPU that it runs on, or of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions() -> dict[str, str]:
    """Of everything that figures may depend on."""
    found = {"mlseg": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in VERSIONED}


def device_name(device: torch.device) -> str:
    """``cuda: NVIDIA H200``, or the processor and the number of threads."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"


def describe(device: str | torch.device = "cpu") -> dict[str, str]:
    """Processor, cores, memory, GPU if ``device`` is one, versions, date.

    Raises:
        UserError: there is no such device.
    """
    device = choose_device(device) if isinstance(device, str) else device
    found = {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return {
        **found,
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }


def head(machine: dict[str, str]) -> str:
    """The description as a Markdown list."""
    return "\n".join(f"- {key}: {value}" for key, value in machine.items())


def revision() -> str:
    """The commit of the code, with ``-dirty`` when files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown revision"
    return found.stdout.strip() or "unknown revision"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
