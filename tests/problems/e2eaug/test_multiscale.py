"""SPADE's discriminator and the losses that come with it."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mlseg.problems.e2eaug.losses import feature_matching, fooling, perceptual_loss, telling
from mlseg.problems.e2eaug.networks.multiscale import MultiScale


def critic() -> MultiScale:
    torch.manual_seed(0)
    return MultiScale(4, channels=2, layers=2).double()


def pair(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 16, 20, dtype=torch.float64)


def test_published_size() -> None:
    assert sum(p.numel() for p in MultiScale(5).parameters()) == 5_531_778


def test_by_scale_the_outputs_of_every_layer() -> None:
    judged = critic()(pair())
    shapes = [[tuple(feature.shape[1:]) for feature in scale] for scale in judged]
    assert shapes == [
        [(2, 9, 11), (4, 5, 6), (8, 6, 7), (1, 7, 8)],
        [(2, 5, 6), (4, 3, 4), (8, 4, 5), (1, 5, 6)],
    ]


def test_the_second_scale_does_not_count_the_padding() -> None:
    network = critic()
    ones = torch.ones(1, 4, 8, 8, dtype=torch.float64)
    seen: list[Tensor] = []
    network.networks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(ones)
    torch.testing.assert_close(seen[0], torch.ones(1, 4, 4, 4, dtype=torch.float64))


def test_pairs_do_not_see_each_other() -> None:
    """So that real and fake may pass together or apart."""
    network, pairs = critic(), pair(3)
    whole, alone = network(pairs), network(pairs[1:2])
    for mine, its in zip(whole, alone, strict=True):
        for one, other in zip(mine, its, strict=True):
            torch.testing.assert_close(one[1:2], other)


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_smallest_image(scales: int) -> None:
    network = MultiScale(1, channels=2, scales=scales)
    side = network.smallest_side
    judged = network(torch.randn(1, 1, side, side))
    assert all(feature.isfinite().all() for scale in judged for feature in scale)
    with pytest.raises(ValueError, match="spatial"):
        network(torch.randn(1, 1, side // 2, side // 2))


def test_hinge_by_hand() -> None:
    real = [[torch.tensor([2.0, 0.0])], [torch.tensor([-1.0])]]
    fake = [[torch.tensor([-3.0, 0.5])], [torch.tensor([1.0])]]
    # (0 + 1) / 2 and 2, mean 1.25; (0 + 1.5) / 2 and 2, mean 1.375.
    assert float(telling("hinge", real, fake)) == 1.25 + 1.375
    assert float(fooling("hinge", fake)) == pytest.approx((1.25 - 1.0) / 2)


def test_vanilla_is_pix2pixs() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5])
    expected = 0.5 * (functional.softplus(-real).mean() + functional.softplus(fake).mean())
    torch.testing.assert_close(telling("vanilla", [[real]], [[fake]]), expected)
    torch.testing.assert_close(fooling("vanilla", [[fake]]), functional.softplus(-fake).mean())


def test_feature_matching() -> None:
    network, one, other = critic(), pair(), pair().requires_grad_()
    assert float(feature_matching(network(one), network(one))) == 0
    fake, real = network(one), network(other)
    expected = sum(
        (mine - its).abs().mean()
        for scale, its_scale in zip(fake, real, strict=True)
        for mine, its in zip(scale[:-1], its_scale[:-1], strict=True)
    )
    found = feature_matching(fake, real)
    torch.testing.assert_close(found, expected / 2)
    assert torch.autograd.grad(found, other, allow_unused=True)[0] is None


def test_perceptual_weights() -> None:
    fake = [torch.full((2,), value) for value in (32.0, 16.0, 8.0, 4.0, 1.0)]
    assert float(perceptual_loss(fake, [torch.zeros(2)] * 5)) == 5.0
