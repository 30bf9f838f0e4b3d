"""The losses against closed forms, and at their edges."""

import math

import pytest
import torch
from torch import Tensor

from mlseg.problems.semi_supervised.losses import (
    CrossEntropyAndSquaredDice,
    divergence,
    jensen_shannon,
    squared_dice,
)
from mlseg.segmentation.losses import LOSSES


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, 4, 5, generator=draw).softmax(1) for _ in range(2))
    return first, second


def test_jensen_shannon_between_its_bounds(pair: tuple[Tensor, Tensor]) -> None:
    first, second = pair
    assert jensen_shannon(first, first).item() == pytest.approx(0.0, abs=1e-6)
    there = torch.stack([torch.ones(1, 3, 3), torch.zeros(1, 3, 3)], 1)
    assert jensen_shannon(there, 1 - there).item() == pytest.approx(math.log(2), abs=1e-6)
    one, other = jensen_shannon(first, second), jensen_shannon(second, first)
    torch.testing.assert_close(one, other)
    assert 0 < one < math.log(2)


def test_jensen_shannon_has_a_derivative_where_a_class_has_no_probability() -> None:
    p = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    jensen_shannon(p, torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)).backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()


def test_divergence_is_that_of_torch(pair: tuple[Tensor, Tensor]) -> None:
    first, second = pair
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(p.permute(0, 2, 3, 1)) for p in pair)
    ).mean()
    # 1e-10 within the logarithms is below float32's resolution of these probabilities.
    torch.testing.assert_close(divergence(first, second), expected, rtol=1e-4, atol=1e-6)
    target = first.clone().requires_grad_()
    divergence(target, second.clone().requires_grad_()).backward()
    assert target.grad is None


@pytest.mark.parametrize("loss", [jensen_shannon, divergence])
def test_pixels_that_do_not_count(loss: object, pair: tuple[Tensor, Tensor]) -> None:
    """Theirs may be anything, NaN included."""
    assert callable(loss)
    first, second = pair
    where = torch.zeros(2, 4, 5, dtype=torch.bool)
    where[:, :2] = True
    expected = loss(first[:, :, :2], second[:, :, :2])
    spoilt = first.clone()
    spoilt[:, :, 2:] = math.nan
    torch.testing.assert_close(loss(spoilt, second, where), expected)
    assert loss(first, second, torch.zeros_like(where)) == 0


def test_dice_without_pixels_that_do_not_count(pair: tuple[Tensor, Tensor]) -> None:
    label = pair[1].argmax(1)
    where = torch.zeros(2, 4, 5, dtype=torch.bool)
    where[:, :, 1:] = True
    torch.testing.assert_close(
        squared_dice(pair[0], label, where), squared_dice(pair[0][..., 1:], label[..., 1:])
    )


def test_the_loss_on_masks_has_a_name_and_leaves_out_what_is_ignored() -> None:
    assert LOSSES.get("cross_entropy_and_squared_dice") is CrossEntropyAndSquaredDice
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 4, 4, generator=draw)
    label = torch.randint(0, 3, (1, 4, 4), generator=draw)
    spoilt = label.clone()
    spoilt[:, 0] = 255
    torch.testing.assert_close(
        CrossEntropyAndSquaredDice(255)(logits, spoilt),
        CrossEntropyAndSquaredDice()(logits[:, :, 1:], label[:, 1:]),
    )
