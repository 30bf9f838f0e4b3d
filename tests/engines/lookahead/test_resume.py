"""LoAd, interrupted in each of its phases, is the uninterrupted run."""

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from resuming import check
from transitions import loop

from mlseg.engines.engine import Engine

pytestmark = pytest.mark.slow  # trains for seconds

SCORES = [0.5, 0.53, 0.52, 0.51, 0.49, 0.44, 0.5, 0.52, 0.51, 0.56, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


def lookahead(out: Path, limit_mib: float = 1.0, control: int | None = None) -> Engine:
    """Two peaks, three cycles without one. The numbers depend on the number of updates alone."""
    changes = {
        "pretraining": {"weighted_epochs": 1, "epochs": 2},
        "lookahead": {"cycles": 2, "patience": 3},
        "discriminator.dropout": 0.2,
        "adversarial.relaxation": "gumbel",
        "buffer_limit_mib": limit_mib,
        "control": control,
        "engine.validate_every": 4,
        "pictures": 0,
    }
    engine: Any = tiny.build("load", changes, out)
    hold_out, controller = loop(engine).hold_out, loop(engine).controller
    measure = hold_out.miou

    def miou(module: Any) -> float:
        measure(module)
        return SCORES[controller.updates + (controller.cycle > 0)]

    hold_out.miou = miou
    return engine


def phases(engine: Any) -> list[str]:
    """What each iteration of a run does."""
    found: list[str] = []
    former = engine.train_step

    def train_step() -> None:
        queue = loop(engine)._queue
        ahead = loop(engine).in_charge(engine) and queue
        found.append(queue[0].action if ahead else engine.stage.name)
        former()

    engine.train_step = train_step
    engine.run()
    return found


@pytest.mark.parametrize("how", ["saved", "killed"])
@pytest.mark.parametrize("limit_mib", [1.0, 0.0])
def test_lookahead_at_random_moments(tmp_path: Path, limit_mib: float, how: str) -> None:
    """In stage 1, in a cycle, in the discriminator's training and while label maps are made."""
    made = phases(lookahead(tmp_path / "all", limit_mib))
    draw = random.Random(how)
    stops = {
        draw.choice([step for step, phase in enumerate(made, 1) if phase == wanted])
        for wanted in ("cross_entropy", "append", "append", "train", "train", "step", "step")
    }
    check(lambda out: lookahead(out, limit_mib), tmp_path, sorted(stops), how)


def test_the_control_of_the_lookahead(tmp_path: Path) -> None:
    check(lambda out: lookahead(out, control=7), tmp_path, [3, 7, 9, 12], "saved")
