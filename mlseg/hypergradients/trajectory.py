"""What a level remembers of its last steps, so that a method can take them again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlseg.hypergradients.second_order.fused import SecondOrder
from mlseg.hypergradients.taken_along import TakenAlong
from mlseg.randomness import RandomState
from mlseg.transfer import batch_to_device, state_to_device


@dataclass(frozen=True)
class Keeps:
    """What a method wants of each of a level's last steps.

    Attributes:
        steps: how many of them; 0 for nothing at all.
        moments: the optimizer's state before the step.
        gradient: the gradient that it stepped along, all of it: over accumulated batches, with what
            came from levels below, before clipping.
        graphs: of how many, the last ones before an upper level steps, the graph of that gradient,
            which the step builds for the purpose.
        second_order: by whose formulas that graph is differentiated.
        by_inputs: of the last step before a hop also the gradient by the hop's inputs
            (:mod:`mlseg.hypergradients.taken_along`).
        states: of how many steps, spread over a whole window, weights and moments are kept, from
            which the others are taken again (:mod:`mlseg.hypergradients.checkpoints`); 0 for all.
    """

    steps: int = 0
    moments: bool = False
    gradient: bool = False
    graphs: int = 0
    second_order: SecondOrder = "torch"
    states: int = 0
    by_inputs: bool = False


@dataclass
class Step:
    """One step of an optimizer, as it was taken.

    Attributes:
        weights: of the level's trainable parameters before the step.
        moments: per parameter, the tensors of the optimizer's state before it, by name; empty where
            there was none, or none are kept.
        groups: per parameter, the settings of its group (``lr``, ``betas``, ...) in this step and
            the group's ``index``; None for one that the optimizer doesn't hold.
        seen: each accumulated batch and the random state in which it was evaluated.
        gradient: per parameter; None for one that had no gradient, which the optimizer then left as
            it was. Empty where it isn't kept.
        stepped: per parameter, whether it had a gradient.
        places: per accumulated batch, by what it can be drawn again in place of that in ``seen``;
            None where that is kept. Empty unless few states are stored.
        losses: per accumulated batch, its share of the step's loss; likewise.
        leaves: in place of the parameters in ``graphs``.
        graphs: per accumulated batch, the gradient by ``leaves`` with its graph.
    """

    weights: list[Tensor]
    moments: list[dict[str, Tensor]] = field(default_factory=list)
    groups: list[dict[str, Any] | None] = field(default_factory=list)
    seen: list[tuple[Any, RandomState | None]] = field(default_factory=list)
    gradient: list[Tensor | None] = field(default_factory=list)
    stepped: list[bool] = field(default_factory=list)
    places: list[Any] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    graphs: list[Sequence[Tensor | None]] = field(default_factory=list)


class Trajectory:
    """The last steps of a level, oldest first. Storage is reused once all places are taken.

    Args:
        keeps: how many, and what of each.

    Attributes:
        steps: as far as they are kept.
        taken_along: the last step's gradient by the hop's inputs, where it is; a resumed run hasn't
            it.
    """

    def __init__(self, keeps: Keeps) -> None:
        self.keeps = keeps
        self.taken_along: TakenAlong | None = None
        self.steps: deque[Step] = deque()
        self._open: Step | None = None
        self._spare: Step | None = None
        self._parameters: list[Tensor] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a step has begun and not ended: gradients are being accumulated."""
        return self._open is not None

    def begin(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, left: int = 0
    ) -> None:
        """A step starts: keep the weights, the moments and the settings that it starts from.

        Args:
            left: how many steps follow it before the levels above may step.
        """
        if self.steps and not self._are_of(parameters):
            self.steps.clear()  # parameters were frozen or thawed: another space
            self._spare = None
        self._parameters = list(parameters)
        old, self._spare = self._spare, None
        states = [optimizer.state.get(p, {}) for p in parameters] if self.keeps.moments else []
        self._open = Step(
            weights=copy_of([p.detach() for p in parameters], old.weights if old else None),
            moments=[
                copy_of_state(state, old.moments[i] if old else {})
                for i, state in enumerate(states)
            ],
            groups=group_settings(parameters, optimizer),
        )

    def see(
        self,
        batch: Any,
        random_state: RandomState | None,
        loss: Tensor | None = None,
        place: Any = None,
    ) -> None:
        """A batch has been evaluated.

        Args:
            loss: what it gave, divided by the number of accumulated batches.
            place: by which it can be drawn again, where it can.
        """
        assert self._open is not None
        self._open.seen.append((batch, random_state))

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the open step began with these parameters; of a restored one nothing is known."""
        known = self._parameters
        return known is None or [id(p) for p in known] == [id(p) for p in parameters]

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether there are no steps, or they are of these parameters."""
        return not self.steps or self._are_of(parameters)

    def leaves(self) -> list[Tensor]:
        """Fresh leaves with the open step's weights, for its graph."""
        assert self._open is not None
        if not self._open.leaves:
            self._open.leaves = [w.clone().requires_grad_() for w in self._open.weights]
        return self._open.leaves

    def add_graph(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradient of the batch just seen by :meth:`leaves`, with its graph."""
        assert self._open is not None
        self._open.graphs.append(gradients)

    def end(self, parameters: Sequence[Tensor], clipped_later: bool) -> None:
        """The gradient is complete and the optimizer about to step along it.

        Args:
            clipped_later: the gradients are about to be scaled in place, so that they are copied.
        """
        assert self._open is not None
        gradient = [p.grad for p in parameters]
        self._open.stepped = [g is not None for g in gradient]
        if self.keeps.gradient:
            self._open.gradient = [
                g.clone() if clipped_later and g is not None else g for g in gradient
            ]
        self.steps.append(self._open)
        self._open = None
        if len(self.steps) > self.keeps.graphs:
            old = self.steps[-1 - self.keeps.graphs]
            old.leaves, old.graphs = [], []
        if len(self.steps) > self.keeps.steps:
            self._spare = self.steps.popleft()

    def _are_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the steps are of these parameters; of restored ones only shapes are known."""
        known = self._parameters
        if known is not None and [id(p) for p in known] != [id(p) for p in parameters]:
            return False
        return [w.shape for w in self.steps[-1].weights] == [p.shape for p in parameters]

    def state_dict(self) -> dict[str, Any]:
        """All of it but the graphs."""
        return {
            "steps": [_step_state(step) for step in self.steps],
            "open": None if self._open is None else _step_state(self._open),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Restore :meth:`state_dict`."""
        self.steps = deque(_step_from(values, device) for values in state["steps"])
        self._open = None if state["open"] is None else _step_from(state["open"], device)


_SAVED = ("weights", "moments", "groups", "seen", "gradient", "stepped")
_SAVED_WITH_STATES = ("places", "losses")
"""Where few states are stored."""


def _step_state(step: Step) -> dict[str, Any]:
    more = _SAVED_WITH_STATES if step.places else ()
    return {name: getattr(step, name) for name in (*_SAVED, *more)}


def _step_from(values: dict[str, Any], device: torch.device | str) -> Step:
    seen = [
        (batch_to_device(batch, device), random_state) for batch, random_state in values["seen"]
    ]
    moments = [
        {k: state_to_device(k, v, group or {}, device) for k, v in state.items()}
        for state, group in zip(values["moments"], values["groups"], strict=False)
    ]
    rest = {
        name: batch_to_device(values[name], device)
        for name in _SAVED
        if name not in ("seen", "moments")
    }
    more = {name: values[name] for name in _SAVED_WITH_STATES if name in values}
    return Step(seen=seen, moments=moments, **rest, **more)


def copy_of(tensors: list[Tensor], into: list[Tensor] | None) -> list[Tensor]:
    """Copies, in the memory of ``into`` where that fits."""
    if into is None or len(into) != len(tensors):
        return [t.clone() for t in tensors]
    torch._foreach_copy_(into, tensors)
    return into


def copy_of_state(state: dict[str, Any], into: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors of an optimizer's state, likewise."""
    tensors = {k: v.detach() for k, v in state.items() if isinstance(v, Tensor)}
    if into.keys() != tensors.keys():
        return {k: v.clone() for k, v in tensors.items()}
    for key, value in tensors.items():
        into[key].copy_(value)
    return into


def group_settings(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any] | None]:
    """:attr:`Step.groups`, as they are now."""
    by_parameter: dict[int, dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        settings = {
            k: v.detach().clone() if isinstance(v, Tensor) else v
            for k, v in group.items()
            if k != "params"
        }
        by_parameter |= {id(p): {**settings, "index": index} for p in group["params"]}
    return [by_parameter.get(id(p)) for p in parameters]


def present(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Step:
    """The step that the optimizer would take next, at its present weights and moments."""
    return Step(
        weights=[p.detach() for p in parameters],
        moments=[
            {k: v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
            for p in parameters
        ],
        groups=group_settings(parameters, optimizer),
        stepped=[True] * len(parameters),
    )
