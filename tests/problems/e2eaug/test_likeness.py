"""How near generated images come to the real ones: PSNR and SSIM."""

import math

import pytest
import torch
from torch import Tensor, nn

from mlseg.problems.e2eaug.records import likeness
from mlseg.segmentation.data import DataSettings, Samples, load_data, to_float

CPU = torch.device("cpu")


def samples(size: int) -> Samples:
    settings = DataSettings(name="synthetic_lesions", image_size=size, train=2, val=11, test=1)
    return load_data(settings).val


class Given(nn.Module):
    """Gives images in turn, whatever the masks."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.place = images, 0

    def forward(self, label: Tensor) -> Tensor:
        assert not self.training
        self.place += len(label)
        return self.images[self.place - len(label) : self.place]


def test_psnr_by_its_formula() -> None:
    of = samples(16)
    real = to_float(of.images)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    made = (real + 0.3 * noise).clamp(-1, 1)
    errors = (0.5 * (made - real).double()).square().mean((1, 2, 3))
    network = Given(made).train()
    found = likeness(network, of, CPU)
    assert found["psnr"] == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-5)
    assert found["images"] == 11
    assert network.training
    ssim = found["ssim"]
    assert ssim is not None
    assert 0 < ssim < 0.9


def test_the_very_images() -> None:
    of = samples(16)
    found = likeness(Given(to_float(of.images)), of, CPU)
    assert found == {"psnr": None, "ssim": pytest.approx(1.0, abs=1e-5), "images": 11}


def test_images_smaller_than_the_window() -> None:
    of = samples(8)
    found = likeness(Given(torch.zeros_like(to_float(of.images))), of, CPU)
    assert found["ssim"] is None
    assert found["psnr"] is not None
    assert math.isfinite(found["psnr"])
