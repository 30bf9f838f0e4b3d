"""The controller's transitions are the same whatever the other parts of the game are told."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transitions import TABLE, UNIT, loop, numbers

from mlseg.engines.lookahead.loop import LookaheadLoop

pytestmark = pytest.mark.slow  # trains for seconds

SETTINGS: dict[str, dict[str, Any]] = {
    "fakes of a half": {"fakes.fraction": 0.5},
    "in files": {"buffer_limit_mib": 0.0, "fakes.fraction": 0.34},
    "momentum dropped": {"lookahead.momentum": "drop"},
    "hybrid, summed": {"adversarial.cross_entropy": 1.0, "adversarial.reduction": "sum"},
    "workshop": {
        "adversarial.relaxation": "gumbel", "adversarial.temperature": 20.0,
        "adversarial.loss": "saturating", "adversarial.weight": 0.5,
    },
    "straight through": {"adversarial.relaxation": "straight_through"},
    "label maps alone": {"discriminator.sees": "maps"},
    "black elsewhere": {"discriminator.masked_range": "unit"},
    "statistics move": {"adversarial.freeze_batch_norm": False},
    "one optimizer": {"discriminator_training.keep_optimizer": True},
    "converged": {"convergence": {"epochs": 1, "gain": 1.0}},
}  # fmt: skip


CASES = ("figure 1", "restarts")
"""In turn: the others are the controller's alone."""


@pytest.mark.parametrize(
    ("name", "case"), [(name, CASES[i % 2]) for i, name in enumerate(SETTINGS)]
)
def test_transitions(name: str, case: str, tmp_path: Path) -> None:
    own, script, buffers = TABLE[case]
    changes = {
        "pretraining": {"weighted_epochs": 0, "epochs": 1},
        "discriminator_training.max_epochs": 1,
        "pictures": 0,
        **{f"lookahead.{key}": value for key, value in own.items()},
        "lookahead.beta_l": 5 / UNIT,
        "lookahead.beta_u": 1 / UNIT,
        **SETTINGS[name],
    }
    engine: Any = tiny.build("load", changes, tmp_path)
    hook = loop(engine)
    answers = [mu for cycle in numbers(script) for mu in cycle]
    seen: list[list[str]] = []
    models: dict[str, Any] = {}

    def miou(module: Any) -> float:
        started = hook.controller.cycle > 0
        updates = hook.controller.updates + started
        models[f"g{updates}"] = copy.deepcopy(dict(module.state_dict()))
        return answers[updates - 1] if started else 50 / UNIT

    def restore(hook: Any, engine: Any, values: Any) -> None:
        LookaheadLoop._AT_ONCE["restore"](hook, engine, values)
        start = models[hook.controller.start]
        assert tiny.same(dict(engine.generator.module.state_dict()), start)

    def train(hook: Any, engine: Any, values: Any) -> bool:
        over = LookaheadLoop._WORK["train"](hook, engine, values)
        if over:
            seen.append(hook.buffer.labels)
        return over

    hook.hold_out.miou = miou
    vars(hook)["_AT_ONCE"] = {**LookaheadLoop._AT_ONCE, "restore": restore}
    vars(hook)["_WORK"] = {**LookaheadLoop._WORK, "train": train}
    engine.run()
    assert engine.stopped_early
    # The last change of the buffer is after the last training.
    assert [",".join(labels) for labels in [*seen[1:], hook.buffer.labels]] == buffers
    images = torch.cat([hook.train.images, hook.hold_out.samples.images])
    for position, label in enumerate(hook.buffer.labels):
        engine.generator.module.load_state_dict(models[label])
        expected = hook.hold_out.maps(engine.generator.module, images)
        everything = torch.arange(len(images))
        found = hook.buffer.gather(torch.full_like(everything, position), everything)
        assert torch.equal(found, expected), label
