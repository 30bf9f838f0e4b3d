"""A cell of different operators: sizes, and what each can express that the others can't."""

from typing import Any

import pytest
import tiny
import torch
from e2eaug_generators import GENERATORS
from torch import Tensor

from mlseg import checkpoint
from mlseg.problems.e2eaug.networks.generator import GENERATORS as NETWORKS
from mlseg.problems.e2eaug.networks.generator import Fixed
from mlseg.problems.e2eaug.networks.rich_cell import CANDIDATES, RichCell

PLAIN, DILATED, DEPTHWISE, SKIP, RESIZE = range(5)


def made(transposed: bool, inputs: int = 3, outputs: int = 2) -> RichCell:
    torch.manual_seed(0)
    return RichCell(inputs, outputs, transposed, bias=False).double()


def response(cell: RichCell, candidate: int) -> Tensor:
    """(Cin, Cout, h, w): what a candidate makes of one pixel in the middle, by channel."""
    side = 8 if cell.transposed else 16
    inputs = cell.resized.in_channels
    x = torch.zeros(inputs, inputs, side, side, dtype=torch.float64)
    x[range(inputs), range(inputs), side // 2, side // 2] = 1
    return cell.candidates(x)[candidate].detach()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 2), (4, 6), (8, 2)])
@pytest.mark.parametrize("channels", [(1, 4), (4, 1), (3, 3)])
def test_all_halve_or_double(
    transposed: bool, shape: tuple[int, int], channels: tuple[int, int]
) -> None:
    cell = RichCell(*channels, transposed, bias=True)
    height, width = (2 * s if transposed else s // 2 for s in shape)
    outputs = cell.candidates(torch.randn(2, channels[0], *shape))
    assert len(outputs) == len(CANDIDATES)
    assert all(y.shape == (2, channels[1], height, width) for y in outputs)
    weights = torch.rand(5)
    expected = sum(w * y for w, y in zip(weights, outputs, strict=True))
    x = torch.randn(2, channels[0], *shape)
    expected = sum(w * y for w, y in zip(weights, cell.candidates(x), strict=True))
    torch.testing.assert_close(cell(x, weights), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_only_the_dilated_one_reaches_beyond_an_8x8_kernel(transposed: bool) -> None:
    cell = made(transposed)

    def reach(candidate: int) -> int:
        rows = response(cell, candidate).abs().sum((0, 1, 3)).nonzero().flatten()
        return int(rows[-1] - rows[0]) + 1

    others = [reach(k) for k in (PLAIN, DEPTHWISE, SKIP, RESIZE)]
    assert max(others) <= (4 if transposed else 2)
    assert reach(DILATED) == (10 if transposed else 4)  # every third pixel; of those every second


def test_only_a_dense_kernel_has_its_own_taps_for_every_pair_of_channels() -> None:
    """Transposed, so that the response to a pixel is the kernel itself."""
    cell = made(transposed=True, inputs=4, outputs=4)

    def rank(candidate: int) -> int:
        taps = response(cell, candidate)[:, 0].flatten(1)  # input channels by taps, output 0
        return int(torch.linalg.matrix_rank(taps))

    assert rank(PLAIN) == rank(DILATED) == 4
    assert rank(DEPTHWISE) == 1
    # A convolution of a doubled map: the finest wave is in no response.
    wave = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)
    assert (response(cell, RESIZE) * wave).sum(-1).abs().max() < 1e-12
    assert (response(cell, PLAIN) * wave).sum(-1).abs().max() > 1e-3


def test_a_skip_has_no_parameters() -> None:
    cell = made(transposed=False)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(
        cell.candidates(x)[SKIP].sum(), list(cell.parameters()), allow_unused=True
    )
    assert all(g is None for g in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("generator", GENERATORS)
def test_a_run_chooses_among_five(generator: str, tmp_path: Any) -> None:
    network = {**GENERATORS[generator]["generator"], "candidates": "rich"}
    engine = tiny.build("e2eaug", {"generator": network, "gan.pretrain": 1}, tmp_path)
    engine.run()
    engine.results()
    alphas = engine.architecture.module.alphas
    assert alphas.shape[1] == 5
    assert set(engine.architecture.module.choices()) <= set(CANDIDATES)
    saved = checkpoint.load(tmp_path / "checkpoints" / "generator.pt")
    weights = engine.generator.selection()
    assert weights is not None
    again = Fixed(NETWORKS.get(generator)(**saved["settings"]), weights, {})
    again.load_state_dict(saved["module"])
    engine.generator.module.eval()
    label = torch.ones(1, 1, 32, 32)
    with torch.no_grad():
        expected = engine.generator(label)
    torch.testing.assert_close(again.eval()(label), expected)
