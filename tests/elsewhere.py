"""Programs on a device that any machine has and that gives no numbers away: torch's ``meta``.

Whatever is made on the host and meets a tensor of the device, and whatever looks at a number there
(``.item()``, ``bool(tensor)``, a boolean mask), is an error, as it would be an error or a wait on a
GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mlseg.engines.engine import Engine

DEVICE = torch.device("meta")


def send_away(engine: Engine) -> Engine:
    """The engine with networks, moments and batches on the device; figures are lost."""
    moved: dict[int, Tensor] = {}
    former: list[Tensor] = []  # kept, so that no later one gets the number of one that is gone

    def away(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            former.append(tensor)
            there = torch.empty_like(tensor, device=DEVICE)
            if isinstance(tensor, nn.Parameter):
                there = nn.Parameter(there, tensor.requires_grad)
            moved[id(tensor)] = there
        return moved[id(tensor)]

    for problem in engine.problems:
        held = [problem.module, *(v for v in vars(problem).values() if isinstance(v, nn.Module))]
        for module in {id(m): m for whole in held for m in whole.modules()}.values():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = away(tensor)
        if problem.optimizer is not None:
            for group in problem.optimizer.param_groups:
                group["params"] = [away(p) for p in group["params"]]
                group["fused"] = None  # a kernel of processors and GPUs alone
            state = problem.optimizer.state
            kept = {
                moved[id(p)]: {
                    k: away(v) if isinstance(v, Tensor) and v.dim() else v for k, v in s.items()
                }
                for p, s in state.items()
            }
            state.clear()
            state.update(kept)
        for name, value in vars(problem).items():
            if isinstance(value, Tensor):  # given to it on the run's device
                setattr(problem, name, away(value))
        problem.device = DEVICE
        _draw_away(problem)
        if hasattr(problem, "again"):
            # The first steps are held against their repetition, for which numbers are looked at.
            problem.again.connect()
            problem.again._begins = 1
    return engine


def iterate(engine: Engine) -> None:
    """A step of each level, without what the engine looks at in between."""
    engine.global_step += 1
    for problem in engine.leaves:
        problem.step(global_step=engine.global_step)


def _draw_away(problem: Any) -> None:
    draw: Callable[[], Any] = problem.get_batch

    def get_batch() -> Any:
        return tree_map(
            lambda x: torch.empty_like(x, device=DEVICE) if isinstance(x, Tensor) else x, draw()
        )

    problem.get_batch = get_batch
