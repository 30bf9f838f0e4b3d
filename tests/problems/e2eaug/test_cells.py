"""A cell's two ways of computing are one function, derivatives included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mlseg.problems.e2eaug.networks.cells import MERGE_FROM, SIZES, Cell, mix

ATOL = 1e-12


def _case(
    transposed: bool, positions: tuple[int, int], batch: int = 2, seed: int = 0
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Input, three kernels and weights for maps of `positions` on the smaller side, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    height, width = positions if transposed else (2 * positions[0], 2 * positions[1])
    first, second = (2, 3) if transposed else (3, 2)
    x = draw(batch, 2, height, width).requires_grad_()
    kernels = [(0.2 * draw(first, second, size, size)).requires_grad_() for size in SIZES]
    return x, kernels, draw(3).softmax(0).requires_grad_()


def _definition(x: Tensor, kernels: list[Tensor], weights: Tensor, transposed: bool) -> Tensor:
    """E2EAug's formula with torch's own operators and paddings, no shortcut."""
    convolve = functional.conv_transpose2d if transposed else functional.conv2d
    return sum(
        weight * convolve(x, kernel, stride=2, padding=kernel.shape[-1] // 2 - 1)
        for weight, kernel in zip(weights, kernels, strict=True)
    )


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@given(
    positions=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_each_way_is_the_definition_with_its_gradients(
    merge: bool, transposed: bool, positions: tuple[int, int], batch: int, seed: int
) -> None:
    x, kernels, weights = _case(transposed, positions, batch, seed)
    inputs = [x, *kernels, weights]
    expected = _definition(x, kernels, weights, transposed)
    y = mix(x, kernels, weights, transposed, merge)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=0, atol=ATOL)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(y, inputs, upstream)
    references = torch.autograd.grad(expected, inputs, upstream)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=ATOL)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("positions", [(1, 1), (2, 3)])
def test_second_derivatives(merge: bool, transposed: bool, positions: tuple[int, int]) -> None:
    x, kernels, weights = _case(transposed, positions, batch=1)

    def function(*inputs: Tensor) -> Tensor:
        return mix(inputs[0], inputs[1:4], inputs[4], transposed, merge)

    inputs = (x, *kernels, weights)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("merge", [False, True])
def test_torch_func_sees_the_same_derivatives(merge: bool) -> None:
    x, kernels, weights = _case(False, (2, 2))

    def value(weights: Tensor) -> Tensor:
        return mix(x.detach(), [k.detach() for k in kernels], weights, False, merge).sin().sum()

    point = weights.detach()
    forward_over_reverse = torch.func.hessian(value)(point)
    reverse_over_reverse = torch.autograd.functional.hessian(value, point)
    torch.testing.assert_close(forward_over_reverse, reverse_over_reverse, rtol=0, atol=1e-10)
    several = torch.stack([point, point.flip(0)])
    one_by_one = torch.stack([value(row) for row in several])
    torch.testing.assert_close(torch.vmap(value)(several), one_by_one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_rule_counts_positions_times_batch(transposed: bool, batch: int) -> None:
    """Merged convolutions are one kernel call, separate ones three: count them."""
    for side in (4, 8, 16):
        x, kernels, weights = _case(transposed, (side, side), batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            mix(x, kernels, weights, transposed)
        name = "aten::conv_transpose2d" if transposed else "aten::conv2d"
        calls = sum(event.count for event in profile.key_averages() if event.key == name)
        assert calls == (1 if batch * side * side >= MERGE_FROM else 3)


@pytest.mark.parametrize("transposed", [False, True])
@given(seed=st.integers(0, 1000), zeros=st.sets(st.integers(0, 2), max_size=2))
@settings(max_examples=12, deadline=None)
def test_any_alphas_make_one_8x8_convolution(transposed: bool, seed: int, zeros: set[int]) -> None:
    """What alphas can't do: change which functions a cell can be.

    A mixture at any weights is one 8x8 convolution; and every 8x8 convolution is such a mixture at
    any weights whose last one isn't zero, whatever the smaller kernels are.
    """
    x, kernels, weights = _case(transposed, (4, 5), seed=seed)
    weights = torch.tensor(
        [0.0 if index in zeros else float(w) for index, w in enumerate(weights)]
    ).double()
    convolve = functional.conv_transpose2d if transposed else functional.conv2d
    total = sum(
        weight * functional.pad(kernel, [(8 - size) // 2] * 4)
        for weight, kernel, size in zip(weights, kernels, SIZES, strict=True)
    )
    mixture = _definition(x, kernels, weights, transposed)
    torch.testing.assert_close(mixture, convolve(x, total, stride=2, padding=3), rtol=0, atol=ATOL)
    if not float(weights[2]):
        return
    wanted = torch.randn_like(kernels[2])
    smaller = total - weights[2] * kernels[2]
    solved = [*kernels[:2], (wanted - smaller) / weights[2]]
    torch.testing.assert_close(
        _definition(x, solved, weights, transposed),
        convolve(x, wanted, stride=2, padding=3),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_cell_biases_are_weighted_too(transposed: bool) -> None:
    cell = Cell(2, 3, transposed, bias=True).double()
    assert cell.bias is not None
    with torch.no_grad():
        cell.bias.normal_()
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    convolve = functional.conv_transpose2d if transposed else functional.conv2d
    kernels = (cell.kernel4, cell.kernel6, cell.kernel8)
    expected = sum(
        weight * convolve(x, kernel, bias, stride=2, padding=kernel.shape[-1] // 2 - 1)
        for weight, kernel, bias in zip(weights, kernels, cell.bias, strict=True)
    )
    torch.testing.assert_close(cell(x, weights), expected, rtol=0, atol=ATOL)
    kernel, bias = cell.merged(weights)
    torch.testing.assert_close(
        convolve(x, kernel, bias, stride=2, padding=3), expected, rtol=0, atol=ATOL
    )
