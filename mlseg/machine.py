"""What a measurement was made on, for the head of a report."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from mlseg.run import versions


def describe(device: str | torch.device = "cpu") -> dict[str, str]:
    """Processor, cores, memory, GPU if ``device`` is one, versions, date."""
    device = torch.device(device)
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
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown revision"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
