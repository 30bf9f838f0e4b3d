"""Checkpoints: written whole or not at all, read without running anybody's code.

A checkpoint is torch's zip archive, which holds a CRC of each of its members. torch itself doesn't
look at them, so :func:`load` does: a flipped bit is found before anything is made of it. What isn't
a tensor or a plain value is written as :mod:`mlseg.values` says.
"""

import hashlib
import math
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mlseg.errors import RunError, UserError, one_line
from mlseg.files import replacing
from mlseg.values import as_it_was, as_plain

K = TypeVar("K")

FORMAT = 1
"""Raised by one whenever a checkpoint of an older mlseg can't be read any more."""

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
"""What a run goes on from, the one saved before it, and the weights that validation has chosen."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``, whole or not at all: the former checkpoint is kept till then.

    What a run goes on from, ``last.pt``, is kept for longer, as ``previous.pt``.

    Args:
        path: the checkpoint; its folder is made when missing.
        state: tensors, arrays, numbers, strings, paths, and dicts, lists, (named) tuples and
            dataclasses of them.

    Raises:
        RunError: the file can't be written, as on a full disk, or something in it couldn't be read.
    """
    kept = "; the one written before it is kept" if path.exists() else ""
    try:
        plain = as_plain(state)
    except TypeError as error:
        raise RunError(
            f"can't write checkpoint {path}: {error}, which couldn't be read back; keep tensors, "
            "arrays, numbers, strings and paths there, in dicts, lists, (named) tuples and "
            f"dataclasses of a module's top level{kept}"
        ) from None
    former = path.with_name(PREVIOUS) if path.name == LAST else None
    try:
        with replacing(path, former) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **plain}, file)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a failed write as RuntimeError and loses the system's text.
        reason = one_line(_cause(error))
        raise RunError(f"can't write checkpoint {path}: {reason}{kept}") from error


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits that tell one model's weights and buffers from any other's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_not_finite(tensors: Mapping[K, Tensor]) -> K | None:
    """The first of some tensors that holds a NaN or an infinity, or None.

    A sum is finite only if everything in it is, and is the fastest pass over a tensor; a large one
    may overflow, so that what is suspected by its sum is looked at once more. One synchronisation
    per device, where all is well.
    """
    wanted = {
        k: _stored(t.detach())
        for k, t in tensors.items()
        if t.is_floating_point() or t.is_complex()
    }
    suspected: set[K] = set()
    for device in {t.device for t in wanted.values()}:
        keys = [k for k, t in wanted.items() if t.device == device]
        sums = torch.stack([wanted[k].sum() for k in keys]).isfinite().tolist()
        suspected |= {k for k, finite in zip(keys, sums, strict=True) if not finite}
    return next((k for k, t in wanted.items() if k in suspected and not t.isfinite().all()), None)


def _stored(tensor: Tensor) -> Tensor:
    """The numbers that a tensor keeps, of a type that can be calculated with."""
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor
        tensor = tensor.values()
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: it can hold data, never code.

    Raises:
        UserError: there is no such file, it is truncated or damaged, or another format, or it
            holds an object of a class that isn't loaded. The line names the run's other checkpoint,
            if that is whole.
    """
    if not path.is_file():
        mend = _other(path) or "name the directory of a run that has saved one"
        raise UserError(f"{path}: no such checkpoint; {mend}")
    try:
        verify(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a file may hold makes the unpickler fail in any way
        mend = _other(path) or "use another one of the run, or start the run again"
        said = one_line(error)
        if said.startswith("Weights only load failed"):  # torch's advice is to trust it
            said = "it holds more than tensors and plain values"
        raise UserError(
            f"{path}: truncated or not a checkpoint (damaged: {said}); {mend}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(
            f"{path}: checkpoint format {str(found)[:40]}, this mlseg reads format {FORMAT}"
        )
    try:
        return {key: as_it_was(value) for key, value in state.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {one_line(error)}; start the run again, or mend that") from error


def verify(path: Path) -> None:
    """Check a file as an archive: that every member is what was written.

    Raises:
        ValueError: one isn't, or the file is no archive of torch's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it holds compressed data, and torch writes none")
            member = archive.testzip()
    except Exception as error:  # of an archive's own tables any number may be wrong
        raise ValueError(one_line(error)) from error
    if member is not None:
        raise ValueError(f"{member[:80]} is not what was written")


def _other(path: Path) -> str | None:
    """How to go on without this checkpoint of a run, if another one is whole."""
    folder = path.parent
    if path.name == LAST and whole(folder / PREVIOUS):
        source, target = (shlex.quote(str(folder / name)) for name in (PREVIOUS, LAST))
        return (
            "the one saved before it is whole; to go on from that: "
            f"mv {source} {target}, then --resume"
        )
    if path.name == BEST and whole(folder / LAST):
        return f"the run's last weights are whole: --weights last, or name {folder / LAST} itself"
    return None


def whole(path: Path) -> bool:
    """Whether there is such a file, and nothing has damaged it."""
    if not path.is_file():
        return False
    try:
        verify(path)
    except ValueError:
        return False
    return True


# --------------------------------------------------------- what is in it, once it is read


@contextmanager
def taking(what: str, mend: str = "resume with the config it was started with") -> Iterator[None]:
    """Within this block a checkpoint's content is taken over; what doesn't fit is one line.

    A checkpoint is data from a file, and may hold anything anywhere.

    Args:
        what: doesn't fit.

    Raises:
        UserError: in place of whatever the content leads to.
    """
    try:
        yield
    except (UserError, RunError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        raise UserError(f"{what} doesn't fit the checkpoint ({reason}); {mend}") from error


def load_module(module: nn.Module, tensors: Any) -> None:
    """Give a module, fresh or trained, the weights and buffers of a checkpoint.

    Raises:
        RuntimeError: names, shapes or types differ.
        ValueError: one of them is NaN or infinite, where a fresh module's isn't.
    """
    own = module.state_dict()
    require_types(own, tensors)
    endless = {k for k, t in own.items() if isinstance(t, Tensor) and t.isinf().any()}
    module.load_state_dict(tensors)
    given = {k: t for k, t in tensors.items() if isinstance(t, Tensor) and k not in endless}
    found = first_not_finite(given)
    if found is not None:
        raise ValueError(f"{found} is not finite")


def require_types(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check what torch would convert in silence; names and shapes it checks itself.

    Raises:
        ValueError: a tensor isn't of the kind of numbers that it is to replace.
    """
    for name, tensor in own.items():
        found = given.get(name)
        if not (isinstance(tensor, Tensor) and isinstance(found, Tensor)):
            continue
        # Another precision will do.
        floats = tensor.is_floating_point() and found.is_floating_point()
        if not floats and tensor.dtype != found.dtype:
            raise ValueError(f"{name} is {_shape_of(found)}, not {_shape_of(tensor)}")


def require_form(own: Any, given: Any, name: str, loose: bool = False) -> None:
    """Check that a value from a checkpoint is of the form of the one that it is to replace.

    Tensors have its type and shape, mappings its keys, sequences its length unless that is 0.
    Numbers are of its kind and finite, unless it isn't; whole ones count something, and are not
    below 0 unless it is. What is None may become anything.

    Args:
        loose: a whole number may become another one.

    Raises:
        ValueError: it isn't; names the place.
    """
    fits = True
    if isinstance(own, Tensor):
        fits = isinstance(given, Tensor) and (own.dtype, own.shape) == (given.dtype, given.shape)
    elif isinstance(own, Mapping):
        fits = isinstance(given, Mapping) and own.keys() == given.keys()
        if fits:
            for key, value in own.items():
                require_form(value, given[key], f"{name}.{key}", loose)
    elif isinstance(own, (list, tuple)):
        fits = isinstance(given, (list, tuple)) and (not own or len(own) == len(given))
        for index, value in enumerate(own if fits else ()):
            require_form(value, given[index], f"{name}.{index}", loose)
    elif isinstance(own, (bool, str)):
        fits = isinstance(given, type(own))
    elif isinstance(own, (int, float)):
        kinds = (int,) if isinstance(own, int) and not loose else (int, float)
        fits = isinstance(given, kinds) and not isinstance(given, bool)
        fits = fits and (math.isfinite(given) or not math.isfinite(own))
        fits = fits and (not math.isnan(given) or math.isnan(own))
        fits = fits and (given >= 0 or own < 0 or float in kinds)
    elif own is not None:
        fits = isinstance(given, type(own))
    if not fits:
        raise ValueError(f"{name} is {_shape_of(given)}, not {_shape_of(own)}")


def _shape_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value))}"[:80]
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _cause(error: BaseException) -> BaseException:
    """The operating system's error behind ``error``: torch's zip writer stumbles over it later."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error
