"""LoAd's discriminators: what they see, their sizes, what they can be asked."""

import pytest
import torch

from mlseg.problems.load.networks import (
    Discriminator,
    DiscriminatorSettings,
    one_hot,
    split_by_class,
)

IGNORE = 255


def test_the_image_is_split_by_class() -> None:
    image = torch.randn(2, 3, 4, 5)
    labels = torch.randint(3, (2, 4, 5))
    labels[0, 0] = IGNORE
    split = split_by_class(image, one_hot(labels, 3))
    assert split.shape == (2, 9, 4, 5)
    for k in range(3):
        inside = (labels == k).unsqueeze(1)
        assert torch.equal(split[:, 3 * k : 3 * k + 3], image * inside)
    assert not split[0, :, 0].any(), "ignored pixels are zero in every class"
    everything = split.reshape(2, 3, 3, 4, 5).sum(1)
    assert torch.equal(everything, image * (labels != IGNORE).unsqueeze(1))


@pytest.mark.parametrize(
    ("name", "million"), [("mobilenet_v1", 3.23), ("vgg16", 134.3), ("cnn", 0.459)]
)
def test_sizes(name: str, million: float) -> None:
    settings = DiscriminatorSettings.model_validate({"name": name})
    with torch.device("meta"):
        network = Discriminator(settings, 3, 21)
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(million, rel=0.01)


@pytest.mark.parametrize("name", ["mobilenet_v1", "cnn"])
@pytest.mark.parametrize("size", [64, None])
def test_any_image_size_and_gradient_to_the_maps(name: str, size: int | None) -> None:
    settings = DiscriminatorSettings.model_validate({"name": name, "input_size": size})
    network = Discriminator(settings, 3, 4).eval()
    maps = torch.rand(2, 4, 45, 61, requires_grad=True)
    image = torch.randn(2, 3, 45, 61)
    logits = network(image, maps)
    assert logits.shape == (2,)
    logits.sum().backward()
    assert maps.grad is not None
    assert maps.grad.abs().sum() > 0
    assert torch.equal(logits, network(image, maps)), "evaluation draws nothing"


def test_dropout_reaches_the_library() -> None:
    settings = DiscriminatorSettings.model_validate({"dropout": 0.25})
    with torch.device("meta"):
        network = Discriminator(settings, 3, 2)
    assert network.network.drop_rate == 0.25
