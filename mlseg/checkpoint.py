"""Checkpoints: written whole or not at all, read without running anybody's code."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlseg.errors import RunError, UserError

FORMAT = 1
"""Raised by one whenever a checkpoint of an older mlseg can't be read any more."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` atomically.

    The file is written under a temporary name in the same folder, flushed to the disk and then
    renamed, so that a crash or a full disk at any moment leaves the former checkpoint in place.

    Args:
        path: the checkpoint; its folder is made when missing.
        state: tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
        RunError: the file can't be written, as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.partial")  # one name: a crash's rest is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a failed write as RuntimeError and loses the system's text.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "; the one written before it is kept" if path.exists() else ""
        reason = one_line(_cause(error))
        raise RunError(f"can't write checkpoint {path}: {reason}{kept}") from error
    _sync_folder(path.parent)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits that tell one model's weights and buffers from any other's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: it can hold data, never code.

    Raises:
        UserError: there is no such file, it is truncated or damaged, or another format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; name a run that has finished at least one")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in any way
        raise UserError(
            f"{path}: truncated or not a checkpoint ({one_line(error)}); "
            "use another one of the run, or start the run again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"{path}: checkpoint format {found}, this mlseg reads format {FORMAT}")
    return state


def one_line(error: BaseException, length: int = 160) -> str:
    """The first line of an exception's text, cut to ``length`` characters."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:length]


def _cause(error: BaseException) -> BaseException:
    """The operating system's error behind ``error``: torch's zip writer stumbles over it later."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; only POSIX lets a folder be flushed."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
