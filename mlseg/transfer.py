"""Copies of tensors, from the host to a device or beside each other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mlseg.errors import UserError


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on ``device``: to CUDA by way of page-locked memory, so that nothing waits."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def state_to_device(
    key: str, value: Tensor, group: Mapping[str, Any], device: torch.device | str
) -> Tensor:
    """A tensor of an optimizer's state where torch's optimizers look for it.

    That is beside its parameter, but for the number of steps, ``step``, which only fused and
    capturable optimizers keep there; others keep it on the host.

    Args:
        key: its name in the state.
        group: settings of its parameter's group.
        device: the parameter's.
    """
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value if on_host else value.to(device)


def optimizer_to_device(optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
    """Move an optimizer's state to where its parameters are."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = state_to_device(key, value, group, device)


def grouped(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs by type and device of their first, each group as two lists: what one operation takes.

    There are hundreds of tensors in a model, each next to nothing to copy.
    """
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for one, other in pairs:
        ones, others = groups.setdefault((one.dtype, one.device), ([], []))
        ones.append(one)
        others.append(other)
    return list(groups.values())


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The same numbers in the memory layout of another tensor, if that is of this shape.

    Fused optimizers go through the memory of a parameter, its gradient and its moments side by
    side: on the CPU they would take numbers of another layout for those of other elements.
    """
    strided = tensor.layout is like.layout is torch.strided
    if not strided or tensor.shape != like.shape or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give what an optimizer keeps of its parameters their layout: it may have been saved on a
    device where another one is the faster."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = laid_out(value, parameter)


def batch_to_device(batch: Any, device: torch.device | str) -> Any:
    """A batch on ``device``, of the same types all through.

    Tensors move; what has a method ``to`` (a ``BatchEncoding``, a packed sequence) is asked to;
    mappings, sequences, dataclasses and plain objects are copied, with what is in them moved.
    Anything else stays as it is.

    Raises:
        UserError: a container has tensors in it and can't be copied, or its ``to`` fails.
    """
    if isinstance(batch, Tensor):
        return to_device(batch, device)
    if isinstance(batch, (str, bytes, type, torch.Size)):
        return batch
    # Of the class: attribute dicts may raise anything for a key that they haven't.
    if callable(getattr(type(batch), "to", None)):
        return _by_itself(batch, device)
    if isinstance(batch, Mapping):
        return _mapping(batch, {k: batch_to_device(v, device) for k, v in batch.items()})
    if isinstance(batch, tuple):
        moved = [batch_to_device(value, device) for value in batch]
        # Named tuples and others of the kind, whatever their constructors take.
        return tuple.__new__(type(batch), moved)
    if isinstance(batch, list):
        result = copy.copy(batch)
        result[:] = [batch_to_device(value, device) for value in batch]
        return result
    return _attributes(batch, device)


def _by_itself(batch: Any, device: torch.device | str) -> Any:
    try:
        moved = batch.to(device)
    except Exception as error:
        raise UserError(
            f"a batch holds a {type(batch).__name__} whose to({str(device)!r}) fails "
            f"({type(error).__name__}: {error}); put tensors there, or convert it in get_batch"
        ) from error
    return batch if moved is None else moved  # some move themselves


def _mapping(batch: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    if type(batch) is dict:
        return moved
    try:
        if getattr(batch, "__dict__", None) is batch:  # its attributes are its items
            return type(batch)(moved)
        result: Any = copy.copy(batch)
        for key, value in moved.items():
            result[key] = value
        return result
    except TypeError:
        pass
    try:
        result = type(batch)(moved)  # type: ignore[call-arg]
        if len(result) == len(moved) and all(result[k] is v for k, v in moved.items()):
            return result
    except (TypeError, ValueError, LookupError, AttributeError):  # it takes something else
        pass
    if all(moved[key] is value for key, value in batch.items()):
        return batch
    raise UserError(
        f"a batch is a {type(batch).__name__}, which can't be copied with its tensors on another "
        "device; give it a method to(device), or convert it in get_batch"
    )


def _attributes(batch: Any, device: torch.device | str) -> Any:
    """Dataclasses, namespaces and other objects whose attributes hold tensors."""
    if dataclasses.is_dataclass(batch) or isinstance(batch, SimpleNamespace):
        if isinstance(batch, SimpleNamespace):
            names = list(vars(batch))
        else:
            names = [f.name for f in dataclasses.fields(batch)]
    else:
        names = [k for k, v in getattr(batch, "__dict__", {}).items() if _holds_tensors(v)]
        if not names or isinstance(batch, torch.nn.Module):
            return batch
    result = copy.copy(batch)
    for name in names:
        if hasattr(batch, name):
            moved = batch_to_device(getattr(batch, name), device)
            object.__setattr__(result, name, moved)  # frozen ones too
    return result


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)
