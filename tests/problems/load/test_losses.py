"""LoAd's losses against sums over pixels, closed forms and the distribution of the draws."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mlseg.problems.load.losses import (
    balanced_cross_entropy,
    fooling_loss,
    pixelwise,
    relax,
)

IGNORE = 255


def case(classes: int, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits and labels of two images, a share of these ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 5, 4, dtype=torch.float64, generator=generator)
    target = torch.randint(classes, (2, 5, 4), generator=generator)
    return logits, target.masked_fill(torch.rand(2, 5, 4, generator=generator) < ignored, IGNORE)


def test_balanced_cross_entropy_is_the_weighted_sum_over_pixels() -> None:
    logits, target = case(3, ignored=0.3)
    mean_pixels = torch.tensor([7.0, 2.0, 1.0])
    total = labelled = 0.0
    for image in range(len(target)):
        for row in range(target.shape[1]):
            for column in range(target.shape[2]):
                label = int(target[image, row, column])
                if label == IGNORE:
                    continue
                here = int((target[image] == label).sum())
                log_p = logits[image, :, row, column].log_softmax(0)[label]
                total -= float(mean_pixels[label]) / here * float(log_p)
                labelled += 1
    found = balanced_cross_entropy(logits, target, mean_pixels, IGNORE)
    assert float(found) == pytest.approx(total / labelled, rel=1e-12)


def test_balanced_cross_entropy_of_images_with_the_mean_number_of_pixels_is_plain() -> None:
    logits, _ = case(2)
    target = torch.tensor([0, 1] * 10).reshape(1, 5, 4).repeat(2, 1, 1)
    found = balanced_cross_entropy(logits, target, torch.tensor([10.0, 10.0]))
    assert torch.allclose(found, functional.cross_entropy(logits, target))


def test_relaxations() -> None:
    logits = case(4)[0].requires_grad_()
    soft = (logits / 3).softmax(1)
    assert torch.equal(relax(logits, "softmax", 3.0), soft)
    hard = relax(logits, "straight_through", 3.0)
    assert set(hard.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.argmax(1), logits.argmax(1))
    weights = torch.randn_like(soft)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    (found,) = torch.autograd.grad((hard * weights).sum(), logits)
    assert torch.allclose(found, expected)


def test_gumbel_samples_follow_the_softmax_at_temperature_one() -> None:
    """The class with the highest noisy logit is a draw from the softmax of the logits."""
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 200, 200)
    drawn = relax(logits, "gumbel", 20.0)
    assert torch.allclose(drawn.sum(1), torch.ones(1, 200, 200))
    shares = torch.bincount(drawn.argmax(1).flatten(), minlength=3) / 40_000
    assert torch.allclose(shares, logits[0, :, 0, 0].softmax(0), atol=0.01)
    assert drawn.max() < 0.8, "a temperature of 20 blurs"


@pytest.mark.parametrize("saturating", [False, True])
def test_fooling_loss_and_its_gradient(saturating: bool) -> None:
    logits = torch.tensor([-3.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    loss = fooling_loss(logits, saturating)
    probability = logits.detach().sigmoid()
    expected = (1 - probability).log() if saturating else -probability.log()
    assert torch.allclose(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    slope = -probability if saturating else probability - 1
    assert torch.allclose(gradient, slope)


def test_pixelwise_is_torchs_loss_image_by_image() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    target = torch.randint(0, 4, (3, 5, 6))
    target[0, :2] = 255
    target[2] = 255
    found = pixelwise(logits, target, 255)
    for index in range(2):
        alone = functional.cross_entropy(logits[[index]], target[[index]], ignore_index=255)
        torch.testing.assert_close(found[index], alone)
    assert found[2] == 0
