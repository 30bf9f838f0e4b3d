"""VGG-19's features: torchvision's network, random or from a file, kept with the run."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torchvision.models import vgg19

from mlseg import run
from mlseg.problems.e2eaug.networks.perceptual import (
    MEAN,
    STD,
    WEIGHTS,
    PerceptualFeatures,
    load_weights,
)

SMALL = {"gan.pretrain": 0, "engine.iterations": 1, "engine.validate_every": 0}


@pytest.fixture(scope="module")
def torchvisions(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Torchvision's network, its classifier left out, and a file of its state."""
    torch.manual_seed(0)
    with torch.device("meta"):
        whole = vgg19()
    features = whole.features.to_empty(device="cpu")
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            assert module.bias is not None
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.ReLU):
            module.inplace = False
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    state: dict[str, Any] = {f"features.{k}": v for k, v in features.state_dict().items()}
    torch.save({**state, "classifier.0.bias": torch.zeros(2)}, path)
    return features, path


def test_a_file_of_torchvisions_gives_its_features(torchvisions: tuple[nn.Module, Path]) -> None:
    theirs, path = torchvisions
    ours = PerceptualFeatures()
    load_weights(ours, path, "gan.perceptual")
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    x = ((image + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected: list[Tensor] = []
    for index, layer in enumerate(theirs.children()):
        x = layer(x)
        if index in (1, 6, 11, 20, 29):
            expected.append(x)
    found = ours(image)
    assert len(found) == len(WEIGHTS) == 5
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its)


def test_random_ones_keep_the_variance() -> None:
    torch.manual_seed(0)
    powers = [float(f.square().mean()) for f in PerceptualFeatures()(torch.randn(2, 3, 32, 32))]
    assert max(powers) / min(powers) < 4, "over thirteen convolutions"


def test_nothing_of_it_is_trained_and_grey_is_taken_as_three() -> None:
    features = PerceptualFeatures()
    assert not any(p.requires_grad for p in features.parameters())
    grey = torch.rand(1, 1, 16, 16)
    assert torch.equal(features(grey)[-1], features(grey.expand(-1, 3, -1, -1))[-1])


class Stranger:
    """What no file of weights holds."""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"not a file of torch's", "damaged, or not a file of weights alone"),
        (pickle.dumps(Stranger()), "damaged, or not a file of weights alone"),
        ({"0.weight": torch.zeros(64, 3, 3, 3)}, "features.0.bias is missing"),
        (
            {"0.weight": torch.zeros(64, 3, 3, 3), "0.bias": torch.zeros(3)},
            "features.0.bias is (3,",
        ),
        ([1, 2], "it holds a list"),
    ],
)
def test_a_file_that_is_none_is_one_line(
    content: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vgg19.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug")
    out = tmp_path / "run"
    assert run.main([str(config), f"gan.perceptual={path}", "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: gan.perceptual: ")
    assert words in said
    assert not out.exists()


def test_not_finite(torchvisions: tuple[nn.Module, Path], tmp_path: Path) -> None:
    state = torch.load(torchvisions[1], weights_only=True)
    state["features.28.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"features.28.weight is not finite"):
        load_weights(PerceptualFeatures(), tmp_path / "nan.pth", "gan.perceptual")


def test_a_changed_bit(torchvisions: tuple[nn.Module, Path], tmp_path: Path) -> None:
    content = bytearray(torchvisions[1].read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"gan.perceptual: .*changed.pth: damaged"):
        load_weights(PerceptualFeatures(), tmp_path / "changed.pth", "gan.perceptual")


def test_images_too_small_for_it() -> None:
    changes = {**SMALL, "gan.perceptual": "random", "data.image_size": 12, "generator.levels": 2}
    with pytest.raises(ValueError, match=r"gan.perceptual: VGG-19 needs images of 16 pixels"):
        tiny.build("e2eaug", {**changes, "discriminator.layers": 1})


def test_a_run_keeps_the_network_and_goes_on_with_it(tmp_path: Path) -> None:
    """Though the seed that made it, or the file, be another by then."""
    changes = {**SMALL, "gan.perceptual": "random"}
    first = tiny.build("e2eaug", changes, tmp_path)
    first.run()
    figures = first.generator.metrics
    assert float(figures["perceptual"]) > 0
    assert (tmp_path / "checkpoints" / "perceptual.pt").exists()
    again = tiny.build("e2eaug", {**changes, "seed": 7}, tmp_path)
    mine, its = (e.generator.perceptual.state_dict() for e in (first, again))
    assert tiny.same(dict(mine), dict(its))
    other = tiny.build("e2eaug", {**changes, "seed": 7})
    assert not tiny.same(dict(mine), dict(other.generator.perceptual.state_dict()))
