"""Passes over each network in one iteration of E2EAug; the docstring of the system states them."""

from typing import Any

import pytest
import tiny
import torch
from e2eaug_generators import GENERATORS, OTHERS
from torch import nn


def passes(changes: dict[str, Any]) -> dict[str, tiny.Counter]:
    changes = {"gan.pretrain": 0, **changes}
    engine = tiny.build("e2eaug", changes)
    engine.iterate()  # the first one may set something up
    networks = [p for p in engine.problems if p.name != "architecture"]
    counters = {p.name: tiny.Counter(p.module) for p in networks}
    engine.iterate()
    return counters


def counts(changes: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(forward, backward) by network."""
    return {name: (c.forward, c.backward) for name, c in passes(changes).items()}


def test_the_three_levels() -> None:
    found = counts({})
    assert found == {"generator": (4, 4), "discriminator": (5, 5), "segmentor": (5, 5)}


@pytest.mark.parametrize("generator", OTHERS)
def test_feature_matching_costs_no_pass(generator: str) -> None:
    """The real pair is judged once: as constants of the generator's loss and of its hop, and with
    the graph by which the discriminator then steps."""
    found = counts(GENERATORS[generator])
    assert found == {"generator": (4, 4), "discriminator": (5, 5), "segmentor": (5, 5)}


@pytest.mark.parametrize("generator", OTHERS)
def test_the_hop_goes_through_no_pass_twice(generator: str) -> None:
    identity = {
        f"problems.{name}.hypergradient": {"method": "identity"}
        for name in ("generator", "segmentor")
    }
    found = counts({**GENERATORS[generator], **identity})
    assert {name: forward for name, (forward, _) in found.items()} == {
        "generator": 3,
        "discriminator": 4,
        "segmentor": 4,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"level3.synthetic_weight": True},
        {"level3.mask_augmentation": True},
        {"level3.guidance": 0.3},
        {"generator.candidates": "rich"},
    ],
)
def test_what_level_three_learns_besides_costs_no_pass(changes: dict[str, Any]) -> None:
    found = counts(changes)
    assert found == {"generator": (4, 4), "discriminator": (5, 5), "segmentor": (5, 5)}


def test_perceptual_features_of_real_images_are_seen_once() -> None:
    engine = tiny.build("e2eaug", {"gan.pretrain": 0})
    seen: list[bool] = []

    class Features(nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            seen.append(image.requires_grad)
            return [image] * 5

    engine.generator.perceptual, engine.generator.perceptual_weight = Features(), 1.0
    engine.iterate()
    seen.clear()
    engine.iterate()
    # Fake in the step and in the two evaluations of the hop, real in the step.
    assert (seen.count(True), seen.count(False)) == (3, 1)


def test_the_segmentors_passes_are_over_half_batches() -> None:
    """Real and synthetic by themselves, so that only the synthetic half is evaluated again."""
    batches = {"problems.segmentor.batch_size": 3, "problems.architecture.batch_size": 4}
    assert sorted(passes(batches)["segmentor"].batches) == [3, 3, 3, 3, 4]


def test_identity_needs_no_more_forward_passes() -> None:
    """One forward and two backwards in place of two and two, in each of the two hops."""
    identity = {
        f"problems.{name}.hypergradient": {"method": "identity"}
        for name in ("generator", "segmentor")
    }
    found = counts(identity)
    assert {name: forward for name, (forward, _) in found.items()} == {
        "generator": 3,
        "discriminator": 4,
        "segmentor": 4,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The generator's own step and the synthetic batch, through which nothing goes back.
        ({"architecture.mode": "frozen"}, [(2, 1), (3, 3), (2, 2)]),
        # An exported copy makes the images; the generator itself rests.
        ({"gan.frozen": True, "gan.pretrain": 1}, [(0, 0), (0, 0), (2, 2)]),
        ({"synthetic_weight": 0.0}, [(0, 0), (0, 0), (1, 1)]),
    ],
)
def test_rows_take_no_pass_that_they_do_not_need(
    changes: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    engine = tiny.build("e2eaug", {"gan.pretrain": 0, **changes})
    engine.enter_stage(len(engine.stages) - 1)
    engine.iterate()
    counters = [tiny.Counter(p.module) for p in engine.problems[:3]]
    engine.iterate()
    assert [(c.forward, c.backward) for c in counters] == expected


def test_pretraining_is_two_networks_at_their_own_steps() -> None:
    engine = tiny.build("e2eaug")
    counters = [tiny.Counter(p.module) for p in engine.problems[:3]]
    engine.iterate()
    assert [(c.forward, c.backward) for c in counters] == [(1, 1), (3, 3), (0, 0)]


def test_a_frozen_generator_is_one_exported_network() -> None:
    engine = tiny.build("e2eaug", {"gan.frozen": True})
    engine.run()
    exported = engine.segmentor._exported
    counter = tiny.Counter(exported)
    engine.iterate()
    assert (counter.forward, counter.backward) == (1, 0)
    assert engine.segmentor._exported is exported
