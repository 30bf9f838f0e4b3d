"""E2EAug's generators at a size that trains in a second, for images of 32 pixels."""

from typing import Any

import torch
from torch import Tensor, nn

from mlseg.problems.e2eaug.networks.architecture import Architecture
from mlseg.problems.e2eaug.networks.cells import Cell
from mlseg.problems.e2eaug.networks.generator import MaskToImage

GENERATORS: dict[str, dict[str, Any]] = {
    "pix2pix": {"generator": {"channels": 4, "levels": 3}},
    "spade": {"generator": {"name": "spade", "channels": 2, "levels": 3, "hidden": 4}},
    "asapnet": {
        "generator": {
            "name": "asapnet",
            "channels": 4,
            "deep_channels": 8,
            "mlp_channels": 4,
            "grid": 4,
            "levels": 3,
        }
    },
}
"""By name, as changes to a tiny config; the discriminator is the one that they bring."""

OTHERS = ("spade", "asapnet")


def label(batch: int = 2) -> Tensor:
    """(B, 1, 8, 12) a label map in [-1, 1], in float64."""
    return torch.randint(0, 2, (batch, 1, 8, 12)).double() * 2 - 1


def check_gradients(generator: MaskToImage) -> None:
    """Its image's shape and range, and that everything in it and its alphas has a gradient."""
    alphas = Architecture(generator.num_cells).double()
    image = generator(label(1), alphas() if generator.num_cells else None)
    assert image.shape == (1, 3, 8, 12)
    assert image.abs().max() <= 1
    image.square().sum().backward()
    for name, p in generator.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    if generator.num_cells:
        assert alphas.alphas.grad is not None
        assert (alphas.alphas.grad != 0).all()


def check_export(generator: MaskToImage) -> None:
    """What it is merged into is the same function of tensors of its own, and can be made again."""
    weights = torch.randn(generator.num_cells, 3).double().softmax(1)
    state = torch.get_rng_state()
    export: Any = generator.merged(weights if generator.num_cells else None)
    assert torch.equal(torch.get_rng_state(), state)
    mask = label()
    torch.testing.assert_close(export(mask), generator(mask, weights), rtol=0, atol=1e-12)
    assert not any(isinstance(module, Cell) for module in export.modules())
    plain: Any = generator.plain
    again: nn.Module = plain(**export.settings()).double()
    again.load_state_dict(export.state_dict())
    assert torch.equal(again(mask), export(mask))
    shared = {p.data_ptr() for p in generator.parameters()}
    assert not shared & {p.data_ptr() for p in export.parameters()}
