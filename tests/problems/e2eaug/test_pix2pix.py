"""The generator: published sizes, any image size, exports equal to what they export."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.architecture import Architecture
from mlseg.problems.e2eaug.networks.cells import Cell
from mlseg.problems.e2eaug.networks.pix2pix import (
    Generator,
    Search,
    SearchableGenerator,
    count_levels,
)
from mlseg.testing.differences import derivative

SEARCHES: tuple[Search, ...] = ("both", "decoder", "none")


def _tiny(search: Search = "both", size: int | tuple[int, int] = 16) -> SearchableGenerator:
    torch.manual_seed(0)
    return SearchableGenerator(2, 3, size, channels=2, search=search).double()


def _weights(generator: SearchableGenerator) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(generator.num_cells, 3, dtype=torch.float64).softmax(1)


@pytest.mark.parametrize(
    ("search", "millions", "cells"),
    [("none", 54.414, 0), ("decoder", 272.360, 8), ("both", 394.440, 16)],
)
def test_published_sizes(search: Search, millions: float, cells: int) -> None:
    with torch.device("meta"):
        generator = SearchableGenerator(3, 3, 256, search=search)
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert round(count / 1e6, 3) == millions
    assert generator.num_cells == len(generator.cell_names) == cells


@pytest.mark.parametrize(
    ("size", "levels", "expected"),
    [(256, None, 8), (64, None, 6), ([64, 128], None, 6), (100, None, 6), (100, 7, 7), (256, 5, 5)],
)
def test_levels(size: int, levels: int | None, expected: int) -> None:
    assert count_levels(size, levels) == expected


@pytest.mark.parametrize(("size", "levels"), [(64, 7), (3, None), (64, 1), (0, None)])
def test_impossible_levels(size: int, levels: int | None) -> None:
    with pytest.raises(UserError, match="levels"):
        SearchableGenerator(1, 3, size, levels=levels)


def test_unknown_search() -> None:
    settings: dict[str, Any] = {"search": "encoder"}
    with pytest.raises(UserError, match="both, decoder, none"):
        SearchableGenerator(1, 3, 16, **settings)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 37, 50), (1, 64, 100)])
def test_any_size_and_a_batch_of_one_train(search: Search, shape: tuple[int, int, int]) -> None:
    batch, height, width = shape
    generator = SearchableGenerator(1, 3, (height, width), channels=2, search=search)
    alphas = Architecture(generator.num_cells)
    image = generator(
        torch.rand(batch, 1, height, width), alphas() if alphas.alphas.numel() else None
    )
    assert image.shape == (batch, 3, height, width)
    assert image.abs().max() <= 1
    image.square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in generator.parameters()
    )
    if search != "none":
        assert alphas.alphas.grad is not None
        assert (alphas.alphas.grad.abs().sum(1) > 0).all()


def test_structure_is_that_of_pix2pix() -> None:
    generator = Generator(3, 3, levels=8)
    encoder = [module for module in generator.encoder if isinstance(module, nn.Conv2d)]
    decoder = [module for module in generator.decoder if isinstance(module, nn.ConvTranspose2d)]
    assert [module.out_channels for module in encoder] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert [module.in_channels for module in decoder] == [
        512, 1024, 1024, 1024, 1024, 512, 256, 128,
    ]  # fmt: skip
    assert [module.bias is not None for module in encoder] == [False] * 8
    assert [module.bias is not None for module in decoder] == [False] * 7 + [True]
    assert (len(generator.encoder_norms), len(generator.decoder_norms)) == (6, 7)
    assert abs(encoder[4].weight.std().item() - 0.02) < 1e-3
    scale = torch.cat([p for n, p in generator.decoder_norms.named_parameters() if "weight" in n])
    assert abs(scale.mean().item() - 1) < 5e-3
    assert abs(float(scale.std()) - 0.02) < 2e-3


def test_dropout_stands_on_three_levels_after_the_innermost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, float, bool]] = []

    def record(x: Tensor, probability: float, training: bool) -> Tensor:
        seen.append((x.shape[-1], probability, training))
        return x

    monkeypatch.setattr(nn.functional, "dropout", record)
    generator = SearchableGenerator(1, 1, 64, channels=1, search="none")
    generator(torch.zeros(1, 1, 64, 64))
    assert seen == [(4, 0.5, True), (8, 0.5, True), (16, 0.5, True)]


@pytest.mark.parametrize("search", SEARCHES)
def test_merged_export_is_the_same_function(search: Search) -> None:
    generator = _tiny(search)
    weights = _weights(generator)
    label = torch.rand(3, 2, 16, 16, dtype=torch.float64) * 2 - 1
    generator(label, weights)  # moves the running statistics
    generator.eval()
    state = torch.get_rng_state()
    export = generator.merged(weights)
    assert isinstance(export, Generator)
    assert torch.equal(torch.get_rng_state(), state), "an export must not disturb a run"
    assert not export.training
    torch.testing.assert_close(export(label), generator(label, weights), rtol=0, atol=1e-10)
    assert not any(isinstance(module, Cell) for module in export.modules())
    rebuilt = (
        Generator(2, 3, export.levels, export.channels, kernels=export.kernels).double().eval()
    )
    rebuilt.load_state_dict(export.state_dict())
    assert torch.equal(rebuilt(label), export(label))
    shared = {parameter.data_ptr() for parameter in generator.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in export.parameters()}
    assert all(parameter.requires_grad for parameter in export.parameters())


def test_merged_export_trains_like_the_original() -> None:
    """In training mode too, with the same dropout draw."""
    generator = _tiny()
    weights = _weights(generator)
    label = torch.rand(2, 2, 16, 16, dtype=torch.float64)
    export = generator.merged(weights)
    assert export.training
    torch.manual_seed(3)
    expected = generator(label, weights)
    torch.manual_seed(3)
    torch.testing.assert_close(export(label), expected, rtol=0, atol=1e-10)


def test_weights_of_the_wrong_shape() -> None:
    generator = _tiny()
    label = torch.zeros(1, 2, 16, 16, dtype=torch.float64)
    for wrong in (None, torch.ones(3), torch.ones(generator.num_cells, 2)):
        with pytest.raises(ValueError, match="selection weights"):
            generator(label, wrong)


def test_cell_names_follow_the_order_of_the_weights() -> None:
    generator = _tiny()
    assert generator.cell_names == [
        "encoder.0", "encoder.1", "encoder.2", "encoder.3",
        "decoder.3", "decoder.2", "decoder.1", "decoder.0",
    ]  # fmt: skip
    order: list[nn.Module] = []
    for module in generator.modules():
        if isinstance(module, Cell):
            module.register_forward_hook(lambda cell, *_: order.append(cell))
    generator(torch.zeros(1, 2, 16, 16, dtype=torch.float64), _weights(generator))
    assert order == [*generator.encoder, *generator.decoder]


def test_second_derivative_through_the_generator() -> None:
    """Mixed derivative in weights and parameters: double backward against a difference quotient."""
    generator = _tiny(size=8).eval()
    # Kernels of usual size: with pix2pix's the signal in evaluation mode is so small that any
    # finite step crosses kinks of the ReLUs.
    parameters = {k: 15 * v.detach() for k, v in generator.named_parameters()}
    buffers = dict(generator.named_buffers())
    label = torch.rand(2, 2, 8, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], weights: Tensor) -> Tensor:
        image = torch.func.functional_call(generator, (parameters, buffers), (label, weights))
        return image.square().mean()

    weights = _weights(generator)
    direction = {k: torch.randn_like(v) for k, v in parameters.items()}

    def slope(weights: Tensor) -> Tensor:
        gradient = torch.func.grad(loss)(parameters, weights)
        return sum(((gradient[k] * direction[k]).sum() for k in gradient), torch.zeros(()))

    def gradient(shift: float) -> Tensor:
        moved = {k: v + shift * direction[k] for k, v in parameters.items()}
        return torch.func.grad(loss, 1)(moved, weights)

    reverse = torch.func.grad(slope)(weights)
    # Steps so small cross no kink; a rounding unit of 1e-16 over them, times a condition of 100.
    derivative(gradient, 1e-6).check(reverse, within=1e-6)
    forward = torch.func.jvp(
        lambda p: torch.func.grad(loss, 1)(p, weights), (parameters,), (direction,)
    )[1]
    torch.testing.assert_close(forward, reverse, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_training_step_never_reads_from_the_device(search: Search) -> None:
    """On the meta device any read of a value raises."""
    with torch.device("meta"):
        generator = SearchableGenerator(1, 3, 64, channels=2, search=search)
        weights = Architecture(generator.num_cells)()
        image = generator(torch.empty(2, 1, 50, 64), weights)
        image.square().mean().backward()
    assert image.shape == (2, 3, 50, 64)
