"""A run that is interrupted and resumed is the uninterrupted one, bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from resuming import Make, check
from torch.utils.data import DataLoader, TensorDataset

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import UserError
from mlseg.testing import programs
from mlseg.testing.programs import GRAPHS, Graph, fit, imitate

pytestmark = pytest.mark.slow  # trains for seconds


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
        engine: Any = programs.small(
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
