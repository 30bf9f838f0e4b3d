"""When the discriminator has learned enough, and what it then is."""

from typing import Any

import pytest
import tiny
import torch
from transitions import loop

from mlseg.errors import RunError
from mlseg.segmentation.data import to_float

Script = list[tuple[float, float]]


def training(script: Script, **changes: Any) -> Any:
    """A tiny engine's training on one entry, with a scripted loss and accuracy on the hold-out."""
    named = {f"discriminator_training.{key}": value for key, value in changes.items()}
    engine: Any = tiny.build("load", {"discriminator_training.max_epochs": 6, **named})
    made = loop(engine).training
    engine.train()
    engine.enter_stage(1)
    loop(engine).buffer.open("g0", 0)
    measure, answers = made._evaluate, iter(script)

    def evaluate() -> tuple[float, float]:
        loss, accuracy = measure()
        assert loss > 0
        assert 0 <= accuracy <= 1
        made.seen.append({k: v.clone() for k, v in made.problem.module.state_dict().items()})
        return next(answers)

    made.seen = []
    made._evaluate = evaluate
    return made


def advance(made: Any) -> dict[str, Any] | None:
    """A piece of its work, as the engine does it."""
    if made.wants_step():
        made.problem.step_normal()
    report: dict[str, Any] | None = made.after_step()
    return report


def run(made: Any) -> dict[str, Any]:
    made.begin()
    while True:
        report = advance(made)
        if report is not None:
            assert not made.running
            return report


def test_patience_and_the_best_weights() -> None:
    made = training([(0.5, 0.6), (0.3, 0.7), (0.31, 0.9), (0.32, 0.9)], patience=2)
    report = run(made)
    assert report == {"epochs": 4, "loss": 0.3, "accuracy": 0.7, "reason": "patience"}
    assert tiny.same(dict(made.problem.module.state_dict()), made.seen[1])


def test_sufficient_accuracy() -> None:
    """It stops there, also where the loss has been lower before, with the weights it then has."""
    made = training([(0.3, 0.6), (0.31, 0.7), (0.32, 0.95), (0.1, 0.99)], accuracy=0.95, patience=9)
    assert run(made) == {"epochs": 3, "loss": 0.32, "accuracy": 0.95, "reason": "accuracy"}
    assert tiny.same(dict(made.problem.module.state_dict()), made.seen[2])


def test_a_smaller_gain_than_asked_for_is_none() -> None:
    made = training([(0.5, 0.6), (0.49, 0.6), (0.48, 0.6)], patience=2, min_delta=0.1)
    assert run(made) == {"epochs": 3, "loss": 0.5, "accuracy": 0.6, "reason": "patience"}


def test_at_most_so_many_epochs() -> None:
    losses = [(1.0 / n, 0.6) for n in range(1, 9)]
    assert run(training(losses))["reason"] == "max_epochs"


def test_a_pass_sees_every_map_once() -> None:
    made = training([(0.5, 0.6)] * 6, max_epochs=1)
    seen: list[int] = []
    original = made.batches._batch

    def batch(part: str, chosen: Any, *how: Any) -> Any:
        if part == "train":
            seen.extend(chosen.tolist())
        return original(part, chosen, *how)

    made.batches._batch = batch
    run(made)
    assert sorted(seen) == list(range(12)), "6 images, the truth and one entry"


@pytest.mark.parametrize("keep", [False, True])
def test_the_next_training_starts_from_the_weights_with_a_fresh_optimizer(keep: bool) -> None:
    made = training([(0.5, 0.6)] * 9, max_epochs=1, keep_optimizer=keep)
    run(made)
    weights = {k: v.clone() for k, v in made.problem.module.state_dict().items()}
    sums = [slot["sum"] for slot in made.problem.optimizer.state.values()]
    assert any(s.any() for s in sums)
    made.begin()
    assert tiny.same(dict(made.problem.module.state_dict()), weights), "a warm start"
    sums = [slot["sum"] for slot in made.problem.optimizer.state.values()]
    assert any(bool(s.any()) for s in sums) == keep
    assert advance(made) is None, "and it learns"


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    made = training([(float("nan"), 0.5)])
    with pytest.raises(
        RunError, match=r"is nan after 1 epochs; the best model so far is kept; try"
    ):
        run(made)


def test_it_learns_to_tell() -> None:
    """Fakes that are all of one class are told from drawn maps within a few passes."""
    engine: Any = tiny.build("load", {"discriminator_training": {"max_epochs": 30, "patience": 30}})
    engine.train()
    engine.enter_stage(1)
    loop(engine).buffer.open("g0", 0)
    loop(engine).buffer.write(0, 0, torch.zeros(loop(engine).buffer.shape, dtype=torch.uint8))
    assert run(loop(engine).training)["accuracy"] > 0.9


def test_windows_of_the_hold_out_stay_where_they_are() -> None:
    engine: Any = tiny.build(
        "load", {"augmentation": {"preset": "flip", "window": [20, 24]}, "seed": 3}
    )
    made = loop(engine).training
    engine.train()
    engine.enter_stage(1)
    loop(engine).buffer.open("g0", 0)
    seen: list[list[Any]] = []
    original = made.batches._batch

    def batch(part: str, chosen: Any, *how: Any) -> Any:
        found = original(part, chosen, *how)
        assert found[0].shape[-2:] == found[1].shape[-2:] == (20, 24)
        seen[-1].append(found[0])
        return found

    made.batches._batch = batch
    for _ in range(2):
        seen.append([])
        made._evaluate()
    whole = to_float(loop(engine).hold_out.samples.images)
    for first, again in zip(*seen, strict=True):
        assert torch.equal(first, again)
        cut = [part for image in whole for part in image.unfold(1, 20, 1).unfold(2, 24, 1)[0]]
        places = torch.stack([p for rows in cut for p in rows])
        for image in first:
            assert (places == image[0]).flatten(1).all(1).any(), "a window, not flipped"
