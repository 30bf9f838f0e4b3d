"""How one level is trained, and how its best response is differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import betty.configs

from mlseg.hypergradients import Method, names, resolve

SchedulerClock = Literal["iteration", "epoch", "validation"]


@dataclass
class Config(betty.configs.Config):
    """Betty's problem settings, and how the level's best response is differentiated.

    Attributes:
        hypergradient: a method's name, a mapping of ``method`` and its settings, or a ``Method``.
            It is used when an upper level's gradient passes through this level.
        scheduler_step: when the learning-rate scheduler steps: after each ``iteration`` in which
            the optimizer stepped, each ``epoch`` of the first loader, or each ``validation`` (with
            the monitored metric, if the scheduler takes one).

    Betty's ``type`` names the method where ``hypergradient`` doesn't; without either it is
    ``finite_difference``. ``precision`` is ``fp32`` or ``bf16``.
    """

    type: str = ""
    hypergradient: str | Mapping[str, Any] | Method | None = None
    scheduler_step: SchedulerClock = "iteration"

    def __post_init__(self) -> None:
        if self.type not in ("", *names()):
            raise ValueError(
                f"type {self.type!r} is no method of mlseg ({', '.join(names())}); set "
                "hypergradient, or give the problem a betty.configs.Config for one of Betty's"
            )
        method = resolve(self.hypergradient or self.type or "finite_difference")
        if self.type not in ("", method.method):
            raise ValueError(f"type {self.type!r} and hypergradient {method.method!r} disagree")
        self.hypergradient, self.type = method, method.method
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r}: choose fp32 or bf16")
        if self.scheduler_step not in ("iteration", "epoch", "validation"):
            raise ValueError(
                f"scheduler_step {self.scheduler_step!r}: choose iteration, epoch or validation"
            )
