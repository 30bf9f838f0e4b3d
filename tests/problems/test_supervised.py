"""Augmented pairs in place of the real ones, or added to them."""

from typing import Any

import pytest
import tiny
import torch

from mlseg.errors import UserError

ADDED = {"augmented_pairs": "added", "augmentation": "combine"}


def test_added_pairs_are_copies_of_the_real_ones_which_stay_as_they_are() -> None:
    plain, added = (tiny.build("supervised", changes) for changes in ({}, ADDED))
    for _ in range(3):
        image, mask = plain.segmentor.get_batch()
        (real, real_mask), (copy, copy_mask) = added.segmentor.get_batch()
        assert torch.equal(real, image)
        assert torch.equal(real_mask, mask)
        assert copy.shape == image.shape
        assert not torch.equal(copy, image)
        assert not torch.equal(copy_mask, mask)


def test_the_loss_is_the_sum_of_both_halves() -> None:
    """Against the two terms evaluated one after the other."""
    engine = tiny.build("supervised", ADDED)
    level = engine.segmentor
    batch = level.get_batch()
    level.module.eval()  # else the second half's statistics would follow the first's
    with torch.no_grad():
        values = level.training_step(batch)
        halves = [level.criterion(level(image), mask) for image, mask in batch]
    torch.testing.assert_close(values["loss"], halves[0] + halves[1])
    torch.testing.assert_close(
        torch.stack(halves), torch.stack([values["real"], values["augmented"]])
    )


def test_without_an_operation_it_is_the_row_vanilla() -> None:
    ends = []
    for changes in ({}, {"augmented_pairs": "added"}):
        engine = tiny.build("supervised", changes)
        for _ in range(2):
            engine.iterate()
        ends.append(tiny.weights(engine))
    assert tiny.same(*ends)


def test_the_draws_are_resumed() -> None:
    engine, again = (tiny.build("supervised", ADDED) for _ in range(2))
    engine.segmentor.get_batch()
    again.segmentor.load_state_dict(engine.segmentor.state_dict())
    first, second = (e.segmentor.augmentation_generator.get_state() for e in (engine, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("window", [16, [16, 8]])
def test_windows_are_refused(window: Any) -> None:
    changes = {"augmented_pairs": "added", "augmentation": {"window": window}}
    with pytest.raises(
        (UserError, ValueError), match=r"augmentation.window: .*augmented_pairs to replacing"
    ):
        tiny.build("supervised", changes)
