"""A generator that also steps along what the segmentor's validation loss asks of it.

On its way to the alphas the hypergradient passes the generator: what arrives there is the
derivative of the validation loss by the generator's weights, through the segmentor's step. It is
there at every iteration, and E2EAug uses it for the hop alone. Here the generator adds it to its
own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlseg.hypergradients import Hop, Vector
from mlseg.hypergradients.vectors import norm
from mlseg.problems.building import Setup
from mlseg.problems.e2eaug.levels import Generator


class GuidedGenerator(Generator):
    """Steps along ``g + r |g| / |u| u``, g its own gradient and u what the last hop brought.

    u is that of the iteration before: the hop comes after the generator's step. The first step has
    none. Both norms are over all parameters, and nothing is read from the device.

    Args:
        guidance: r, the relative size.
        guidance_steps: r falls to zero over so many guided steps, linearly; None: it stays.
    """

    def __init__(
        self, setup: Setup, *, guidance: float, guidance_steps: int | None = None, **settings: Any
    ) -> None:
        super().__init__(setup, **settings)
        self.guidance, self.guidance_steps = guidance, guidance_steps
        self._guide: Vector | None = None
        self._guided = 0

    def relative_size(self) -> float:
        """r at the next guided step."""
        left = 1.0 if self.guidance_steps is None else 1.0 - self._guided / self.guidance_steps
        return self.guidance * max(left, 0.0)

    def hypergradient(self, vector: Vector, hop: Hop) -> tuple[list[Vector], dict[str, Tensor]]:
        """Carry it on, and keep it for the next step."""
        self._guide = [v.detach().clone() for v in vector]
        return super().hypergradient(vector, hop)

    def grad_callback(self) -> None:
        """Add the guide to the whole gradient of a step."""
        size = self.relative_size()
        if self._guide is None or size == 0.0 or not self.gradient_accumulation_boundary():
            return
        gradients: Vector = []
        for p in self.trainable_parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        smallest = torch.finfo(gradients[0].dtype).tiny
        factor = size * norm(gradients) / norm(self._guide).clamp_min(smallest)
        torch._foreach_add_(gradients, torch._foreach_mul(self._guide, factor))
        self._guided += 1

    def state_dict(self) -> dict[str, Any]:
        """That of a generator, the guide of the next step, and the number of guided ones."""
        return {**super().state_dict(), "guide": self._guide, "guided": self._guided}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: the guide isn't one of these parameters, or the number of guided steps none,
                or missing where the size fades.
        """
        super().load_state_dict(state)
        held = state if isinstance(state, Mapping) else {}
        guide = state["guide"] if isinstance(state, Mapping) else None
        # Checkpoints from before there was a schedule have no number, and no need of one.
        if guide is not None and self.guidance_steps is not None and "guided" not in held:
            raise ValueError("no number of guided steps, over which level3.guidance_steps falls")
        guided = held.get("guided", 0)
        if not isinstance(guided, int) or guided < 0:
            raise ValueError(f"guided is {guided!r}, and no number of steps")
        self._guided = guided
        if guide is None:
            self._guide = None
            return
        parameters = list(self.trainable_parameters())
        if [g.shape for g in guide] != [p.shape for p in parameters]:
            raise ValueError("guide has other shapes than the parameters")
        self._guide = [g.to(p.device) for g, p in zip(guide, parameters, strict=True)]
