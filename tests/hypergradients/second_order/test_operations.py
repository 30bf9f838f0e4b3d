"""Operations that are differentiated twice by formulas of their own, against torch's and against
differences."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import waiting
from own_functions import own
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mlseg.hypergradients.second_order.fused import SecondOrder, formulas

Operation = Callable[..., Tensor]
Case = tuple[Operation, list[tuple[int, ...] | None]]

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "all": {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
}
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def convolution(
    function: Operation, dims: int, transposed: bool, bias: bool, **options: Any
) -> Case:
    groups = options.get("groups", 1)
    channels = (4, 6 // groups) if transposed else (6, 4 // groups)
    size = 3 if transposed else 7 - dims
    shapes: list[tuple[int, ...] | None] = [
        (2, 4, *[size] * dims),
        (*channels, *[3 if dims < 3 else 2] * dims),
        (6,) if bias else None,
    ]
    return (lambda x, w, b: function(x, w, b, **options)), shapes


def batch_norm(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


def instance_norm(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    return F.instance_norm(x, None, None, w, b)


def group_norm(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    return F.group_norm(x, 2, w, b)


def cases() -> Iterator[tuple[str, Case]]:
    for dims in (1, 2, 3):
        for name, options in GEOMETRIES.items():
            ours = convolution(CONVOLUTIONS[dims - 1], dims, False, name != "plain", **options)
            yield f"conv{dims}d {name}", ours
            options = {**options, "output_padding": options.get("stride", 1) - 1}
            ours = convolution(TRANSPOSED[dims - 1], dims, True, name != "plain", **options)
            yield f"conv_transpose{dims}d {name}", ours
    yield (
        "conv2d same",
        (
            lambda x, w, b: F.conv2d(x, w, b, padding="same"),
            [(2, 3, 5, 4), (2, 3, 4, 3), (2,)],
        ),
    )
    yield "conv1d unbatched", (lambda x, w, b: F.conv1d(x, w, b), [(3, 6), (2, 3, 3), (2,)])
    spaces: dict[str, tuple[int, ...]] = {"": (), " 1d": (4,), " 2d": (3, 2), " 3d": (2, 1, 3)}
    for axes, space in spaces.items():
        for affine in (True, False):
            given = (4,) if affine else None
            plain = "" if affine else " plain"
            yield f"batch_norm{axes}{plain}", (batch_norm, [(5, 4, *space), given, given])
            # Groups of at least four: of two values nothing but their sign is left.
            eight = (8,) if affine else None
            yield f"group_norm{axes}{plain}", (group_norm, [(3, 8, *space), eight, eight])
            if space:
                yield f"instance_norm{axes}{plain}", (instance_norm, [(3, 4, *space), given, given])
    for shape in ((5,), (3, 5)):
        for weight in (shape, None):

            def layer_norm(x: Tensor, w: Any, b: Any, shape: Any = shape) -> Tensor:
                return F.layer_norm(x, shape, w, b)

            name = f"layer_norm {shape}" + ("" if weight else " plain")
            yield name, (layer_norm, [(2, 3, 5), weight, weight])
    yield "layer_norm whole", (lambda x, w, b: F.layer_norm(x, (6,), w, b), [(6,), (6,), (6,)])
    yield "batch_norm, gamma alone", (batch_norm, [(5, 4, 2), (4,), None])


CASES = dict(cases())
WITHOUT_TORCH: dict[str, Case] = {
    # torch's double backward fails there.
    "batch_norm, beta alone": (batch_norm, [(5, 4, 2), None, (4,)]),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Sums(TorchDispatchMode):
    """Notes for each sum that batch normalisation is asked for whether it has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weighted: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default and any(args[-1][1:]):
            self.weighted.append(args[2] is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["batch_norm 2d", "batch_norm 2d plain"])
def test_sums_of_batch_norm_have_a_weight(name: str) -> None:
    """CUDA's kernel makes none without."""
    operation, shapes = CASES[name]
    operands = drawn(shapes, torch.float64)
    given = [t.requires_grad_() for t in operands if t is not None]
    with formulas("fused"), Sums() as sums:
        y = operation(*operands).tanh().sum()
        first = torch.autograd.grad(y, given, create_graph=True)
        torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), given)
    assert sums.weighted
    assert all(sums.weighted)


def drawn(
    shapes: list[tuple[int, ...] | None], dtype: torch.dtype, last: bool = False
) -> list[Tensor | None]:
    """Operands; not of mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor | None] = []
    for shape in shapes:
        t = None
        if shape is not None:
            t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 1.5 + 0.5
            if last and t.dim() in LAST:
                t = t.contiguous(memory_format=LAST[t.dim()])
            t.requires_grad_()
        tensors.append(t)
    return tensors


def derivatives(
    operation: Operation, tensors: list[Tensor | None], second_order: SecondOrder
) -> list[list[Tensor]]:
    """Value, gradients, and the derivative of these along random directions."""
    generator = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)

    given = [t for t in tensors if t is not None]
    with formulas(second_order):
        y = operation(*tensors)
    g = like(y).requires_grad_()
    gradients = torch.autograd.grad(y, given, g, create_graph=True)
    along = [like(t) for t in given]
    second = torch.autograd.grad(gradients, [*given, g], along, allow_unused=True)
    zero = [torch.zeros_like(t) for t in (*given, g)]
    return [
        [y.detach()],
        [t.detach() for t in gradients],
        [z if t is None else t for t, z in zip(second, zero, strict=True)],
    ]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_value_and_both_derivatives_are_torchs(case: str, dtype: torch.dtype, last: bool) -> None:
    """To rounding: sums of up to a few hundred terms, some of which cancel."""
    operation, shapes = CASES[case]
    tensors = drawn(shapes, dtype, last)
    mine, theirs = (derivatives(operation, tensors, by) for by in ("fused", "torch"))
    for ours, wanted in zip(mine, theirs, strict=True):
        for a, b in zip(ours, wanted, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            size = max(float(t.norm()) for t in wanted)
            assert float((a - b).norm()) <= 500 * torch.finfo(dtype).eps * size


@waiting.needs_gpu
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [*CASES, *WITHOUT_TORCH])
def test_on_a_gpu_the_same(case: str, last: bool) -> None:
    """As on the CPU, in float64, in which nothing is rounded to TF32."""
    operation, shapes = (CASES | WITHOUT_TORCH)[case]
    here = drawn(shapes, torch.float64, last)
    there = [None if t is None else t.detach().cuda().requires_grad_() for t in here]
    found = derivatives(operation, there, "fused")
    for ours, wanted in zip(found, derivatives(operation, here, "fused"), strict=True):
        size = max(float(t.norm()) for t in wanted)
        for a, b in zip(ours, wanted, strict=True):
            assert a.device.type == "cuda"
            assert float((a.cpu() - b).norm()) <= 500 * torch.finfo(torch.float64).eps * size


@pytest.mark.parametrize("case", [*CASES, *WITHOUT_TORCH])
def test_three_derivatives_are_those_of_differences(case: str) -> None:
    """Also the third, which torch itself gets wrong for layer norm, and refuses for batch norm."""
    operation, shapes = (CASES | WITHOUT_TORCH)[case]
    tensors = drawn(shapes, torch.float64)
    given = [t for t in tensors if t is not None]

    def fused(*values: Tensor) -> Tensor:
        rest = iter(values)
        with formulas("fused"):
            return operation(*(None if t is None else next(rest) for t in tensors))

    assert gradcheck(fused, given, fast_mode=True)
    assert gradgradcheck(fused, given, fast_mode=True)

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        y = fused(*values)
        found = torch.autograd.grad(y.sin().sum(), values, create_graph=True, allow_unused=True)
        return tuple(t for t in found if t is not None and t.requires_grad)

    assert gradgradcheck(gradients, given, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_it_is_these_formulas_that_are_tested(case: str) -> None:
    operation, shapes = CASES[case]
    with formulas("fused"):
        y = operation(*drawn(shapes, torch.float64))
    assert own(y)
    assert not own(operation(*drawn(shapes, torch.float64)))
