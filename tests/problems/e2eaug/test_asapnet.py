"""ASAP-Net's generator: published sizes, tiles, positions, cells."""

import math
from typing import Any

import pytest
import torch
from e2eaug_generators import check_export, check_gradients, label
from torch.nn import functional

from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.architecture import Architecture
from mlseg.problems.e2eaug.networks.asapnet import (
    SearchableGenerator,
    _reduced,
    positions,
)
from mlseg.problems.e2eaug.networks.generator import reflect

SMALL: dict[str, Any] = {"channels": 3, "deep_channels": 4, "mlp_channels": 4}


def tiny(**changes: Any) -> SearchableGenerator:
    torch.manual_seed(0)
    settings = {**SMALL, "grid": 2, "levels": 1, **changes}
    return SearchableGenerator(1, 3, (8, 12), **settings).double()


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [
        (1, {}, 80_959_299),  # 80.96 M
        (2, {}, 81_025_475),  # 81.03 M
        (1, {"channels": 16, "deep_channels": 128, "mlp_channels": 32}, 1_556_691),  # 1.56 M
    ],
)
def test_published_sizes(labels: int, settings: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        generator = SearchableGenerator(labels, 3, 256, search="none", **settings)
        assert SearchableGenerator(labels, 3, 256, **settings).num_cells == 4
    assert sum(p.numel() for p in generator.parameters()) == expected


@pytest.mark.parametrize(
    ("labels", "size", "expected"), [(1, 256, 13_827), (2, 256, 13_891), (2, 512, 14_147)]
)
def test_parameters_of_an_mlp(labels: int, size: int, expected: int) -> None:
    with torch.device("meta"):
        assert sum(SearchableGenerator(labels, 3, size).mlp_sizes) == expected


@pytest.mark.parametrize("search", ["both", "none"])
def test_shape_range_and_a_gradient_for_everything(search: str) -> None:
    check_gradients(tiny(search=search))


def test_a_tiles_pixels_depend_on_its_own_labels_alone() -> None:
    """The rest of the image enters by the MLPs' parameters, which are held here."""
    generator = tiny()
    mask = (label() + 1) / 2
    parameters = torch.randn(2, sum(generator.mlp_sizes), 2, 3, dtype=torch.float64)
    before = generator.paint(mask, parameters)
    changed = mask.clone()
    changed[0, 0, 1, 5] = 1 - changed[0, 0, 1, 5]  # in the tile of rows 0 to 3, columns 4 to 7
    after = generator.paint(changed, parameters)
    differs = (before != after).any(1)
    assert differs[0, 1, 5]
    differs[0, 1, 5] = False
    assert not differs.any(), "every pixel has its own label alone"
    # And its tile's parameters alone.
    other = parameters.clone()
    other[0, :, 0, 1] += 1
    differs = (generator.paint(mask, other) != before).any(1)
    assert differs[0, 0:4, 4:8].all()
    differs[0, 0:4, 4:8] = False
    assert not differs.any()


def test_an_mlp_by_hand() -> None:
    generator = tiny()
    mask = (label(1) + 1) / 2
    parameters = torch.randn(1, sum(generator.mlp_sizes), 2, 3, dtype=torch.float64)
    image = generator.paint(mask, parameters)
    row, column = 6, 3  # in tile (1, 0), at (2, 3) within it
    place = positions(4, mask)[:, 2, 3]
    x, rest = torch.cat([mask[0, :, row, column], place]), parameters[0, :, 1, 0]
    widths = [1 + 8, 4, 4, 4, 4, 3]
    for layer in range(5):
        narrow, wide = widths[layer : layer + 2]
        bias, weight, rest = rest.split([wide, wide * narrow, len(rest) - wide * (narrow + 1)])
        x = x @ weight.reshape(narrow, wide) + bias
        x = functional.leaky_relu(x, 0.01) if layer < 4 else x.tanh()
    torch.testing.assert_close(image[0, :, row, column], x)


def test_positions_are_waves_of_the_tiles_halves() -> None:
    found = positions(8, torch.zeros((), dtype=torch.float64))
    assert found.shape == (12, 8, 8)
    x, y = 3, 6
    expected = []
    for period in (8, 4, 2):
        for place in (x, y):
            angle = 2 * math.pi * place / period
            expected += [math.cos(angle), math.sin(angle)]
    torch.testing.assert_close(found[:, y, x], torch.tensor(expected, dtype=torch.float64))


def test_reduction_keeps_planes_and_reflection_is_torchs() -> None:
    """A tent's weights sum to one and lie evenly about the centre of the pixels they stand for."""
    ramp = torch.arange(16.0, dtype=torch.float64).expand(1, 1, 16, 16)
    small = _reduced(ramp, 4)
    assert small.shape == (1, 1, 4, 4)
    torch.testing.assert_close(small[0, 0, 0, 1:3], torch.tensor([5.5, 9.5], dtype=torch.float64))
    torch.testing.assert_close(_reduced(torch.ones(1, 2, 8, 8), 2), torch.ones(1, 2, 4, 4))
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(reflect(x, 2, 1), functional.pad(x, (1, 1, 2, 2), mode="reflect"))


@pytest.mark.parametrize("search", ["both", "none"])
def test_an_export_is_the_same_function(search: str) -> None:
    check_export(tiny(search=search))


@pytest.mark.parametrize(
    ("size", "settings", "words"),
    [
        (100, {}, "generator.grid: .* 100x100"),
        (64, {}, "generator.levels: .* 4 pixels wide .* 16"),
        (96, {"grid": 16, "levels": 1}, "generator.levels: .* 6 pixels wide"),
        ((32, 40), {"grid": 2, "levels": 2}, "generator.grid"),
        (16, {"grid": 1, "levels": 4}, "generator.grid: 1 leaves"),
        (8, {"grid": 16}, "generator.grid"),
    ],
)
def test_sizes_that_it_cannot_have(size: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SearchableGenerator(1, 3, size, **SMALL, **settings)


def test_another_size_than_its_own() -> None:
    generator = tiny()
    with pytest.raises(UserError, match=r"data.image_size: this asapnet has tiles of 4"):
        generator(torch.zeros(1, 1, 16, 16).double(), Architecture(1).double()())


def test_a_training_step_never_reads_from_the_device() -> None:
    """On the meta device any read of a value raises."""
    with torch.device("meta"):
        generator = SearchableGenerator(1, 3, 512, channels=1, deep_channels=2, mlp_channels=2)
        weights = Architecture(generator.num_cells)()
        generator(torch.empty(2, 1, 512, 512), weights).square().mean().backward()
