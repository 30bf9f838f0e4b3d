"""How one level is trained, and how its best response is differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import betty.configs

from mlseg.compiling import check_backend
from mlseg.hypergradients import Method, names, resolve
from mlseg.hypergradients.registry import METHODS
from mlseg.multilevel.betty_tables import BETTYS

SchedulerClock = Literal["iteration", "epoch", "validation"]


_BETTYS_SETTINGS = {
    "darts_alpha": ("finite_difference", "epsilon"),
    "neumann_iterations": ("neumann", "terms"),
    "neumann_alpha": ("neumann", "step_size"),
    "cg_iterations": ("cg", "iterations"),
}

_BETTYS_ALONE = {
    "cg_alpha": "Betty's cg, which ours doesn't need: it solves to a tolerance, with damping",
    "sama_adam_alpha": "Betty's sama; ours has hypergradient={'method': 'sama', 'epsilon': ...}",
    "darts_multitask": "Betty's darts, which leaves the level's weights moved",
    "sama_multitask": "Betty's sama, which leaves the level's weights moved",
    "initial_dynamic_scale": "fp16, which mlseg.Problem doesn't do (precision='bf16')",
    "scale_factor": "fp16, which mlseg.Problem doesn't do (precision='bf16')",
}
"""What has no counterpart among ours."""


@dataclass
class Config(betty.configs.Config):
    """Betty's problem settings, and how the level's best response is differentiated.

    Attributes:
        hypergradient: a method's name, a mapping of ``method`` and its settings, or a ``Method``.
            It is used when an upper level's gradient passes through this level.
        scheduler_step: when the learning-rate scheduler steps: after each ``iteration`` in which
            the optimizer stepped, each ``epoch`` of the first loader, or each ``validation`` (with
            the monitored metric, if the scheduler takes one).
        compile: the level's module is compiled by torch.compile, in place: by its default backend,
            or by the one named. Methods with second derivatives are refused then.

    Settings of Betty's own methods (``darts_alpha``, ``cg_alpha``, ...) and of fp16 are refused.
    Betty's ``type`` names the method where ``hypergradient`` doesn't; without either it is
    ``finite_difference``. ``precision`` is ``fp32`` or ``bf16``.
    """

    type: str = ""
    hypergradient: str | Mapping[str, Any] | Method | None = None
    scheduler_step: SchedulerClock = "iteration"
    compile: bool | str = False

    def __post_init__(self) -> None:
        for name, (ours, setting) in _BETTYS_SETTINGS.items():
            if getattr(self, name) != getattr(betty.configs.Config, name):
                raise ValueError(
                    f"{name} is a setting of Betty's methods; write "
                    f"hypergradient={{'method': {ours!r}, {setting!r}: ...}}"
                )
        for name, why in _BETTYS_ALONE.items():
            if getattr(self, name) != getattr(betty.configs.Config, name):
                raise ValueError(
                    f"{name} is a setting of {why}; leave it out, or give the problem a "
                    "betty.configs.Config"
                )
        if self.type and self.type not in METHODS:
            raise ValueError(
                f"type {self.type!r} is no method of mlseg ({', '.join(names())}); set "
                "hypergradient, or give the problem a betty.configs.Config for one of Betty's"
            )
        method = resolve(self.hypergradient or self.type or "finite_difference")
        if self.type not in ("", method.name):
            raise ValueError(f"type {self.type!r} and hypergradient {method.name!r} disagree")
        self.hypergradient, self.type = method, method.name
        for name in ("unroll_steps", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r}: choose fp32 or bf16")
        if self.scheduler_step not in ("iteration", "epoch", "validation"):
            raise ValueError(
                f"scheduler_step {self.scheduler_step!r}: choose iteration, epoch or validation"
            )
        check_backend(self.compile)


def method_of(config: betty.configs.Config) -> Method | None:
    """The method of a problem's config; None where Betty's config names one of Betty's own."""
    if isinstance(config, Config):
        assert isinstance(config.hypergradient, Method)  # resolved when the config was made
        return config.hypergradient
    return resolve(config.type) if config.type not in BETTYS and config.type in METHODS else None
