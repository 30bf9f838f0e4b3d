"""Weights to start from: libraries' own files against the libraries' own networks."""

from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18

from mlseg.errors import UserError
from mlseg.segmentation.data.palettes import VOC_CLASSES
from mlseg.segmentation.nets import SegmentorSettings, build_segmentor, starting
from mlseg.segmentation.nets.layers import IMAGENET_MEAN, IMAGENET_STD

UNET = {"name": "smp_unet", "encoder": "resnet18", "options": {"decoder_channels": [8] * 5}}
OWN_UNET = {"name": "unet", "channels": 2, "levels": 1}


def reference(classes: int = 3, channels: int = 3) -> Any:
    """segmentation-models-pytorch's own network of :data:`UNET`, with statistics of its own."""
    torch.manual_seed(7)
    made = smp.Unet(
        "resnet18",
        encoder_weights=None,
        in_channels=channels,
        classes=classes,
        decoder_channels=[8] * 5,
    )
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return made.eval()


def begun(
    settings: dict[str, Any], classes: tuple[str, ...] = ("a", "b", "c"), channels: int = 3
) -> tuple[Any, starting.Started]:
    """A segmentor of these settings, and what it has started from."""
    torch.manual_seed(0)
    parsed = SegmentorSettings.model_validate(settings)
    network = build_segmentor(parsed, channels, len(classes))
    found = starting.start(network, parsed, channels, classes)
    assert found is not None
    return network.eval(), found


def pixels(channels: int = 3) -> Tensor:
    """(1, C, 64, 64) in [0, 1]."""
    return torch.rand(1, channels, 64, 64, generator=torch.Generator().manual_seed(3))


def imagenet(unit: Tensor) -> Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (unit - mean[:, None, None]) / std[:, None, None]


def close(a: Tensor, b: Tensor) -> None:
    # One multiplication and one addition stand for two of each: a few units in the last place,
    # through some forty layers.
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kept", ["bare", "state_dict", "module.", "model.", "safetensors", "old"])
def test_a_file_of_segmentation_models_pytorch(tmp_path: Path, kept: str) -> None:
    made, path = reference(), tmp_path / "weights.pt"
    state = made.state_dict()
    if kept == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    elif kept == "old":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kept == "state_dict":
        torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, path)
    else:
        prefix = "" if kept == "bare" else kept
        torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    network, found = begun({**UNET, "weights": str(path)})
    with torch.no_grad():
        close(network(pixels() * 2 - 1), made(imagenet(pixels())))
    assert (found.loaded, found.new, found.unused) == (found.tensors, [], [])
    assert "its 3 classes are taken for those of the data" in starting.said(found.record())


@pytest.mark.parametrize(("normalise", "seen"), [("unit", pixels()), ("none", pixels() * 2 - 1)])
def test_other_pixels(tmp_path: Path, normalise: str, seen: Tensor) -> None:
    made = reference()
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    settings = {**UNET, "weights": str(tmp_path / "weights.pt"), "normalise": normalise}
    with torch.no_grad():
        close(begun(settings)[0](pixels() * 2 - 1), made(seen))


def test_classes_by_name(tmp_path: Path) -> None:
    made = reference()
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    settings = {**UNET, "weights": str(tmp_path / "weights.pt")}
    with torch.no_grad():
        logits = made(imagenet(pixels()))
        network, found = begun({**settings, "weights_classes": ["c", "a", "b"]})
        close(network(pixels() * 2 - 1), logits[:, [1, 2, 0]])
        assert "from the file's order" in starting.said(found.record())
    network, found = begun({**settings, "weights_classes": ["x", "a", "b"]})
    fresh = build_segmentor(SegmentorSettings.model_validate(UNET), 3, 3)
    heads = {name for name in fresh.state_dict() if "segmentation_head" in name}
    assert set(found.new) == heads
    assert "new head: the file's classes are others (x, a, b)" in starting.said(found.record())
    with pytest.raises(UserError, match=r"weights_classes: 2 names.* has 3 classes"):
        begun({**settings, "weights_classes": ["a", "b"]})


def test_another_number_of_classes_is_a_new_head_alone(tmp_path: Path) -> None:
    made = reference(classes=5)
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    network, found = begun({**UNET, "weights": str(tmp_path / "weights.pt")})
    assert "new head: 5 classes in the file, 3 in the data" in starting.said(found.record())
    own, its = network.state_dict(), made.state_dict()
    for name, tensor in own.items():
        if "segmentation_head" in name:
            assert name in found.new
        else:
            assert torch.equal(tensor, its[name.removeprefix("network.")])


def test_one_output_becomes_the_foreground(tmp_path: Path) -> None:
    made = reference(classes=1)
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    settings = {**UNET, "weights": str(tmp_path / "weights.pt")}
    network, found = begun(settings, ("background", "foreground"))
    with torch.no_grad():
        probability = network(pixels() * 2 - 1).softmax(1)[:, 1:]
        close(probability, made(imagenet(pixels())).sigmoid())
    assert found.new == []


def test_torchvisions_deeplab_has_vocs_classes(tmp_path: Path) -> None:
    from torchvision.models.segmentation import deeplabv3_resnet50

    torch.manual_seed(5)
    made = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    torch.save(made.eval().state_dict(), tmp_path / "coco.pth")
    settings = {"name": "deeplabv3", "weights": str(tmp_path / "coco.pth")}
    network, found = begun(settings, tuple(VOC_CLASSES))
    with torch.no_grad():
        close(network(pixels() * 2 - 1), made(imagenet(pixels()))["out"])
    assert found.new == []
    assert all(name.startswith("aux_classifier.") for name in found.unused)
    network, found = begun(settings, ("background", "polyp"))
    assert found.new == ["network.classifier.4.weight", "network.classifier.4.bias"]
    # As many classes that are others.
    network, found = begun(settings, tuple(f"class {n}" for n in range(21)))
    assert found.new == ["network.classifier.4.weight", "network.classifier.4.bias"]


def test_an_encoders_file(tmp_path: Path) -> None:
    torch.manual_seed(2)
    classifier = resnet18(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    network, found = begun({**UNET, "encoder_weights": str(tmp_path / "resnet18.pth")})
    assert (found.new, found.unused) == ([], ["fc.weight", "fc.bias"])
    with torch.no_grad():
        seen = imagenet(pixels())
        x = classifier.eval()
        first = x.relu(x.bn1(x.conv1(seen)))
        deep = x.layer4(x.layer3(x.layer2(x.layer1(x.maxpool(first)))))
        got: list[Tensor] = []
        network.network.encoder.register_forward_hook(lambda *given: got.append(given[-1][-1]))
        network(pixels() * 2 - 1)
        close(got[0], deep)
    # The encoder of a whole segmentor's file.
    torch.save({"state_dict": reference().state_dict()}, tmp_path / "whole.pt")
    _, found = begun({**UNET, "encoder_weights": str(tmp_path / "whole.pt")})
    assert found.new == []


def test_grey_is_seen_as_three_equal_channels(tmp_path: Path) -> None:
    made = reference()
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    settings = {**UNET, "weights": str(tmp_path / "weights.pt"), "normalise": "none"}
    network, found = begun(settings, channels=1)
    grey = pixels(1) * 2 - 1
    with torch.no_grad():
        close(network(grey), made(grey.expand(-1, 3, -1, -1)))
    assert "summed over the file's 3 channels" in starting.said(found.record())
    network, found = begun(settings, channels=4)
    assert found.new == ["network.encoder.conv1.weight"]
    with pytest.raises(UserError, match=r"normalise: imagenet is for 1 or 3 channels.* have 4"):
        begun({**settings, "normalise": "imagenet"}, channels=4)


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(settings: dict[str, Any], match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            begun(settings)
        assert "\n" not in str(error.value)

    path = tmp_path / "weights.pt"
    given = {**UNET, "weights": str(path)}
    refused(given, "no such file of weights")
    torch.save(reference(), path)  # a whole module: its pickle would run code
    refused(given, r"save its state dict")
    torch.save({"lr": 0.1, "names": ["a"]}, path)
    refused(given, "holds no tensors by name")
    torch.save(resnet18(weights=None).state_dict(), path)
    refused({**OWN_UNET, "weights": str(path)}, "holds 0 of the .* weights of another network")
    state = reference().state_dict()
    state["encoder.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, path)
    refused(given, "encoder.conv1.weight is not finite")
    path.write_bytes(path.read_bytes()[:5000])
    refused(given, "no file of weights")
    refused({**OWN_UNET, "encoder_weights": "imagenet"}, "nothing is published .* for 'unet'")
    refused({"name": "segan", "channels": 2, "encoder_weights": str(path)}, "encoder")
    refused({**UNET, "encoder_weights": "imagnet"}, "no weights 'imagnet'; published: .*imagenet")
    for name in ("weights", "encoder_weights"):
        with pytest.raises(ValueError, match="at least 1 character"):
            SegmentorSettings.model_validate({**UNET, name: ""})
    with pytest.raises(ValueError, match="drop encoder_weights"):
        SegmentorSettings.model_validate({**given, "encoder_weights": "imagenet"})
    with pytest.raises(ValueError, match="of no file"):
        SegmentorSettings.model_validate({**UNET, "weights_classes": ["a"]})


def test_a_network_of_ones_own_may_have_such_keywords_itself() -> None:
    from mlseg.segmentation.nets import SEGMENTORS

    @SEGMENTORS.register("with_weights_of_its_own")
    class Own(nn.Module):
        def __init__(self, in_channels: int, num_classes: int, *, weights: int = 3) -> None:
            super().__init__()
            self.given = weights
            self.layer = nn.Conv2d(in_channels, num_classes, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.layer(image)

    settings = SegmentorSettings.model_validate({"name": "with_weights_of_its_own", "weights": 5})
    made = build_segmentor(settings, 3, 2)
    assert isinstance(made, Own)
    assert made.given == 5
    assert settings.said("weights") is None
    assert starting.start(made, settings, 3, ("a", "b")) is None


@pytest.mark.parametrize(
    ("settings", "library"),
    [
        (UNET, "segmentation_models_pytorch.create_model"),
        (
            {"name": "deeplabv3"},
            "torchvision.models.ResNet50_Weights.get_state_dict",
        ),
    ],
)
def test_downloads(settings: dict[str, Any], library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known\nand a traceback")

    parsed = SegmentorSettings.model_validate({**settings, "encoder_weights": "imagenet"})
    network = build_segmentor(parsed, 3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(library, offline)
        with pytest.raises(
            UserError, match=r"imagenet can't be downloaded here \(OSError"
        ) as error:
            starting.start(network, parsed, 3, ("a", "b"))
    assert "\n" not in str(error.value)


def test_what_was_downloaded_is_checked_for_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library in place of the network: what it would have made, had it downloaded it."""
    source, make = reference(), smp.create_model

    def downloaded(*given: Any, encoder_weights: str | None, **named: Any) -> nn.Module:
        if encoder_weights is None:
            return make(*given, encoder_weights=None, **named)
        made = make(*given, encoder_weights=None, **named)
        made.load_state_dict(source.state_dict(), strict=False) if named["in_channels"] == 3 else 0
        return made

    described: dict[str, Any] = {
        "input_space": "RGB",
        "input_range": [0, 1],
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    monkeypatch.setattr(smp, "create_model", downloaded)
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda *_, **__: described)
    source.segmentation_head = nn.Identity()
    network, found = begun({**UNET, "encoder_weights": "imagenet"})
    assert found.new == []
    assert torch.equal(network.network.encoder.conv1.weight, source.encoder.conv1.weight)
    described.update(mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(UserError, match=r"normalise=none gives them; set segmentor\.normalise"):
        begun({**UNET, "encoder_weights": "imagenet"})
    begun({**UNET, "encoder_weights": "imagenet", "normalise": "none"})
    described.update(input_range=[0, 255])
    with pytest.raises(UserError, match="as mlseg gives none"):
        begun({**UNET, "encoder_weights": "imagenet"})
