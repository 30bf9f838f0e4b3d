"""What can't be differentiated as a method asks for: one line that names it and a mend."""

import math
from typing import Any

import pytest
import torch
from scaled import Lower, Upper, X, gradient, linear, program
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from mlseg.errors import UserError
from mlseg.hypergradients.registry import classes
from mlseg.hypergradients.second_order.fused import formulas
from mlseg.hypergradients.second_order.refusals import explained

FORWARD_OVER_REVERSE = {"method": "identity", "mode": "forward_over_reverse"}
GRAPHS = {"method": "unrolled", "store": "graphs"}
HIGHER = {"method": "unrolled", "backend": "higher"}
DIFFERENCE = {"method": "finite_difference", "epsilon": 1e-5}
SECOND_ORDER: list[Any] = [
    *sorted(name for name, cls in classes().items() if not cls.first_derivatives_alone),
    GRAPHS,
    HIGHER,
]
EPSILON = 1e-6
"""Of a central difference with an ``epsilon`` of 1e-5: its square, 1e-10, and rounding's 1e-16 over
it, 1e-11, with room for what derivatives and cancellation magnify them by."""


class Attention(nn.Module):
    def __init__(self, by_math: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.last = nn.Linear(4, 1)
        self.by_math = by_math
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        backends = [SDPBackend.MATH] if self.by_math else [SDPBackend.FLASH_ATTENTION]
        with sdpa_kernel(backends):
            return self.last(self.encoder(x[:, None].expand(-1, 3, -1) + X[:3]).mean(1))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3.0 * x**2 * gradient


class Cubed(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.own = nn.Linear(4, 4), nn.Linear(4, 1), own
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(Cube.apply(hidden) if self.own else hidden**3)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.use_reentrant = nn.Linear(4, 4), use_reentrant
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(4, 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.use_reentrant is None:
            return self.last(hidden)
        return checkpoint(self.last, hidden, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("method", [*SECOND_ORDER, FORWARD_OVER_REVERSE], ids=str)
def test_attention_without_second_derivative(method: Any) -> None:
    """With torch's formulas; by the fused ones it has one."""
    by_torch = {"second_order": "torch"} if method != FORWARD_OVER_REVERSE else {}
    method = {"method": method} if isinstance(method, str) else method
    with pytest.raises(UserError, match=r"problem 'lower': .*flash_attention.*MATH"):
        gradient({**method, **by_torch}, Attention(by_math=False))


@pytest.mark.parametrize("method", ["identity", "unrolled", GRAPHS], ids=str)
def test_attention_has_a_second_derivative_by_the_fused_formulas(method: Any) -> None:
    """Against torch's own formulas for the kernel of matrix products; both round."""
    given = {"method": method} if isinstance(method, str) else method
    by_torch = gradient({**given, "second_order": "torch"}, Attention(by_math=True))
    assert gradient(method, Attention(by_math=False)) == pytest.approx(by_torch, rel=1e-9)


class Longer(nn.Module):
    """Attention over so many numbers that two kernels round differently."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = torch.randn(8, 33, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)

    def forward(self, _: Tensor) -> Tensor:
        return self.encoder(self.tokens).flatten(1)


class Summed(Lower):
    """A loss whose last digits show them."""

    def training_step(self, batch: Any) -> Any:
        return (self(batch[0]) * self.upper.module.weight).double().square().sum()


class Seeing(Upper):
    def training_step(self, batch: Any) -> Any:
        return self.lower(batch[0]).double().square().sum()


def test_a_step_whose_graph_is_kept_repeats_itself_though_its_kernels_differ() -> None:
    engine = program(GRAPHS, Longer(), lower=Summed, upper=Seeing, rate=1e-6)
    with formulas("fused"):
        by_products = engine.lower.module(None)
    if torch.equal(by_products, engine.lower.module(None)):
        pytest.skip("on this processor the two kernels round alike")
    engine.iterate()
    assert math.isfinite(*engine.upper.gradients)


@pytest.mark.parametrize("method", SECOND_ORDER, ids=str)
def test_functions_marked_once_differentiable_are_named(method: Any) -> None:
    """torch takes their derivatives for constants, without a word."""
    with pytest.raises(UserError, match="'lower': Cube in its loss is marked once_differentiable"):
        gradient(method, Cubed(own=True))


def test_once_is_enough_for_first_derivatives() -> None:
    assert gradient(DIFFERENCE, Cubed(own=True)) == gradient(DIFFERENCE, Cubed(own=False))
    assert gradient("identity", Cubed(own=False)) == pytest.approx(
        gradient(DIFFERENCE, Cubed(own=True)), rel=EPSILON
    )


class Pooled(nn.Module):
    """With an operator of torchvision's, which has a first derivative alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 16), nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        maps = self.first(x).tanh().reshape(-1, 1, 4, 4)
        box = torch.tensor([[0.0, 0.0, 3.0, 2.0]], dtype=x.dtype)
        return self.last(roi_align(maps, [box] * len(maps), 2).flatten(1))


@pytest.mark.parametrize("method", [*SECOND_ORDER, FORWARD_OVER_REVERSE], ids=str)
def test_operators_of_libraries(method: Any) -> None:
    """Forward mode would drop their tangents without a word."""
    with pytest.raises(UserError, match=r"'lower': .*roi_align.* take finite_difference"):
        gradient(method, Pooled())


class Hooked(nn.Module):
    """Its forward pass registers a hook: on what it computes, or on a parameter."""

    def __init__(self, on: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.on = nn.Linear(4, 4), nn.Linear(4, 1), on
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.on is None:  # the same gradient, without a hook
            hidden = 0.5 * hidden + 0.5 * hidden.detach()
        tensor = self.first.weight if self.on == "parameter" else hidden
        if self.on is not None and tensor.requires_grad:
            tensor.register_hook(lambda g: 0.5 * g)
        return self.last(hidden)


@pytest.mark.parametrize("method", SECOND_ORDER, ids=str)
def test_hooks_registered_by_a_step(method: Any) -> None:
    with pytest.raises(UserError, match="'lower': its training_step registers hooks on what"):
        gradient(method, Hooked("computed"))
    with pytest.raises(UserError, match="'lower': its training_step registers hooks on parameters"):
        gradient(method, Hooked("parameter"))


def test_those_on_what_is_computed_are_right_for_first_derivatives() -> None:
    """Against the same gradient without a hook: half of it goes through, in value all."""
    for method in (DIFFERENCE, FORWARD_OVER_REVERSE):
        truth = gradient(DIFFERENCE, Hooked(None))
        assert gradient(method, Hooked("computed")) == pytest.approx(truth, rel=1e-5)


@pytest.mark.slow
def test_compiled_modules() -> None:
    def net() -> Any:
        return torch.compile(Checkpointed(None), backend="aot_eager")

    for method in ("identity", GRAPHS):
        with pytest.raises(UserError, match=r"'lower': a compiled module .* forward_over_reverse"):
            gradient(method, net())
    truth = gradient("identity", Checkpointed(None))
    assert gradient(FORWARD_OVER_REVERSE, net()) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("method", ["finite_difference", *SECOND_ORDER], ids=str)
def test_reentrant_checkpoints(method: Any) -> None:
    with pytest.raises(UserError, match="set use_reentrant=False"):
        gradient(method, Checkpointed(use_reentrant=True))


@pytest.mark.parametrize(
    "method", ["identity", FORWARD_OVER_REVERSE, "unrolled", GRAPHS, "forward"], ids=str
)
def test_other_checkpoints_change_nothing(method: Any) -> None:
    plain, checkpointed = (gradient(method, Checkpointed(r), steps=3) for r in (None, False))
    assert checkpointed == pytest.approx(plain, rel=1e-9)


def test_other_checkpoints_are_refused_by_higher() -> None:
    with pytest.raises(UserError, match=r"'lower': a checkpointed part .* set backend to mlseg"):
        gradient(HIGHER, Checkpointed(False), steps=3)


def test_recurrent_networks_of_cudnn_by_torchs_message() -> None:
    text = "Double backwards is not supported for CuDNN RNNs due to limitations in the CuDNN API."
    scope: dict[str, Any] = {"__name__": "torch.autograd"}
    exec("def fail(text): raise RuntimeError(text)", scope)
    match = "'lower': a recurrent network of cuDNN .*cudnn.flags"
    with pytest.raises(UserError, match=match), explained("lower"):
        scope["fail"](text)


def test_errors_of_a_loss_keep_their_words() -> None:
    with pytest.raises(RuntimeError, match=r"^my double backward"), explained("lower"):
        raise RuntimeError("my double backward of a loss")


# ------------------------------------------------------------------- complex, sparse


class Spectrum(nn.Module):
    """A filter in the frequency domain; ``real``: its real and imaginary parts are kept."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        start = torch.complex(X[:3, 0], X[:3, 1]) / 2
        self.real = real
        self.weight = nn.Parameter(torch.view_as_real(start).clone() if real else start)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight) if self.real else self.weight
        return torch.fft.irfft(torch.fft.rfft(x) * weight, n=4).pow(2).sum(1)


@pytest.mark.parametrize("method", sorted(classes()))
def test_complex_parameters_are_refused_before_any_work(method: str) -> None:
    with pytest.raises(UserError, match=r"'lower': hypergradients take real parameters.*view_as"):
        program(method, Spectrum(real=False))


def test_of_a_source_too() -> None:
    engine = program("identity", linear())
    engine.upper.module.weight = nn.Parameter(engine.upper.module.weight.to(torch.complex128))
    with pytest.raises(UserError, match="'upper': hypergradients take real parameters"):
        engine.lower.connect()


def test_real_ones_that_are_viewed_as_complex() -> None:
    truth = gradient("identity", Spectrum(real=True), rate=0.002)
    for method in (DIFFERENCE, FORWARD_OVER_REVERSE):
        assert gradient(method, Spectrum(real=True), rate=0.002) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("method", sorted(classes()))
def test_sparse_gradients_are_refused_before_any_work(method: str) -> None:
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(4, 1))
    with pytest.raises(UserError, match="'lower': Embedding with sparse=True"):
        program(method, net.double())
