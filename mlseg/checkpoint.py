"""Checkpoints: written whole or not at all, read without running anybody's code."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlseg.errors import RunError, UserError, one_line
from mlseg.files import replacing

FORMAT = 1
"""Raised by one whenever a checkpoint of an older mlseg can't be read any more."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``, whole or not at all: the former checkpoint is kept till then.

    Args:
        path: the checkpoint; its folder is made when missing.
        state: tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
        RunError: the file can't be written, as on a full disk.
    """
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a failed write as RuntimeError and loses the system's text.
        kept = "; the one written before it is kept" if path.exists() else ""
        reason = one_line(_cause(error))
        raise RunError(f"can't write checkpoint {path}: {reason}{kept}") from error


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


def _cause(error: BaseException) -> BaseException:
    """The operating system's error behind ``error``: torch's zip writer stumbles over it later."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error
