"""A copy of a model and its optimizer that can be put back any number of times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_Pairs = list[tuple[Tensor, Tensor]]
"""Where to, and what."""


class Snapshot:
    """Weights, buffers and optimizer state, copied into memory that is allocated once.

    Taking one and putting it back copies every tensor once, on its device and without waiting for
    it. What is put back is a copy as well, so that steps made afterwards leave the snapshot alone.

    Args:
        module: its parameters and buffers; None for the optimizer's state alone.
        optimizer: its state per parameter, and the settings of its parameter groups; or None.
    """

    def __init__(
        self, module: nn.Module | None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.taken = False
        self._own: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._slots: list[dict[str, Any]] = []
        self._groups: list[dict[str, Any]] = []

    def take(self) -> None:
        """Copy the present state here."""
        live = self._live()
        pairs: _Pairs = []
        if not self._tensors:
            self._tensors = {name: tensor.detach().clone() for name, tensor in live.items()}
        else:
            pairs += [(self._tensors[name], tensor) for name, tensor in live.items()]
        if self.optimizer is not None:
            found = [self.optimizer.state.get(p, {}) for p in self._parameters()]
            self._slots = [
                _into(old, new, pairs)
                for old, new in zip(self._slots or [{} for _ in found], found, strict=True)
            ]
            self._groups = [_settings(group) for group in self.optimizer.param_groups]
        _copy(pairs)
        self.taken = True

    def restore(self) -> None:
        """Put the copied state back."""
        assert self.taken, "nothing has been copied yet"
        pairs: _Pairs = [(tensor, self._tensors[name]) for name, tensor in self._live().items()]
        if self.optimizer is not None:
            state = self.optimizer.state
            for parameter, slot in zip(self._parameters(), self._slots, strict=True):
                if slot:
                    state[parameter] = _into(state.get(parameter, {}), slot, pairs)
                else:
                    state.pop(parameter, None)
            for group, settings in zip(self.optimizer.param_groups, self._groups, strict=True):
                group.update(settings)
        _copy(pairs)

    def module_state(self) -> dict[str, Tensor]:
        """The copied weights and buffers, as in the module's ``state_dict``."""
        return dict(self._tensors)

    def state_dict(self) -> dict[str, Any]:
        """All of it; empty if nothing has been copied yet."""
        if not self.taken:
            return {}
        return {"tensors": dict(self._tensors), "slots": self._slots, "groups": self._groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; tensors move to where the module's are."""
        self.taken = bool(state)
        if not state:
            return
        live = self._live()
        self._tensors = {
            name: tensor.to(live[name].device, copy=True)
            for name, tensor in state["tensors"].items()
        }
        if self.optimizer is not None:
            self._slots = [
                {key: _like(parameter, key, value) for key, value in slot.items()}
                for parameter, slot in zip(self._parameters(), state["slots"], strict=True)
            ]
            self._groups = [dict(group) for group in state["groups"]]

    def _live(self) -> dict[str, Tensor]:
        """The module's own tensors by name; looked up once, since they are changed in place."""
        if not self._own and self.module is not None:
            own: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
            own |= dict(self.module.named_buffers(remove_duplicate=False))
            self._own = {name: own[name] for name in self.module.state_dict()}
        return self._own

    def _parameters(self) -> list[Tensor]:
        assert self.optimizer is not None
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's settings; none of ours is a container."""
    return {key: value for key, value in group.items() if key != "params"}


def _into(old: Mapping[str, Any], new: Mapping[str, Any], pairs: _Pairs) -> dict[str, Any]:
    """``new`` in the memory of ``old``, where it fits; what is still to be copied goes to pairs."""
    result: dict[str, Any] = {}
    for key, value in new.items():
        if not isinstance(value, Tensor):
            result[key] = value
        elif isinstance(there := old.get(key), Tensor) and there.shape == value.shape:
            result[key] = there
            pairs.append((there, value))
        else:
            result[key] = value.detach().clone()
    return result


def _copy(pairs: _Pairs) -> None:
    """All at once: one kernel per type and device, where there are such kernels."""
    groups: dict[tuple[torch.dtype, torch.device], _Pairs] = {}
    for to, source in pairs:
        groups.setdefault((to.dtype, to.device), []).append((to, source))
    with torch.no_grad():
        for group in groups.values():
            torch._foreach_copy_([to for to, _ in group], [source for _, source in group])


def _like(parameter: Tensor, key: str, value: Any) -> Any:
    """A saved slot on its parameter's device; ``step`` stays where torch keeps it."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if key == "step" else value.to(parameter.device, copy=True)
