"""Copies from the host to a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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
