"""What level three learns besides the alphas: lambda, and a guide for the generator."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

NOW = {"gan.pretrain": 0}
BOTH = {"level3.synthetic_weight": True, "level3.guidance": 0.5}


def test_1_a_learned_lambda_moves_and_stays_positive(tmp_path: Path) -> None:
    changes = {**NOW, "level3.synthetic_weight": True, "synthetic_weight": 0.01}
    engine = tiny.build("e2eaug", {**changes, "problems.architecture.optimizer.lr": 3.0}, tmp_path)
    steps: list[list[Tensor]] = []
    tiny.gradients_of(engine.architecture, steps)
    module = engine.architecture.module
    held = [p for group in engine.architecture.optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(module.alphas), id(module.log_synthetic_weight)]
    engine.run()
    engine.results()
    assert all(g.isfinite().all() and g.abs().sum() > 0 for step in steps for g in step)
    record = json.loads((tmp_path / "architecture.json").read_text())
    weights = [entry["synthetic_weight"] for entry in record["history"]]
    assert weights[0] == pytest.approx(0.01)
    assert all(w > 0 for w in weights)
    assert weights[-1] != weights[0]
    # The segmentor's loss is of the present one.
    figures = engine.architecture.metrics
    assert float(figures["synthetic_weight"]) > 0


def test_a_lambda_that_stands_still_changes_nothing_else() -> None:
    """At a rate of nothing the run is the one with a number for lambda."""
    rate = {"problems.architecture.optimizer.lr": 1e-30}
    ends = []
    for learned in (False, True):
        changes = {**NOW, **rate, "level3.synthetic_weight": learned, "synthetic_weight": 1.0}
        engine = tiny.build("e2eaug", changes)
        for _ in range(3):
            engine.iterate()
        found = tiny.weights(engine)
        found.pop("architecture/log_synthetic_weight", None)
        ends.append(found)
    assert tiny.same(*ends)


def test_2_networks_stay_as_they_are_through_a_hypergradient() -> None:
    engine = tiny.build("e2eaug", {**NOW, **BOTH})
    seen = tiny.around_gradients(engine, engine.architecture)
    engine.iterate()
    engine.iterate()
    assert tiny.same(seen[0], seen[1])
    assert tiny.same(seen[2], seen[3])


def test_3_a_guide_reaches_the_generator_alone() -> None:
    """Other validation images give the same segmentor's and critic's first two steps."""
    ends = []
    for flip in (False, True):
        changes = {**NOW, "level3.guidance": 0.5, "problems.architecture.optimizer.lr": 1e-30}
        engine = tiny.build("e2eaug", changes)
        if flip:
            samples = engine.architecture.train_data_loader[0].samples
            samples.images.sub_(255).neg_()
        engine.iterate()
        after_one = tiny.weights(engine)
        before = [p.detach().clone() for p in engine.generator.module.parameters()]
        engine.generator.one_step_descent()
        moved = [
            p.detach() - q
            for p, q in zip(engine.generator.module.parameters(), before, strict=True)
        ]
        ends.append((after_one, moved))
    assert tiny.same(ends[0][0], ends[1][0]), "the first step has no guide"
    assert not tiny.same(ends[0][1], ends[1][1]), "the second has that of the validation loss"


def test_the_guide_is_added_at_its_relative_size() -> None:
    engine = tiny.build("e2eaug", {**NOW, "level3.guidance": 0.25})
    generator = engine.generator
    passed: list[list[Tensor]] = []
    former = generator.hypergradient

    def hypergradient(vector: Any, hop: Any) -> Any:
        passed.append([v.clone() for v in vector])
        return former(vector, hop)

    generator.hypergradient = hypergradient
    engine.iterate()
    (guide,) = passed
    own: list[Tensor] = []
    total: list[Tensor] = []
    callback = generator.grad_callback

    def grad_callback() -> None:
        own.extend(p.grad.clone() for p in generator.trainable_parameters())
        callback()
        total.extend(p.grad.clone() for p in generator.trainable_parameters())

    generator.grad_callback = grad_callback
    engine.iterate()

    def size(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in tensors]).norm()

    factor = 0.25 * size(own) / size(guide)
    assert factor > 0
    for t, g, u in zip(total, own, guide, strict=True):
        torch.testing.assert_close(t, g + factor * u)


def test_a_guide_that_fades() -> None:
    """By linear steps from its size on; after the last of them a step is the generator's alone."""
    engine = tiny.build("e2eaug", {**NOW, "level3": {"guidance": 0.5, "guidance_steps": 2}})
    sizes = []
    for _ in range(5):  # the first has no guide yet
        sizes.append(engine.generator.relative_size())
        engine.iterate()
    assert sizes == [0.5, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("steps", "batches", "sizes"),
    [
        (1, 1, [0.5, 0.5, 0.0, 0.0]),
        (100, 1, [0.5, 0.5, 0.495, 0.49]),
        (4, 2, [0.5, 0.5, 0.5, 0.5, 0.375, 0.375, 0.25]),
    ],
)
def test_how_long_it_fades(steps: int, batches: int, sizes: list[float]) -> None:
    """Over one step, or over more than there are; of several batches a step, steps count."""
    level3 = {"guidance": 0.5, "guidance_steps": steps}
    changes = {**NOW, "level3": level3, "problems.generator.accumulate": batches}
    engine = tiny.build("e2eaug", changes)
    found = []
    for _ in sizes:
        found.append(engine.generator.relative_size())
        engine.iterate()
    assert found == pytest.approx(sizes)


def test_a_fade_goes_on_where_it_was() -> None:
    """A state from before it was counted has none to go on from."""
    changes = {**NOW, "level3": {"guidance": 0.5, "guidance_steps": 4}}
    engine = tiny.build("e2eaug", changes)
    for _ in range(3):
        engine.iterate()
    state = engine.generator.state_dict()
    other = tiny.build("e2eaug", changes).generator
    other.load_state_dict(state)
    assert other.relative_size() == engine.generator.relative_size() == 0.25
    old = {key: value for key, value in state.items() if key != "guided"}
    with pytest.raises(ValueError, match=r"level3\.guidance_steps"):
        other.load_state_dict(old)
    tiny.build("e2eaug", {**NOW, "level3.guidance": 0.5}).generator.load_state_dict(old)


def test_the_hop_is_of_the_step_that_was_taken() -> None:
    """A guide changes the point, not the hop: the alphas' gradient stays finite and alive."""
    engine = tiny.build("e2eaug", {**NOW, **BOTH})
    steps: list[list[Tensor]] = []
    tiny.gradients_of(engine.architecture, steps)
    for _ in range(3):
        engine.iterate()
    for step in steps:
        assert all(g.isfinite().all() and g.norm() > 0 for g in step)


@pytest.mark.parametrize("mode", ["frozen", "random"])
def test_draws_and_choices_are_the_same_at_every_seed(mode: str) -> None:
    wanted: dict[str, Any] = {"mode": mode}
    wanted |= {"choice": "6-2-2"} if mode == "frozen" else {"draw": 2}
    found = [
        tiny.build("e2eaug", {**NOW, "seed": seed, "architecture": wanted}).architecture.module()
        for seed in (1, 2)
    ]
    assert torch.equal(*found)
    if mode == "random":
        other = tiny.build("e2eaug", {**NOW, "architecture": {**wanted, "draw": 3}})
        assert not torch.equal(found[0], other.architecture.module())
