"""A copy of a model and its optimizer that can be put back any number of times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlseg.checkpoint import require_form
from mlseg.multilevel.restoring import check_slots
from mlseg.transfer import grouped, laid_out, state_to_device

_Pairs = list[tuple[Tensor, Tensor]]
"""Where to, and what."""


@dataclass(frozen=True)
class _Plan:
    """What a copy moves, so that the next one needs no search.

    Attributes:
        tensors: live and kept, a pair of lists per type and device.
        slots: of the optimizer: a parameter, its state, and the tensors in it.
    """

    tensors: list[tuple[list[Tensor], list[Tensor]]]
    slots: list[tuple[Tensor, dict[str, Any], dict[str, Tensor]]]


class Snapshot:
    """Weights, buffers and optimizer state, copied into memory that is allocated once.

    Taking one and putting it back copies every tensor once, on its device and without waiting for
    it. What is put back is a copy as well, so that steps made afterwards leave the snapshot alone.

    Args:
        module: its parameters and buffers; None for the optimizer's state alone.
        optimizer: its state per parameter, and the settings of its parameter groups; or None.

    Attributes:
        about: what :meth:`take` was told of the copied state; None while there is no whole copy.
    """

    def __init__(
        self, module: nn.Module | None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.about: Mapping[str, Any] | None = None
        self._own: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._slots: list[dict[str, Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._plan: _Plan | None = None

    @property
    def taken(self) -> bool:
        """Whether there is a copy."""
        return self.about is not None

    def take(self, about: Mapping[str, Any] | None = None) -> None:
        """Copy the present state here.

        Args:
            about: plain values that describe it.
        """
        self.about = None  # an interruption in the middle leaves no copy of anything
        if self.optimizer is not None:
            self._groups = [_settings(group) for group in self.optimizer.param_groups]
        if not self._copied_by_plan(back=False):
            self._search_and_copy(back=False)
        self.about = dict(about or {})

    def restore(self) -> None:
        """Put the copied state back."""
        assert self.taken, "nothing has been copied yet"
        if self.optimizer is not None:
            for group, settings in zip(self.optimizer.param_groups, self._groups, strict=True):
                group.update(settings)
        if not self._copied_by_plan(back=True):
            self._search_and_copy(back=True)

    def _search_and_copy(self, back: bool) -> None:
        """Find every tensor's place, copy all, and note the places."""
        live = self._live()
        pairs: _Pairs = []
        for name, tensor in live.items():
            if name not in self._tensors:
                self._tensors[name] = torch.empty_like(tensor.detach())
            kept = self._tensors[name]
            pairs.append((tensor, kept) if back else (kept, tensor))
        if self.optimizer is not None:
            state, parameters = self.optimizer.state, self._parameters()
            kept_slots = self._slots or [{} for _ in parameters]
            live_slots = [state.get(p, {}) for p in parameters]
            to, source = (live_slots, kept_slots) if back else (kept_slots, live_slots)
            filled = [_into(old, new, pairs) for old, new in zip(to, source, strict=True)]
            if back:
                for parameter, slot in zip(parameters, filled, strict=True):
                    state[parameter] = slot
                    if not slot:
                        del state[parameter]  # as before its first step
            else:
                self._slots = filled
        _copy(pairs)
        self._make_plan()

    def _copied_by_plan(self, back: bool) -> bool:
        """Copy, if the tensors are still those that the plan was made for; tells whether."""
        if self._plan is None:
            return False
        state = {} if self.optimizer is None else self.optimizer.state
        for parameter, slot, tensors in self._plan.slots:
            same = state.get(parameter) is slot and len(slot) == len(tensors)
            if not (same and all(slot[key] is tensor for key, tensor in tensors.items())):
                return False
        with torch.no_grad():
            for live, kept in self._plan.tensors:
                torch._foreach_copy_(*((live, kept) if back else (kept, live)))
        return True

    def _make_plan(self) -> None:
        """Note which tensors go where, if every one of them has its place by now."""
        pairs: _Pairs = [(tensor, self._tensors[name]) for name, tensor in self._live().items()]
        slots = []
        if self.optimizer is not None:
            for parameter, kept in zip(self._parameters(), self._slots, strict=True):
                slot = self.optimizer.state.get(parameter, {})
                known = all(isinstance(value, Tensor) for value in (*slot.values(), *kept.values()))
                if not slot or slot.keys() != kept.keys() or not known:
                    self._plan = None
                    return
                slots.append((parameter, slot, dict(slot)))
                pairs += [(slot[key], kept[key]) for key in slot]
        self._plan = _Plan(grouped(pairs), slots)

    def module_state(self) -> dict[str, Tensor]:
        """The copied weights and buffers, as in the module's ``state_dict``."""
        return dict(self._tensors)

    def state_dict(self) -> dict[str, Any]:
        """All of it; empty if nothing has been copied yet."""
        if not self.taken:
            return {}
        return {
            "about": dict(self.about or {}),
            "tensors": dict(self._tensors),
            "slots": self._slots,
            "groups": self._groups,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; tensors move to where the module's are."""
        self.about = dict(state["about"]) if state else None
        self._plan = None
        if not state:
            return
        live = self._live()
        require_form(
            {name: tensor.detach() for name, tensor in live.items()}, state["tensors"], "tensors"
        )
        self._tensors = {
            name: tensor.to(live[name].device, copy=True)
            for name, tensor in state["tensors"].items()
        }
        if self.optimizer is not None:
            groups = [_settings(group) for group in self.optimizer.param_groups]
            require_form(groups, state["groups"], "groups", loose=True)
            check_slots(self.optimizer, dict(enumerate(state["slots"])))
            places = [(p, g) for g in self.optimizer.param_groups for p in g["params"]]
            self._slots = [
                {key: _like(parameter, group, key, value) for key, value in slot.items()}
                for (parameter, group), slot in zip(places, state["slots"], strict=True)
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
    with torch.no_grad():
        for to, source in grouped(pairs):
            torch._foreach_copy_(to, source)


def _like(parameter: Tensor, group: Mapping[str, Any], key: str, value: Any) -> Any:
    """A copy of a saved slot, where torch's optimizers look for it, in the parameter's layout."""
    if not isinstance(value, Tensor):
        return value
    return laid_out(state_to_device(key, value.clone(), group, parameter.device), parameter)
