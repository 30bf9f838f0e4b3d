"""SPADE's generator: published sizes, its equations, what its cells and its vectors do."""

from typing import Any

import pytest
import torch
from e2eaug_generators import check_export, check_gradients, label
from torch.nn import functional

from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.architecture import Architecture
from mlseg.problems.e2eaug.networks.spade import (
    Norm,
    SearchableGenerator,
    SpatiallyAdaptive,
)
from mlseg.problems.e2eaug.networks.spectral import SpectralConv2d, spectral, turn


def tiny(**changes: Any) -> SearchableGenerator:
    torch.manual_seed(0)
    settings = {"channels": 2, "levels": 2, "hidden": 3, **changes}
    return SearchableGenerator(1, 3, (8, 12), **settings).double()


@pytest.mark.parametrize(
    ("labels", "channels", "expected"),
    [(1, 64, 91_999_683), (2, 64, 92_029_635), (1, 16, 10_507_251), (1, 8, 4_222_651)],
)
def test_published_sizes(labels: int, channels: int, expected: int) -> None:
    with torch.device("meta"):
        plain = SearchableGenerator(labels, 3, 256, channels=channels, search="none")
        cells = SearchableGenerator(labels, 3, 256, channels=channels)
    assert sum(p.numel() for p in plain.parameters()) == expected
    assert plain.num_cells == 0
    assert cells.num_cells == 5
    widths = [16 * channels, 16 * channels, 8 * channels, 4 * channels, 2 * channels]
    more = sum(116 * width**2 for width in widths)
    assert sum(p.numel() for p in cells.parameters()) == expected + more


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_without_modulation_it_is_the_normalisation(norm: Norm) -> None:
    layer = SpatiallyAdaptive(3, 1, 4, norm)
    for convolution in (layer.gamma, layer.beta):
        torch.nn.init.zeros_(convolution.weight)
        assert convolution.bias is not None
        torch.nn.init.zeros_(convolution.bias)
    x = torch.randn(2, 3, 4, 6)
    dims = (2, 3) if norm == "instance" else (0, 2, 3)
    mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
    torch.testing.assert_close(layer(x, label().float()), (x - mean) / (var + 1e-5).sqrt())


def test_the_modulation_is_scale_and_shift_at_each_pixel() -> None:
    layer = SpatiallyAdaptive(3, 1, 4, "instance").double()
    x, mask = torch.randn(2, 3, 4, 6, dtype=torch.float64), label()
    small = mask[:, :, ::2, ::2]  # by the nearest pixel
    shared = functional.conv2d(small, layer.shared.weight, layer.shared.bias, padding=1).relu()
    scale = functional.conv2d(shared, layer.gamma.weight, layer.gamma.bias, padding=1)
    shift = functional.conv2d(shared, layer.beta.weight, layer.beta.bias, padding=1)
    expected = functional.instance_norm(x) * (1 + scale) + shift
    torch.testing.assert_close(layer(x, mask), expected)


@pytest.mark.parametrize("search", ["both", "none"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_shape_range_and_a_gradient_for_everything(search: str, norm: str) -> None:
    check_gradients(tiny(search=search, norm=norm))


def test_a_forward_pass_changes_nothing() -> None:
    generator = tiny()
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    generator(label(), Architecture(2).double()())
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())


@pytest.mark.parametrize("search", ["both", "none"])
def test_an_export_is_the_same_function(search: str) -> None:
    generator = tiny(search=search)
    turn(spectral(generator))
    check_export(generator)


@pytest.mark.parametrize(
    ("size", "settings", "words"),
    [
        (100, {}, "generator.levels: spade with 5 .* 100x100 .* lower generator.levels to 2"),
        ((64, 27), {"levels": 3}, "generator.levels: .* multiples of 8"),
        (32, {}, "single position .* generator.levels to 4"),
    ],
)
def test_sizes_that_it_cannot_have(size: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SearchableGenerator(1, 3, size, channels=1, **settings)


def test_the_batchs_statistics_do_without_several_positions() -> None:
    generator = SearchableGenerator(1, 3, 4, channels=1, levels=2, hidden=1, norm="batch")
    assert generator(torch.ones(1, 1, 4, 4), Architecture(2)()).isfinite().all()


# ------------------------------------------------------------------------- spectral vectors


def test_sigma_is_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    convolution = SpectralConv2d(3, 4, 3).double()
    for _ in range(500):
        convolution.turn()
    true = torch.linalg.matrix_norm(convolution.weight.flatten(1), 2)
    torch.testing.assert_close(convolution.sigma(), true)
    # Its derivative, u v^T, is part of the gradient.
    (gradient,) = torch.autograd.grad(convolution.sigma(), convolution.weight)
    expected = torch.outer(convolution.left, convolution.right).reshape(gradient.shape)
    torch.testing.assert_close(gradient, expected)


def test_turning_leaves_a_graph_that_is_still_to_be_walked() -> None:
    convolution = SpectralConv2d(2, 2, 3).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    expected = torch.autograd.grad(convolution(x).sum(), convolution.weight)
    y = convolution(x).sum()
    convolution.turn()
    assert torch.equal(torch.autograd.grad(y, convolution.weight)[0], expected[0])


def test_a_training_step_never_reads_from_the_device() -> None:
    """On the meta device any read of a value raises."""
    with torch.device("meta"):
        generator = SearchableGenerator(1, 3, 64, channels=1, hidden=2)
        turn(spectral(generator))
        weights = Architecture(generator.num_cells)()
        generator(torch.empty(2, 1, 64, 64), weights).square().mean().backward()
