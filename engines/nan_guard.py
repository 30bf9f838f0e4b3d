"""Watches losses on the device and names the first that is not finite."""

from collections.abc import Sequence

import torch
from betty.problems import Problem as BettyProblem
from torch import Tensor

from mlseg.multilevel.problem import Problem

_NEVER = torch.iinfo(torch.int64).max


class NanGuard:
    """For each problem, the first step at which its loss was NaN or infinite.

    The steps are kept on the device, so that watching costs a few tiny kernels and no
    synchronisation; :meth:`first` reads them.
    """

    def __init__(self, problems: Sequence[BettyProblem], device: torch.device | str) -> None:
        self._names = [problem.name for problem in problems]
        self._steps = {
            n: torch.full((), _NEVER, dtype=torch.int64, device=device) for n in self._names
        }

    def watch(self, problems: Sequence[BettyProblem], step: int) -> None:
        """Note the losses of the problems' last steps."""
        for problem in problems:
            loss = problem._metrics.get("loss") if isinstance(problem, Problem) else None
            if isinstance(loss, Tensor):
                seen = torch.where(torch.isfinite(loss.detach()), _NEVER, step)
                torch.minimum(self._steps[problem.name], seen, out=self._steps[problem.name])

    def first(self) -> tuple[str, int] | None:
        """The problem and step that came first, or None; synchronises."""
        steps = torch.stack([self._steps[n] for n in self._names]).tolist()
        step = min(steps)
        return None if step == _NEVER else (self._names[steps.index(step)], step)


def all_finite(problem: BettyProblem) -> bool:
    """Whether all of a problem's parameters are finite; synchronises."""
    parameters = [p.detach() for p in problem.module.parameters()]
    if not parameters:
        return True
    return bool(torch.stack(torch._foreach_norm(parameters)).isfinite().all())
