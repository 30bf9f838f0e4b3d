"""LoAd's controller alone: mIoU in, transitions out; its invariants on any script."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transitions import TABLE, UNIT, numbers, settings

from mlseg.engines.lookahead.commands import Command
from mlseg.engines.lookahead.controller import Lookahead, LookaheadSettings
from mlseg.engines.lookahead.straight_ahead import StraightAhead
from mlseg.errors import RunError


def of(commands: Sequence[Command], event: str) -> list[dict[str, Any]]:
    """The notes of one kind."""
    notes = [c.values for c in commands if c.action == "note"]
    return [dict(values) for values in notes if values["event"] == event]


def play(chosen: LookaheadSettings, script: str) -> tuple[Lookahead, list[Command], list[str]]:
    """Drive a controller; every cycle has to end exactly where the script has a slash."""
    controller = Lookahead(chosen)
    commands = controller.begin() + controller.observe(50 / UNIT)
    buffers = []
    for cycle in numbers(script):
        for place, mu in enumerate(cycle):
            assert commands[-1].action == "step"
            fresh = controller.observe(mu)
            commands += fresh
            ended = bool(of(fresh, "cycle_end"))
            assert ended == (place == len(cycle) - 1), (cycle, place)
        buffers.append(",".join(controller.buffer))
    return controller, commands, buffers


@pytest.mark.parametrize("case", TABLE)
def test_transitions(case: str) -> None:
    changes, script, buffers = TABLE[case]
    controller, commands, found = play(settings(**changes), script)
    assert found == buffers
    assert controller.stopped
    assert commands[-1].action == "stop"
    ends = of(commands, "cycle_end")
    assert [",".join(end["buffer_after"]) for end in ends] == buffers
    assert [",".join(end["buffer_before"]) for end in ends][1:] == buffers[:-1]


def test_what_the_runs_of_the_table_return() -> None:
    expected = {"falls, patience": "g0", "a peak, then none": "g1", "restarts": "g6"}
    for case, best in expected.items():
        changes, script, _ = TABLE[case]
        controller, _, _ = play(settings(**changes), script)
        assert controller.start == best
    changes, script, _ = TABLE["restarts"]
    controller, commands, _ = play(settings(**changes), script)
    assert controller.best == ("g6", 57 / UNIT)
    assert [note["update"] for note in of(commands, "restart")] == [3, 6]


def test_after_a_restart_below_the_peak_the_floor_is_the_peaks() -> None:
    changes, script, _ = TABLE["restart below the peak"]
    _, commands, _ = play(settings(**changes), script)
    assert [note["update"] for note in of(commands, "restart")] == [3]
    ends = of(commands, "cycle_end")
    assert [end["reason"] for end in ends] == ["patience", "divergence", "divergence"]
    assert ends[0]["peak"] == "g1"


def test_a_peak_cuts_the_count_of_cycles() -> None:
    changes, script, _ = TABLE["figure 1"]
    _, commands, _ = play(settings(**changes), script)
    assert [end["psi"] for end in of(commands, "cycle_end")] == [1, 0, 1, 0, 1, 2, 3]


def test_reaching_omega_instead_of_exceeding_it() -> None:
    _, commands, _ = play(
        settings(cycles=1, patience=4, peak_patience=3, peak_rule="reach"),
        "52,53,54,55,54,54,54 / 54 x4",
    )
    assert [note["update"] for note in of(commands, "restart")] == [4]


def test_the_order_in_which_a_cycle_ends() -> None:
    """The ending model's maps before the roll-back, the peak's after it, then the training."""
    _, commands, _ = play(settings(cycles=1, patience=2), "52,51 / 51,51")
    actions = [(c.action, c.values.get("label")) for c in commands if c.action != "note"]
    assert actions == [
        ("evaluate", None),
        ("snapshot", None),
        ("append", "g0"),
        ("train", None),
        ("step", None),
        ("snapshot", None),
        ("step", None),
        ("promote", None),
        ("flush", None),
        ("append", "g2"),
        ("restore", None),
        ("append", "g1"),
        ("train", None),
        ("step", None),
        ("step", None),
        ("append", "g4"),
        ("restore", None),
        ("stop", None),
    ]


@pytest.mark.parametrize("mu", [math.nan, math.inf])
def test_a_number_that_is_none_ends_the_run_and_names_the_best(mu: float) -> None:
    controller = Lookahead(settings())
    controller.observe(0.5)
    controller.observe(0.6)
    with pytest.raises(RunError, match=r"after update 2 .* g1 with 0\.6000, is kept"):
        controller.observe(mu)
    control = StraightAhead(3)
    control.observe(0.5)
    with pytest.raises(RunError, match="g0 with"):
        control.observe(mu)
    for fresh in (Lookahead(settings()), StraightAhead(3)):
        with pytest.raises(RunError, match="check the start model"):
            fresh.observe(mu)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"buffer_size": 1}, "buffer_size"),
        ({"beta_l": -0.1}, "beta_l"),
        ({"beta_l": 0.0}, "beta_l"),
        ({"beta_u": -0.1}, "beta_u"),
        ({"beta_u": 5.0}, "beta_u"),
        ({"patience": 0}, "patience"),
        ({"on_peak": "retain", "buffer_size": 2}, "can't hold a peak"),
        ({"retained_peaks": 2, "buffer_size": 5}, "set on_peak to retain"),
        ({"peak_rule": "reach"}, "set peak_patience as well"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        settings(**changes)


def test_the_control_keeps_the_best_of_its_updates() -> None:
    control = StraightAhead(4)
    commands = control.begin() + control.observe(0.5)
    for mu in (0.4, 0.6, 0.55, 0.6):
        assert commands[-1].action == "step"
        commands += control.observe(mu)
    assert commands[-1].action == "stop"
    assert control.best == ("g2", 0.6)
    assert [c.action for c in commands if c.action != "note"] == [
        "evaluate",
        "snapshot",
        "step",
        "step",
        "snapshot",
        "step",
        "step",
        "restore",
        "stop",
    ]


# ------------------------------------------------------------------------- any script

buffers = st.sampled_from(
    [
        *({"buffer_size": size} for size in (2, 3, 5)),
        *(
            {"buffer_size": size, "on_peak": "retain", "retained_peaks": peaks}
            for size, peaks in ((3, 1), (5, 1), (4, 2), (5, 3))
        ),
    ]
)
omegas: st.SearchStrategy[dict[str, Any]] = st.sampled_from([{}]) | st.builds(
    dict,
    peak_patience=st.integers(0, 6),
    peak_rule=st.sampled_from(["exceed", "reach"]),
)
anything = st.builds(
    lambda buffer, omega, **others: settings(**buffer, **omega, **others),
    buffers,
    omegas,
    cycles=st.integers(1, 4),
    patience=st.integers(1, 6),
    beta_l=st.integers(1, 20).map(lambda n: n / UNIT),
    beta_u=st.integers(0, 3).map(lambda n: n / UNIT),
)
# Whole percents: ties and thresholds that are met exactly come up often.
scores = st.integers(40, 65).map(lambda n: n / UNIT) | st.floats(0.0, 1.0)


@given(anything, st.lists(scores | st.just(math.nan), max_size=120))
def test_invariants(chosen: LookaheadSettings, script: list[float]) -> None:
    controller = Lookahead(chosen)
    commands = controller.begin() + controller.observe(50 / UNIT)
    seen = {"g0": 50 / UNIT}
    accepted = "g0", seen["g0"]
    ends: list[dict[str, Any]] = []
    for mu in script:
        before = controller.state_dict()
        if math.isnan(mu):
            with pytest.raises(RunError):
                controller.observe(mu)
            assert controller.state_dict() == before
            continue
        twin = Lookahead(chosen)
        twin.load_state_dict(json.loads(json.dumps(before)))
        fresh = controller.observe(mu)
        assert twin.observe(mu) == fresh, "the state is all there is"
        seen[f"g{controller.updates}"] = mu
        commands += fresh
        for note in of(fresh, "peak"):
            assert note["miou"] > max(accepted[1], note["threshold"])
            accepted = f"g{note['update']}", note["miou"]
        ended = of(fresh, "cycle_end")
        ends += ended
        assert 1 <= len(controller.buffer) <= chosen.buffer_size
        assert controller.best == accepted
        if ended:
            assert controller.buffer[0] == controller.start == accepted[0]
            assert controller.buffer == ended[0]["buffer_after"]
        if of(fresh, "cycle"):
            assert controller.mu == controller.mu_0 == controller.mu_s == controller.mu_p
            assert controller.mu_s == seen[controller.start]
            assert controller.gamma == controller.omega == 0
        else:
            assert 0 < controller.gamma <= chosen.patience
        assert (fresh[-1].action == "stop") == controller.stopped
        if controller.stopped:
            break
    if controller.stopped:
        last = [end["peak"] is None for end in ends]
        assert all(last[-chosen.cycles :])
        assert len(last) == chosen.cycles or not last[-chosen.cycles - 1]
        assert controller.start == accepted[0], "the best accepted peak"
        assert commands[-4].action == "restore"
    else:
        assert commands[-1].action == "step"
        without = [end["peak"] is None for end in ends]
        run = next((i for i, none in enumerate(reversed(without)) if not none), len(without))
        assert run < chosen.cycles
    replay(commands, controller)


def replay(commands: Sequence[Command], controller: Lookahead) -> None:
    """What an engine makes of the commands is what the controller believes."""
    model, snapshots, updates = "g0", {}, 0
    buffer: list[str] = []
    for command in commands:
        values = command.values
        match command.action:
            case "step":
                updates += 1
                model = f"g{updates}"
            case "note" if values["event"] == "update":
                assert values["update"] == updates
            case "snapshot":
                assert values["model"] == model
                snapshots[values["slot"]] = model
            case "promote":
                snapshots["start"] = snapshots["peak"]
            case "restore":
                model = snapshots["start"]
            case "flush":
                buffer = [buffer[place] for place in values["keep"]]
            case "delete":
                del buffer[values["position"]]
            case "append":
                assert values["label"] == model, "maps are of the present model"
                buffer.insert(values["position"], model)
            case "train":
                assert model == snapshots["start"] == buffer[0]
            case "stop":
                assert model == controller.start
    assert buffer == controller.buffer
