"""An engine's state as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic import NonNegativeFloat, NonNegativeInt

from mlseg import checkpoint, config, parallel, randomness
from mlseg.checkpoint import taking
from mlseg.config import Settings
from mlseg.engines import several
from mlseg.engines.nan_guard import check_states
from mlseg.errors import UserError
from mlseg.multilevel import sharing
from mlseg.multilevel.problem import Problem

if TYPE_CHECKING:
    from mlseg.engines.engine import Engine
    from mlseg.engines.nan_guard import NanGuard


class Best(Settings):
    """The best validation so far."""

    model_config = pydantic.ConfigDict(extra="allow")

    metric: str
    value: float
    step: NonNegativeInt


class Loop(Settings):
    """Where the loop is; every attribute but ``stage`` is one of the engine's."""

    global_step: NonNegativeInt
    stage: str
    stage_step: NonNegativeInt
    best: Best | None
    last_validation: dict[str, Annotated[float, pydantic.Field(allow_inf_nan=True)]]
    validations_without_best: NonNegativeInt
    stopped_early: bool
    finished: bool
    seconds: NonNegativeFloat
    logged: dict[str, NonNegativeInt]

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Loop:
        for name, step in (("stage_step", self.stage_step), ("best.step", self.best_step)):
            if step > self.global_step:
                raise ValueError(f"{name} is {step}, after global_step, {self.global_step}")
        return self

    @property
    def best_step(self) -> int:
        """0 before there is a best one."""
        return 0 if self.best is None else self.best.step


_PLAIN = [name for name in Loop.model_fields if name not in ("global_step", "stage")]
"""Attributes of the engine that are saved as they are."""


def whole(engine: Engine) -> dict[str, Any]:
    """Everything that the next iteration depends on, and where the records stand."""
    plain = {name: getattr(engine, f"_{name}") for name in _PLAIN}
    state = {
        **_description(engine),
        "problems": {problem.name: problem.state_dict() for problem in engine.problems},
        "engine": {
            "global_step": engine.global_step,
            **plain,
            "stage": engine._stage.name,
        },
        "hooks": {hook.name: hook.state_dict() for hook in engine._hooks if hook.name},
        **({"env": engine.env.state_dict()} if keeps_state(engine.env) else {}),
        "random_state": randomness.capture(engine.device),
        "records": engine._recorder.state_dict(),
    }
    return several.joined(state)


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
        UserError: it is of another program or of another number of processes, or holds what no run
            writes.
    """
    with taking("the run"):
        state = several.own(state)
        own = dict(state["engine"])
        problems = dict(state["problems"])
        # The first versions kept them in two places.
        saved = dict(state["hooks"] if "hooks" in state else {**state, **state["companions"]})
    found = config.parse(Loop, config.Tree(own, source="engine"))
    names = [stage.name for stage in engine._stages]
    if found.stage not in names:
        raise UserError(
            f"the checkpoint is in stage {found.stage!r}, this run has {', '.join(names)}; "
            "resume with the config it was started with"
        )
    more = [name for name in problems if name not in {p.name for p in engine.problems}]
    if more:
        raise UserError(
            f"the checkpoint has a problem {str(more[0])[:40]!r}, which this run doesn't; resume "
            "with the config it was started with"
        )
    engine.enter_stage(names.index(found.stage))
    for name in _PLAIN:
        setattr(engine, f"_{name}", own[name])
    engine.global_step = found.global_step
    for problem in engine.problems:
        with taking(f"problem {problem.name!r}"):
            problem.load_state_dict(problems[problem.name])
    for hook in engine._hooks:
        if not hook.name:
            continue
        with taking(f"what belongs to {hook.name!r}"):
            hook.load_state_dict(saved[hook.name])
    if "env" in state and keeps_state(engine.env):
        with taking("the engine's env"):
            engine.env.load_state_dict(state["env"])
    with taking("the place in the records"):
        engine._recorder.load_state_dict(state["records"])
    with taking("the random state"):
        randomness.restore(state["random_state"], engine.device)
        sharing.set_draws(state.get("shared_draws"))


def write(engine: Engine, name: str, saved: dict[str, Any]) -> None:
    """Write ``saved`` as the checkpoint ``name`` of the run. All processes take part.

    Raises:
        RunError: something in it isn't finite, or it can't be written.
    """
    check_states(engine, saved["problems"])
    path = engine.checkpoint_path(name)
    if parallel.is_first():
        checkpoint.save(path, saved)
    parallel.together()  # what others read of it is there
    if path.name == checkpoint.LAST:
        engine._unproven = None


def take_up(
    engine: Engine, directory: Path, saved: Mapping[str, Any] | None, forget_best: bool
) -> None:
    """What :meth:`~mlseg.engines.engine.Engine.resume` does."""
    require_places(engine)
    for hook in engine._hooks:
        hook.resume(engine, directory)
    path = directory / "checkpoints" / checkpoint.LAST
    saved = checkpoint.load(path) if saved is None else saved
    try:
        engine.load_state_dict(saved)
        require_finite(engine._guard, saved)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    engine._unproven = path
    try:
        require_best(engine, path.parent)
    except UserError:
        if not forget_best:
            raise
        engine._best, engine._validations_without_best = None, 0


def require_places(engine: Engine) -> None:
    """Raise UserError where a part of the program keeps no state to go on from."""
    for problem in engine.problems:
        if not isinstance(problem, Problem):
            raise UserError(
                f"problem {problem.name!r} is plain Betty's, which keeps no place in its data: "
                "a run of it can't go on; derive it from mlseg.Problem, or start again"
            )
    if engine.env is not None and not keeps_state(engine.env):
        raise UserError(
            "the engine's env has no state_dict and load_state_dict, so that a run can't go "
            "on exactly; define both, or start again"
        )


def require_finite(guard: NanGuard, state: Mapping[str, Any]) -> None:
    """Raise UserError where a NaN or an infinity has been saved, as older versions may have."""
    found = guard.first_state(state["problems"])
    if found is not None:
        problem, kind, name = found
        raise UserError(
            f"{kind} of problem {problem!r} ({name}) is not finite; take another checkpoint of the "
            "run, or start the run again"
        )


def require_best(engine: Engine, folder: Path) -> None:
    """Raise UserError where the weights are gone that validation has chosen.

    Args:
        folder: of the run's checkpoints.
    """
    best = engine._best
    if best is None:
        return
    for name in dict.fromkeys(["best", *(n for hook in engine._hooks for n in hook.checkpoints)]):
        path = folder / f"{name}.pt"
        mend = "put the file back"
        if name == "best":
            mend += ", or choose the best weights anew from here on with --forget-best"
        fault = "missing"
        if path.exists():
            fault = "damaged"
            if checkpoint.whole(path):
                with taking(str(path), mend):
                    step = checkpoint.load(path)["engine"]["global_step"]
                # One that is newer than this state is found again on the way.
                if name != "best" or (isinstance(step, int) and step >= best["step"]):
                    continue
                fault = f"of step {str(step)[:20]}"
        raise UserError(
            f"{path}: {fault}, and the run needs it at its end (best {best['metric']} "
            f"{best['value']:.4g} at step {best['step']}); {mend}"
        )


def _description(engine: Engine) -> dict[str, Any]:
    """What every checkpoint holds beside the problems' states."""
    return {key: value for hook in engine._hooks for key, value in hook.description(engine).items()}
