"""SegAN, interrupted in each of its stages, is the uninterrupted run."""

from pathlib import Path

import pytest
import tiny
from resuming import check

pytestmark = pytest.mark.slow


# Steps 1 and 2 are the warm-up, 3 to 8 the game; an epoch is two steps.
@pytest.mark.parametrize("game", ["alternating", "stackelberg"])
@pytest.mark.parametrize("how", ["saved", "killed"])
def test_segan_in_each_stage(tmp_path: Path, how: str, game: str) -> None:
    changes = {
        "game": game,
        "warmup_epochs": 1,
        "augmentation": {"window": 24, "flip_vertical": 0.5, "saturation": 0.2},
        "problems.segmentor.scheduler": {"name": "linear"},
        "problems.critic.scheduler": {"name": "exponential", "factor": 0.5, "step": "epoch"},
        "engine.iterations": 6,
        "engine.checkpoint_every": 2,
    }
    check(lambda out: tiny.build("segan", changes, out), tmp_path, [1, 3, 4, 7], how)


def test_segan_with_more_steps_of_the_critic(tmp_path: Path) -> None:
    changes = {"problems.critic.unroll_steps": 2, "engine.iterations": 7}
    check(lambda out: tiny.build("segan", changes, out), tmp_path, [1, 2, 5], "saved")
