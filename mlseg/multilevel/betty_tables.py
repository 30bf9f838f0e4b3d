"""Betty's table of hypergradient methods; the one place that reads or writes it.

Every method of ours, and a user's own however late it is registered, is entered in Betty's table
too, so that Betty's own engine finds it as ``Config(type=name)`` for a level that derives from
:class:`mlseg.Problem`. Where Betty has a method of that name, levels with a config of Betty's keep
Betty's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from betty.hypergradient import jvp_fn_mapping
from betty.problems import Problem as BettyProblem
from torch import Tensor

from mlseg.errors import RunError
from mlseg.hypergradients import Hop, Vector, registry
from mlseg.multilevel.revisiting import Revisitable

BETTYS = dict(jvp_fn_mapping)
"""Betty's own methods, for problems with a config of Betty's."""


def carry_by_bettys(
    vector: Vector, level: BettyProblem, sources: Sequence[BettyProblem]
) -> list[Vector]:
    """Carry an outer gradient over a hop by the method of the level's ``type``, in Betty's way.

    Betty's methods go to one source at a time.
    """
    registry.METHODS.registered(plugins=False)  # Betty's table has all of ours from here on
    method = jvp_fn_mapping[level.config.type]
    with level.again.untraced() if isinstance(level, Revisitable) else nullcontext():
        return [list(method(vector, level, source, False)) for source in sources]


def _for_betty(name: str) -> Callable[..., list[Tensor] | None]:
    """Our method under Betty's calling convention ``(vector, curr, prev, sync)``."""

    def method(vector: list[Tensor], curr: Any, prev: Any, sync: bool) -> list[Tensor] | None:
        ours = isinstance(curr, Revisitable)
        if name in BETTYS and not (ours and curr.method is not None):
            with curr.again.untraced() if ours and not curr.replaying else nullcontext():
                return _bettys(name, vector, curr, prev, sync)
        if not ours:
            raise TypeError(
                f"{name} replays the step of problem {curr.name!r}: derive it from mlseg.Problem"
            )
        (gradient,), _ = curr.hypergradient(list(vector), Hop(curr, [prev]))
        if not sync:
            return gradient
        prev.set_grads(prev.trainable_parameters(), gradient)
        return None

    return method


def _bettys(name: str, vector: Any, curr: Any, prev: Any, sync: bool) -> Any:
    """Betty's method; one line where the level's loss is nothing that it can differentiate."""
    try:
        return BETTYS[name](vector, curr, prev, sync)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        if isinstance(curr.training_step_exec(curr.cur_batch), Tensor):
            raise
        raise RunError(
            f"problem {curr.name!r}: its training_step returns a dict, which Betty's {name} can't "
            "differentiate; return the loss alone, or derive it from mlseg.Problem"
        ) from error


def is_bettys(level: BettyProblem) -> bool:
    """Whether upper levels' gradients pass through ``level`` by a method of Betty's own."""
    ours = isinstance(level, Revisitable) and level.method is not None
    return not ours and level.config.type in BETTYS


def known_types() -> frozenset[str]:
    """What a config's ``type`` may be: Betty's methods, ours, and a user's own."""
    registry.METHODS.registered(plugins=False)
    return frozenset(jvp_fn_mapping)


def _enter(name: str) -> None:
    jvp_fn_mapping[name] = _for_betty(name)


for _name in BETTYS:
    _enter(_name)
registry.listen(_enter)
