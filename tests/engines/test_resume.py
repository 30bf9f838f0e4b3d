"""A run that is interrupted and resumed is the uninterrupted one, bit by bit."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.data import DataLoader, TensorDataset

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.interruption import Interrupted
from mlseg.engines.settings import EngineSettings
from mlseg.errors import UserError
from mlseg.testing import programs
from mlseg.testing.programs import GRAPHS, Graph, fit, imitate

Make = Callable[[Path], Engine]


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved after it."""


def stop_after(engine: Engine, step: int, how: str) -> None:
    """Have ``engine`` stop in the iteration ``step``: by SIGTERM, or dead on the spot."""
    former = engine.train_step

    def train_step() -> None:
        former()
        if engine.global_step == step:
            if how == "killed":
                raise Killed
            signal.raise_signal(signal.SIGTERM)

    engine.train_step = train_step


def ending(engine: Engine, out: Path) -> dict[str, Any]:
    """What must not depend on whether the run was interrupted."""
    state = checkpoint.load(out / "checkpoints" / "last.pt")
    del state["engine"]["seconds"]
    state["records"].pop("offsets")
    files = ("events.jsonl", "architecture.json")
    return {
        "state": state,
        "weights": tiny.weights(engine),
        "metrics": tiny.untimed((out / "metrics.jsonl").read_text()),
        "records": {f: (out / f).read_text() for f in files if (out / f).exists()},
        "best": engine.best,
    }


def check(make: Make, tmp_path: Path, stops: list[int], how: str) -> None:
    """Run through, run with a stop at each of ``stops``, compare."""
    engine = make(tmp_path / "through")
    engine.run()
    expected = ending(engine, tmp_path / "through")
    out = tmp_path / "stopped"
    engine = make(out)
    for stop in stops:
        stop_after(engine, stop, how)
        with pytest.raises(Killed if how == "killed" else Interrupted):
            engine.run()
        engine = make(out)
        if (out / "checkpoints" / "last.pt").exists():
            torch.manual_seed(99)  # a new process knows nothing of the old one's generators
            engine.resume(out)
    engine.run()
    found = ending(engine, out)
    for key in ("records", "best", "weights"):
        assert tiny.same(found[key], expected[key]), key
    for key, value in expected["state"].items():
        assert tiny.same(found["state"][key], value), key


# Steps 1 to 3 are pre-training, 4 to 7 the search.
@pytest.mark.parametrize("how", ["saved", "killed"])
@pytest.mark.parametrize("stops", [[1, 3, 5, 7], [2, 4, 6]])
def test_e2eaug_in_each_stage(tmp_path: Path, stops: list[int], how: str) -> None:
    changes = {"engine.checkpoint_every": 2, "engine.log_every": 2}
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, stops, how)


def test_e2eaug_unrolled_with_schedulers(tmp_path: Path) -> None:
    changes = {
        "engine.iterations": 6,
        "engine.log_every": 3,
        "problems.segmentor.unroll_steps": 2,
        "problems.segmentor.accumulate": 1,
        "problems.segmentor.scheduler": {"name": "cosine", "length": 6, "step": "epoch"},
    }
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, [6, 8], "saved")


@pytest.mark.parametrize("row", ["frozen", "decoder"])
def test_rows_of_e2eaug(tmp_path: Path, row: str) -> None:
    changes = {"frozen": {"gan.frozen": True}, "decoder": {"generator.search": "decoder"}}[row]
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, [5], "saved")


def test_supervised_with_augmentation_and_a_plateau(tmp_path: Path) -> None:
    changes = {
        "augmentation": "combine",
        "problems.segmentor.scheduler": {"name": "reduce_on_plateau", "patience": 1},
        "problems.segmentor.accumulate": 2,
        "engine.iterations": 9,
        "engine.validate_every": 1,
        "engine.checkpoint_every": 1,
        "engine.patience": 8,
    }
    check(lambda out: tiny.build("supervised", changes, out), tmp_path, [3, 4, 9], "saved")


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


# ----------------------------------------------------------------------------------- LoAd

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
    measure = engine.hold_out.miou

    def miou(module: Any) -> float:
        measure(module)
        return SCORES[engine.controller.updates + (engine.controller.cycle > 0)]

    engine.hold_out.miou = miou
    return engine


def phases(engine: Any) -> list[str]:
    """What each iteration of a run does."""
    found: list[str] = []
    former = engine.train_step

    def train_step() -> None:
        ahead = engine.looking_ahead and engine._queue
        found.append(engine._queue[0].action if ahead else engine.stage.name)
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


# ------------------------------------------------------------------------- torch's DataLoader


def shuffled(seed: int) -> Any:
    """Its order comes from torch's global generator."""
    x, y = (torch.cat(parts) for parts in zip(*programs.batches(seed), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=programs.BATCH, shuffle=True)


def shuffled_by_its_own(seed: int) -> Any:
    """Its order comes from a generator that it was given."""
    x, y = (torch.cat(parts) for parts in zip(*programs.batches(seed), strict=True))
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(x, y), batch_size=programs.BATCH, shuffle=True, generator=generator
    )


def toy(graph: Graph, iterations: int = 17, **options: Any) -> Make:
    # Odd lengths, so that what is logged, saved and stepped doesn't fall together.
    settings = EngineSettings(
        iterations=iterations,
        validate_every=5,
        checkpoint_every=2,
        log_every=3,
        tensorboard=False,
    )

    def make(out: Path) -> Engine:
        spec = {"method": "identity", "linearise": "before_step", "scale": "optimizer"}
        engine = programs.small(
            graph,
            spec,
            lambda params: torch.optim.Adam(params, 0.01),
            settings=settings,
            out=out,
            validation=lambda: {"size": engine.problems[-1].module.last.weight.norm()},
            **options,
        )
        return engine

    return make


@pytest.mark.parametrize("how", ["saved", "killed"])
@pytest.mark.parametrize("loader", [shuffled, shuffled_by_its_own, programs.batches])
def test_loaders_without_a_state_of_their_own(tmp_path: Path, loader: Any, how: str) -> None:
    """An epoch is 7 batches: stopped in the first, at its end, and in later ones."""
    make = toy(GRAPHS["two paths"], loader=loader)
    check(make, tmp_path, [3, 7, 8, 16], how)


# ---------------------------------------------------------------------------- unrolling

TWO_LEAVES = Graph(
    {
        "slow": fit("slow", "top"),
        "fast": fit("fast", "top"),
        "top": imitate("slow", "fast"),
    },
    {"slow": ["top"], "fast": ["top"]},
    {"top": ["slow", "fast"]},
)
DEEP_AND_SHALLOW = Graph(
    {
        "shallow": fit("shallow", "top"),
        "low": fit("low", "top"),
        "middle": imitate("middle", "low", "top"),
        "top": imitate("middle", "shallow"),
    },
    {"shallow": ["top"], "low": ["middle"], "middle": ["top"]},
    {"top": ["shallow", "middle", "low"]},
)


@pytest.mark.parametrize("how", ["saved", "killed"])
@pytest.mark.parametrize(
    ("graph", "unroll"),
    [
        (GRAPHS["two paths"], {"low": 2, "middle": 3}),
        (TWO_LEAVES, {"slow": 3, "fast": 2}),
        (TWO_LEAVES, {"slow": 2, "fast": 3}),
        (DEEP_AND_SHALLOW, {"shallow": 3, "low": 2}),
        (DEEP_AND_SHALLOW, {"shallow": 5, "low": 2, "middle": 2}),
    ],
)
def test_levels_that_wait_for_one_another(
    tmp_path: Path, graph: Graph, unroll: dict[str, int], how: str
) -> None:
    """An upper level that waits for one lower evaluates the other's last step again later."""
    make = toy(graph, loader=shuffled, unroll=unroll)
    check(make, tmp_path, [2, 5, 8, 9, 11, 15], how)


def test_the_tests_levels_do_wait(tmp_path: Path) -> None:
    engine = toy(DEEP_AND_SHALLOW, unroll={"shallow": 3, "low": 2})(tmp_path)
    waiting = []
    for _ in range(4):
        engine.iterate()
        waiting.append(any(engine.top.ready))
    assert waiting == [False, True, False, True]


# ------------------------------------------------------------------------- stops at the end


def test_a_stop_in_the_last_iteration_still_finishes(tmp_path: Path) -> None:
    make = toy(GRAPHS["two levels"], 4)
    check(make, tmp_path, [4], "saved")
    events = [json.loads(s) for s in (tmp_path / "stopped" / "events.jsonl").open()]
    assert [e["event"] for e in events].count("finished") == 1


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    make = toy(GRAPHS["two levels"], 4)
    make(tmp_path).run()
    files = {p: p.read_bytes() for p in tmp_path.glob("*.jsonl")}
    engine = make(tmp_path)
    engine.resume(tmp_path)
    engine.run()
    assert engine.global_step == 4
    assert {p: p.read_bytes() for p in tmp_path.glob("*.jsonl")} == files


def test_a_finished_run_goes_on_with_more_iterations(tmp_path: Path) -> None:
    make, longer = toy(GRAPHS["two levels"], 4), toy(GRAPHS["two levels"], 9)
    make(tmp_path / "a").run()
    engine = longer(tmp_path / "a")
    engine.resume(tmp_path / "a")
    engine.run()
    through = longer(tmp_path / "b")
    through.run()
    assert tiny.same(tiny.weights(engine), tiny.weights(through))


def test_another_program_is_refused_in_one_line(tmp_path: Path) -> None:
    toy(GRAPHS["two levels"], 4)(tmp_path).run()
    other = toy(GRAPHS["two paths"], 4)(tmp_path)
    with pytest.raises(UserError, match=r"'middle' doesn't fit the checkpoint") as caught:
        other.resume(tmp_path)
    assert "\n" not in str(caught.value)
