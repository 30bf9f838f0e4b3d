"""Where torch's operations are replaced, and where they aren't."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from own_functions import own
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mlseg.hypergradients.second_order.fused import SecondOrder, formulas
from mlseg.testing.exact import distance


def elsewhere(y: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield "autocast", y()
    with torch.no_grad():
        yield "no_grad", y()
    with forward_ad.dual_level():
        yield "tangents", y()
    yield "checkpoint", checkpoint(y, use_reentrant=False)


@pytest.mark.parametrize("where", range(4))
def test_elsewhere_torchs_own_operations_stay(where: int) -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    with formulas("fused"):
        places = elsewhere(lambda: F.layer_norm(F.conv2d(x, w), (3, 3)))
        name, y = [next(places) for _ in range(where + 1)][-1]
    assert not own(y), name


def test_torch_func_is_left_alone() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        return F.conv2d(x, w).square().sum()

    expected = torch.func.hessian(loss)(w)
    with formulas("fused"):
        assert torch.equal(torch.func.hessian(loss)(w), expected)


def test_a_checkpoint_is_differentiated_twice() -> None:
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (4, 3, 3)))

    def found(second_order: SecondOrder) -> tuple[Tensor, ...]:
        with formulas(second_order):
            y = checkpoint(lambda: F.conv1d(x, w).tanh(), use_reentrant=False)
            z = F.conv1d(y, w.transpose(0, 1)).square().sum()
        (gradient,) = torch.autograd.grad(z, w, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, w))

    for mine, theirs in zip(found("fused"), found("torch"), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10)


class Subclass(Tensor):
    """Torch's functions on it are its own business."""


def test_a_subclass_of_tensor_is_left_alone() -> None:
    x = torch.randn(2, 3, 5).as_subclass(Subclass)
    with formulas("fused"):
        assert isinstance(F.conv1d(x, torch.randn(4, 3, 3, requires_grad=True)), Subclass)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "channels": lambda w: F.conv2d(torch.zeros(1, 2, 5, 5), w),
    "same with a stride": lambda w: F.conv2d(torch.zeros(1, 3, 5, 5), w, padding="same", stride=2),
    "padding": lambda w: F.conv2d(torch.zeros(1, 3, 5, 5), w, padding="some"),
    "one value per channel": lambda w: F.batch_norm(w[:1, :, 0, 0], None, None, training=True),
    "one value per instance": lambda w: F.instance_norm(w[:, :, :1, :1]),
    "groups": lambda w: F.group_norm(w, 2),
    "layer": lambda w: F.layer_norm(w, (4,)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_told_in_torchs_words(mistake: str) -> None:
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        WRONG[mistake](w)
    with pytest.raises(theirs.type) as ours, formulas("fused"):
        WRONG[mistake](w)
    assert str(ours.value) == str(theirs.value)


def test_running_statistics_are_torchs() -> None:
    x = torch.randn(3, 4, 5, 2)
    made: dict[SecondOrder, list[Tensor]] = {}
    for by in ("fused", "torch"):
        norms = [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)]
        with formulas(by):
            for norm in norms:
                norm(x)
                norm(2.0 * x)
        made[by] = [b for norm in norms for b in norm.buffers()]
    for mine, theirs in zip(made["fused"], made["torch"], strict=True):
        assert torch.equal(mine, theirs)


def test_evaluation_mode_is_torchs() -> None:
    norm = nn.BatchNorm2d(4).eval()
    with formulas("fused"):
        assert not own(norm(torch.randn(3, 4, 5, 2)))


def test_attention_can_be_differentiated_twice() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    weights = list(layer.parameters())
    with formulas("fused"):
        loss = layer(x).square().mean()
    gradient = torch.autograd.grad(loss, weights, create_graph=True)
    size = sum(g.square().sum() for g in gradient)
    along = [g.detach() for g in gradient]
    found = torch.autograd.grad(size, weights)

    def gradient_at(h: float) -> list[Tensor]:
        with torch.no_grad():
            torch._foreach_add_(weights, along, alpha=h)
        moved = torch.autograd.grad(layer(x).square().mean(), weights)
        with torch.no_grad():
            torch._foreach_add_(weights, along, alpha=-h)
        return list(moved)

    # Symmetric: the gradient of |g|^2 is 2 H g. Error: h^2 |g|^2, and rounding over h.
    wanted = [(a - b) / 1e-5 for a, b in zip(gradient_at(1e-5), gradient_at(-1e-5), strict=True)]
    assert (
        distance(torch.cat([t.flatten() for t in found]), torch.cat([t.flatten() for t in wanted]))
        < 1e-6
    )


class Counted(TorchDispatchMode):
    """Counts the passes of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.passes += 1
        if func is torch.ops.aten.convolution_backward.default:
            self.passes += sum(args[-1][:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("by", "passes"),
    [
        # By the layers' g: one convolution of the first (no vx comes in), two of the second.
        ("late", 3),
        # By x as well, one each; then back through both layers.
        ("early", 7),
        # By g again, the second layer by x and by w; back through it by both, the first by w.
        ("weights", 8),
    ],
)
def test_only_what_is_asked_for_is_computed(by: str, passes: int) -> None:
    """A mixed product by a variable that enters late needs no pass back through the network."""
    x = torch.randn(2, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)).requires_grad_()
    weights = list(net.parameters())
    early, late = torch.zeros(3, 6, 6, requires_grad=True), torch.zeros(5, 1, 1, requires_grad=True)
    with formulas("fused"):
        loss = (net(x + early) * late.exp()).square().mean()
    gradient = torch.autograd.grad(loss, weights, create_graph=True)
    targets = {"late": [late], "early": [early], "weights": weights}[by]
    with Counted() as counted:
        torch.autograd.grad(gradient, targets, [torch.ones_like(w) for w in weights])
    assert counted.passes == passes
