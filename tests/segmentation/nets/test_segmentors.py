"""Segmentors by name: sizes, any image, clear errors, nothing downloaded."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mlseg.config import Settings, dump, load, parse
from mlseg.errors import UserError
from mlseg.segmentation.nets import SegmentorSettings, build_segmentor
from mlseg.segmentation.nets.layers import BatchNorm, accept_single_values, pad_to_multiple
from mlseg.segmentation.nets.smp import architectures
from mlseg.testing.differences import gradient


class Experiment(Settings):
    """A config with a segmentor in it."""

    segmentor: SegmentorSettings = SegmentorSettings()


def _parse(tmp_path: Path, text: str) -> SegmentorSettings:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse(Experiment, load(path)).segmentor


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a segmentor went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(("name", "millions"), [("unet", 31.038), ("deeplabv3", 39.634)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = build_segmentor(SegmentorSettings(name=name), 3, 2)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert round(count / 1e6, 3) == millions


SMALL = [
    {"name": "unet", "channels": 4, "levels": 3},
    {"name": "deeplabv3"},
    {"name": "segan", "channels": 4, "levels": 4},
    *({"name": name, "encoder": "resnet18"} for name in architectures() if name != "dpt"),
    {"name": "segformer", "encoder": "mit_b0"},
    {
        "name": "smp_unet",
        "encoder": "resnet18",
        "options": {"encoder_depth": 3, "decoder_channels": [8, 8, 4]},
    },
]


@pytest.mark.parametrize("values", SMALL, ids=lambda values: "-".join(map(str, values.values())))
@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 37, 50)])
def test_any_size_and_a_batch_of_one_train(
    values: dict[str, object], shape: tuple[int, int, int]
) -> None:
    batch, height, width = shape
    network = build_segmentor(SegmentorSettings.model_validate(values), 1, 3)
    logits = network(torch.rand(batch, 1, height, width) * 2 - 1)
    assert logits.shape == (batch, 3, height, width)
    logits.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert sum(p.grad is not None for p in network.parameters()) > 10


def test_a_transformer_of_fixed_input_size_takes_any_image() -> None:
    settings = SegmentorSettings(name="dpt", encoder="tu-vit_tiny_patch16_224")
    network = build_segmentor(settings, 3, 2).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 40, 56)).shape == (1, 2, 40, 56)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{name: unet, channels: 8}", {"name": "unet", "channels": 8, "levels": 4}),
        ("{}", {"name": "unet", "channels": 64, "levels": 4}),
        ("{name: deeplabv3}", {"name": "deeplabv3"}),
        ("{name: fpn}", {"name": "fpn", "encoder": "resnet34", "options": {}}),
    ],
)
def test_from_yaml_and_back(tmp_path: Path, line: str, expected: dict[str, object]) -> None:
    settings = _parse(tmp_path, f"segmentor: {line}\n")
    assert settings.model_dump(exclude_none=True) == expected
    again = _parse(tmp_path, dump(Experiment(segmentor=settings)))
    assert again == settings
    assert SegmentorSettings.model_validate(settings.model_dump()) == settings
    # Former versions wrote null for what other networks take.
    former = dict.fromkeys(("channels", "expansion", "encoder", "options")) | settings.model_dump()
    assert SegmentorSettings.model_validate(former) == settings


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("{name: unett}", ["'unett'", "unet", "deeplabv3", "unetplusplus"]),
        ("{name: deeplabv3, channels: 4}", ["segmentor.channels: unknown key; valid here: name"]),
        ("{name: unet, encoder: resnet18}", ["segmentor.encoder: unknown key", "channels, levels"]),
        ("{name: unet, chanels: 4}", ["segmentor.chanels", "did you mean 'segmentor.channels'?"]),
        ("{name: unet, channels: 0}", ["segmentor.channels"]),
        ("{name: unet, channels: four}", ["segmentor.channels"]),
        ("{name: fpn, encoder: resnt18}", ["segmentor.encoder", "resnt18", "resnet18"]),
        ("{name: fpn, options: {depth: 3}}", ["segmentor.options", "'depth'", "encoder_depth"]),
        ("{name: 3}", ["segmentor.name"]),
    ],
)
def test_errors_are_one_line_with_the_valid_choices(
    tmp_path: Path, line: str, texts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        _parse(tmp_path, f"segmentor: {line}\n")
    message = str(caught.value)
    assert "\n" not in message
    assert all(text in message for text in texts), message


def test_what_the_library_refuses_is_a_user_error() -> None:
    settings = SegmentorSettings(name="smp_unet", encoder="resnet18", options={"encoder_depth": 99})
    with pytest.raises(UserError, match=r"'unet' .* 'resnet18': .* depth"):
        build_segmentor(settings, 3, 2)
    with pytest.raises(UserError, match="tu-no_such_model"):
        build_segmentor(SegmentorSettings(name="fpn", encoder="tu-no_such_model"), 3, 2)


def test_channels_are_last_in_memory() -> None:
    network = build_segmentor(SegmentorSettings(name="unet", channels=4, levels=3), 3, 2)
    kernels = [p for p in network.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert not all(p.is_contiguous() for p in kernels)


def test_fewer_than_two_classes() -> None:
    with pytest.raises(UserError, match="at least 2 classes"):
        build_segmentor(SegmentorSettings(channels=2), 3, 1)


def test_second_derivative_through_a_unet() -> None:
    torch.manual_seed(0)
    network = build_segmentor(SegmentorSettings(channels=2, levels=1), 1, 2).double()
    image = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = list(network.parameters())

    def function(image: torch.Tensor) -> torch.Tensor:
        return network(image).square().mean()

    (first, *_) = torch.autograd.grad(function(image), parameters, create_graph=True)
    mixed = torch.autograd.grad(first.sum(), image)[0]

    def slope(image: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(function(image), parameters[:1])[0].sum()

    # Steps so small cross no kink; a rounding unit of 1e-16 over them, times a condition of 100.
    gradient(slope, image.detach(), 1e-6).check(mixed, within=1e-6)


def test_batch_norm_with_one_value_uses_its_running_statistics() -> None:
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(ours(x), theirs(x))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    single = torch.randn(1, 3, 1, 1)
    assert torch.equal(ours(single), theirs.eval()(single))
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    with pytest.raises(ValueError, match="more than 1 value"):
        theirs.train()(single)


def test_replacing_norms_keeps_tensors_and_behaviour() -> None:
    inner = nn.Sequential(nn.BatchNorm2d(2, eps=0.1))
    network = nn.Sequential(nn.Conv2d(1, 2, 1), inner)
    network(torch.randn(4, 1, 3, 3))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected = network.eval()(torch.ones(1, 1, 2, 2))
    accept_single_values(network)
    assert isinstance(inner[0], BatchNorm)
    assert state.keys() == network.state_dict().keys()
    assert torch.equal(network.eval()(torch.ones(1, 1, 2, 2)), expected)


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (1, 3)])
def test_padding_repeats_edges_and_can_be_cut_off(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    padded, (rows, columns) = pad_to_multiple(x, 4)
    assert padded.shape[-2] % 4 == padded.shape[-1] % 4 == 0
    assert torch.equal(padded[..., rows, columns], x)
    pad = (columns.start, padded.shape[-1] - columns.stop, rows.start, padded.shape[-2] - rows.stop)
    assert torch.equal(padded, nn.functional.pad(x, pad, mode="replicate"))
    assert pad_to_multiple(x, 4, smallest=12)[0].shape[-2:] == (12, 12)


def test_another_librarys_networks_are_imported_for_their_names_alone() -> None:
    program = (
        "import sys; from mlseg.segmentation.nets import SegmentorSettings, build_segmentor\n"
        "build_segmentor(SegmentorSettings(channels=2), 3, 2)\n"
        "assert 'segmentation_models_pytorch' not in sys.modules\n"
        "SegmentorSettings(name='fpn')\n"
        "assert 'segmentation_models_pytorch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
