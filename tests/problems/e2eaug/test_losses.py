"""The GAN's loss against its closed form."""

import pytest
import torch

from mlseg.problems.e2eaug.losses import gan_loss


@pytest.mark.parametrize("real", [True, False])
def test_gan_loss(real: bool) -> None:
    logits = torch.tensor([[-30.0, -1.0, 0.0, 2.0, 40.0]], dtype=torch.float64)
    sign = -1 if real else 1
    expected = torch.log1p(torch.exp(sign * logits)).mean()
    torch.testing.assert_close(gan_loss(logits, real), expected)
    point = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: gan_loss(x, real), point)


def test_nothing_is_read_from_the_device() -> None:
    """On the meta device any read of a value raises."""
    logits = torch.empty(2, 1, 4, 4, device="meta", requires_grad=True)
    gan_loss(logits, real=True).backward()
    assert logits.grad is not None
