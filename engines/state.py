"""An engine's state as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlseg import randomness
from mlseg.errors import UserError, one_line

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine

_PLAIN = (
    "stage_step",
    "best",
    "last_validation",
    "validations_without_best",
    "stopped_early",
    "finished",
    "seconds",
)
"""Attributes of the engine that are saved as they are."""


def whole(engine: Engine) -> dict[str, Any]:
    """Everything that the next iteration depends on, and where the records stand."""
    plain = {name: getattr(engine, f"_{name}") for name in _PLAIN}
    return {
        **_description(engine),
        "problems": {problem.name: problem.state_dict() for problem in engine.problems},
        "engine": {
            "global_step": engine.global_step,
            **plain,
            "stage": engine._stage.name,
            "logged": engine._logged,
        },
        "hooks": {hook.name: hook.state_dict() for hook in engine._hooks if hook.name},
        **({"env": engine.env.state_dict()} if keeps_state(engine.env) else {}),
        "random_state": randomness.capture(engine.device),
        "records": engine._recorder.state_dict(),
    }


def keeps_state(env: Any) -> bool:
    """Whether an environment of Betty's can be saved and taken up again."""
    return all(callable(getattr(env, f"{what}state_dict", None)) for what in ("", "load_"))


def best(engine: Engine) -> dict[str, Any]:
    """What ``best.pt`` holds: every problem's module as it is now, nothing to train on with."""
    state = {
        **_description(engine),
        "problems": {p.name: {"module": p.module.state_dict()} for p in engine.problems},
        "engine": {"global_step": engine.global_step, "best": engine._best},
    }
    for hook in engine._hooks:
        state = hook.best_state(engine, state)
    return state


def restore(engine: Engine, state: Mapping[str, Any]) -> None:
    """Go on from :func:`whole`.

    Raises:
        UserError: it is of another program.
    """
    own = state["engine"]
    names = [stage.name for stage in engine._stages]
    if own["stage"] not in names:
        raise UserError(
            f"the checkpoint is in stage {own['stage']!r}, this run has {', '.join(names)}; "
            "resume with the config it was started with"
        )
    engine.enter_stage(names.index(own["stage"]))
    for name in _PLAIN:
        setattr(engine, f"_{name}", own[name])
    engine.global_step = own["global_step"]
    engine._logged = dict(own["logged"])
    for problem in engine.problems:
        try:
            problem.load_state_dict(state["problems"][problem.name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"problem {problem.name!r} doesn't fit the checkpoint "
                f"({one_line(error)}); resume with the config it was started with"
            ) from error
    # The first versions kept them in two places.
    saved = state["hooks"] if "hooks" in state else {**state, **state["companions"]}
    for hook in engine._hooks:
        if hook.name in saved:
            hook.load_state_dict(saved[hook.name])
    if "env" in state and keeps_state(engine.env):
        engine.env.load_state_dict(state["env"])
    engine._recorder.load_state_dict(state["records"])
    randomness.restore(state["random_state"], engine.device)


def _description(engine: Engine) -> dict[str, Any]:
    """What every checkpoint holds beside the problems' states."""
    return {key: value for hook in engine._hooks for key, value in hook.description(engine).items()}
