"""The levels of an engine, set up on the graph of one stage after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import betty.engine
import torch
from betty.logging import logger as betty_logger
from betty.logging.logger_base import get_logger
from betty.problems import Problem as BettyProblem

from mlseg import parallel
from mlseg.engines import several
from mlseg.engines.settings import Dependencies, Stage, both_ways
from mlseg.machine import choose_device
from mlseg.multilevel.graph import KnowsLevels, introduce
from mlseg.multilevel.plain import check_graph, check_hops, check_problem, told_of_rebuilding
from mlseg.multilevel.problem import Problem


class Staged(KnowsLevels, betty.engine.Engine):
    """The part of an :class:`~mlseg.engines.engine.Engine` that knows where its levels stand."""

    _as_on_betty: bool
    _stages: list[Stage]
    _stage_index: int
    _stage_step: int
    _stopped_early: bool
    _wanted_device: str | torch.device
    leaves: list[BettyProblem]

    def initialize(self) -> None:
        """Betty's set-up: what can't run is said first, nothing is announced."""
        self.parse_config()
        several.check(self)
        shared = self.configure_systems()
        self.logger = betty_logger(self.logger_type)
        introduce(self.problems, self)
        for problem in self.problems:
            check_problem(problem, torch.device(self.device))
        self.parse_dependency()
        if self.env is not None:
            self.env.configure_distributed_training(shared)
            self.env.configure_device(self.device)
            self.env.initialize()
        for problem in self.problems:
            self._initialize(problem, shared)

    def _initialize(self, problem: BettyProblem, shared: dict[str, Any]) -> None:
        problem.add_logger(self.logger)
        problem.configure_distributed_training(shared)
        problem.configure_device(self.device)
        problem.configure_roll_back(self._roll_back)
        console = get_logger()
        level = console.level
        console.setLevel("WARNING")
        try:
            with told_of_rebuilding(problem):
                problem.initialize()
        finally:
            console.setLevel(level)
        if self.env is not None:
            problem.add_env(self.env)

    def set_problem_attr(self, problem: BettyProblem) -> str:
        """Betty's makes an attribute of the problem; here :func:`introduce` has made it known."""
        return str(problem.name)

    def configure_systems(self) -> dict[str, Any]:
        """Choose the device. What several processes share, Betty isn't told of: only who writes."""
        self._rank = parallel.rank()
        device = choose_device(self._wanted_device)
        # Betty's is a string, which programs compare.
        self.device: Any = str(device) if self._as_on_betty else device
        return {
            "strategy": "default",
            "backend": None,
            "world_size": 1,
            "rank": parallel.rank(),
            "local_rank": 0,
        }

    def parse_dependency(self) -> None:
        """Betty's parsing; a problem that is idle in this stage is no leaf.

        Raises:
            UserError: the dependencies are no graph of these problems.
        """
        check_graph(*both_ways(self.dependencies), self.problems)
        super().parse_dependency()
        active = self._stage.problems
        if active is not None:
            self.leaves = [p for p in self.leaves if any(p is a for a in active)]

    @property
    def _stage(self) -> Stage:
        """The present stage."""
        return self._stages[self._stage_index]

    @property
    def _total_iterations(self) -> int | None:
        """Over all stages; None where a hook ends one of them."""
        if any(stage.open_ended for stage in self._stages):
            return None
        return sum(stage.iterations for stage in self._stages)

    def _is_due(self, every: int) -> bool:
        last = self._stage_step == self._stage.iterations
        return every > 0 and (self._stage_step % every == 0 or last)

    def _is_over(self) -> bool:
        """Whether the run ends here, with a checkpoint of its own."""
        last_stage = self._stage_index == len(self._stages) - 1
        return self._stopped_early or (last_stage and self._stage_step == self._stage.iterations)

    def enter_stage(self, index: int) -> None:
        """Make stage `index` the present one: its graph, its leaves."""
        self._stage_index = index
        self.set_dependency({"u2l": self._stage.u2l, "l2u": self._stage.l2u})

    def set_dependency(self, dependencies: Mapping[str, Dependencies]) -> None:
        """Give the present stage another graph.

        Raises:
            UserError: it is none, or a level on it can't be passed by upper levels' gradients.
        """
        self._stage.u2l, self._stage.l2u = both_ways(dependencies)
        super().set_dependency(dependencies)
        for problem in self.problems:
            check_hops(problem, self.problems)
            if isinstance(problem, Problem):
                problem.connect()
            else:
                problem.ready = [False] * len(problem.children)
