"""Stage 1 until further epochs gain nothing: when it ends, at which model, and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from resuming import check

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.problems.load.convergence import Convergence

# Epoch by epoch. The first is stage 1's own; 0.41 gains a tenth, 0.45 in steps too small to count.
SCORES = [0.30, 0.31, 0.41, 0.43, 0.45, 0.44, 0.40, 0.39]
SETTINGS = {
    "pretraining": {"weighted_epochs": 0, "epochs": 1},
    "convergence": {"epochs": 3, "gain": 0.05},
    "pictures": 0,
    "lookahead": {"cycles": 1, "patience": 1},
    "discriminator_training.max_epochs": 1,
    "engine.validate_every": 1,
}


def made(out: Path | None = None, **changes: Any) -> Any:
    engine: Any = tiny.build("load", {**SETTINGS, **changes}, out)
    if changes.get("convergence", "there") is not None:
        hook = engine.hook(Convergence)
        measure = hook.validation.miou

        def miou(module: Any) -> float:
            assert 0 <= measure(module) <= 1
            return SCORES[engine.stage_step // hook.epoch - 1]

        hook.validation.miou = miou
    return engine


def test_it_ends_at_the_best_model(tmp_path: Path) -> None:
    """The mark is 0.41; 0.43, 0.45 and 0.44 are below 0.46. The best is the fifth."""
    engine = made(tmp_path)
    weights: dict[int, Any] = {}
    former = engine.train_step

    def train_step() -> None:
        former()
        if engine.stage.name == "cross_entropy":
            state = engine.pretraining.module.state_dict()
            weights[engine.global_step] = {k: v.clone() for k, v in state.items()}

    engine.train_step = train_step
    engine.run()
    epoch = engine.hook(Convergence).epoch
    found = engine.results()["convergence"]
    assert found == {"epochs": 6, "miou": 0.45}
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (ended,) = (e for e in events if e["event"] == "converged")
    assert (ended["step"], ended["best_step"]) == (6 * epoch, 5 * epoch)
    state = checkpoint.load(tmp_path / "checkpoints" / "start.pt")
    start = state["problems"]["generator"]["module"]
    assert all(torch.equal(start[k], v) for k, v in weights[5 * epoch].items())


def test_without_it_stage_1_is_as_long_as_its_epochs() -> None:
    engine = made(convergence=None)
    engine.run(1)
    with pytest.raises(KeyError):
        engine.hook(Convergence)
    assert "convergence" not in engine.results()


def test_a_gain_of_nothing_never_ends() -> None:
    with pytest.raises(ValueError, match="gain"):
        made(convergence={"gain": 0.0})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["saved", "killed"])
def test_it_goes_on_bit_for_bit(tmp_path: Path, how: str) -> None:
    """Also where it has just ended: at six epochs of two steps."""

    def engine(out: Path) -> Engine:
        built: Engine = made(out)
        return built

    check(engine, tmp_path, [3, 9, 12, 13], how)
