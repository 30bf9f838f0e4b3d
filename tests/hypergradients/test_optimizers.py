"""What is known of an optimizer: a class in a file, from which the rest follows."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlseg.hypergradients import optimizers
from mlseg.hypergradients.optimizers import Optimizer, find, known, one_step_scale
from mlseg.hypergradients.optimizers.base import registered

MADE: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd momentum": {"momentum": 0.9, "weight_decay": 1e-2},
    "sgd dampening": {"momentum": 0.9, "dampening": 0.3},
    "sgd nesterov": {"momentum": 0.9, "nesterov": True},
    "sgd ascent": {"momentum": 0.9, "maximize": True},
    "adam": {"betas": (0.5, 0.9), "weight_decay": 1e-2},
    "adam amsgrad": {"betas": (0.5, 0.2), "amsgrad": True},
    "adam ascent": {"maximize": True},
    "adamw": {"weight_decay": 0.1},
    "rmsprop": {"momentum": 0.9},
    "rmsprop centred": {"alpha": 0.9, "centered": True},
    "adagrad": {"lr_decay": 0.1},
}
"""Optimizers of torch, by what is known of them."""


def stepped(cls: Any, **settings: Any) -> tuple[torch.optim.Optimizer, Tensor]:
    """An optimizer after three steps along random gradients, and what it steps."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    optimizer = cls([p], lr=0.05, **settings)
    for _ in range(3):
        p.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        optimizer.step()
    return optimizer, p


def faked(name: str) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    """An optimizer of two parameters after a step, within a FakeTensorMode."""
    made: Any = by_name(name.split()[0]).torch_class
    parameters = [torch.nn.Parameter(torch.ones(3 + i)) for i in range(2)]
    optimizer = made(parameters, lr=0.05, **MADE[name])
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, parameters


def by_name(name: str) -> type[Optimizer]:
    (cls,) = (c for c in known() if c.model_fields["name"].default == name)
    return cls


@pytest.mark.parametrize("name", MADE)
def test_a_diagonals_formula_is_what_follows_from_the_map(name: str) -> None:
    """Both round some ten times."""
    cls = by_name(name.split()[0])
    optimizer, p = stepped(cls.torch_class, **MADE[name])
    v = torch.linspace(-2.0, 3.0, 50, dtype=torch.float64)
    state, group = optimizer.state[p], optimizer.param_groups[0]
    derived = Optimizer.scaled.__func__(cls, v, p, state, group)  # type: ignore[attr-defined]
    formula = cls.scaled(v, p, state, group)
    torch.testing.assert_close(formula, derived, rtol=32 * torch.finfo(v.dtype).eps, atol=0.0)
    assert not torch.allclose(formula, v)


@pytest.mark.parametrize("rate", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("name", MADE)
def test_a_scale_reads_no_number(name: str, rate: torch.dtype | None) -> None:
    """Of tensors that stand for a device's; the rate may be one of them, of any dtype."""
    with FakeTensorMode():
        optimizer, parameters = faked(name)
        if rate is not None:
            optimizer.param_groups[0]["lr"] = torch.ones((), dtype=rate)
        for preconditioned in (False, True):
            found = one_step_scale(parameters, parameters, optimizer, preconditioned)
            assert [v.shape for v in found] == [p.shape for p in parameters]
            assert {v.dtype for v in found} == {torch.float32}


@pytest.mark.parametrize("on_host", [{"step"}, {"lr"}], ids=lambda names: "".join(names))
@pytest.mark.parametrize("name", MADE)
def test_rate_and_count_may_be_on_two_devices(name: str, on_host: set[str]) -> None:
    """A rate that is learned stays on the device, where torch's optimizers count on the host."""
    with FakeTensorMode():
        optimizer, parameters = faked(name)
        states = [optimizer.state[p] for p in parameters]
        moved = [torch.nn.Parameter(p.detach().to("cuda")) for p in parameters]
        group = optimizer.param_groups[0]
        group["params"] = moved
        group["lr"] = torch.ones((), device="cpu" if "lr" in on_host else "cuda")
        optimizer.state.clear()
        for p, state in zip(moved, states, strict=True):
            optimizer.state[p] = {
                k: v.to("cpu" if k in on_host else "cuda") if isinstance(v, Tensor) else v
                for k, v in state.items()
            }
        for preconditioned in (False, True):
            found = one_step_scale(moved, moved, optimizer, preconditioned)
            assert {v.device.type for v in found} == {"cuda"}


@pytest.mark.parametrize("name", ["adam", "adagrad", "rmsprop"])
def test_a_diagonal_in_half_precision_is_near_the_exact_one(name: str) -> None:
    """The corrections and eps are not of that precision."""
    cls = by_name(name)
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    made: Any = cls.torch_class
    optimizer = made([p], lr=0.05)
    p.grad = torch.tensor([1.0, 1e-3, 2.0, 3.0], dtype=torch.bfloat16)
    optimizer.step()
    state = optimizer.state[p]
    wide = {k: v.double() for k, v in state.items()}
    ones = torch.ones_like(p)
    found = cls.scaled(ones, p, state, optimizer.param_groups[0])
    exact = cls.scaled(ones.double(), p.double(), wide, optimizer.param_groups[0])
    # Square root, sum, quotient and product are each rounded to it.
    torch.testing.assert_close(found.double(), exact, rtol=4 * 2.0**-8, atol=0.0)


@pytest.mark.parametrize("name", MADE)
def test_all_parameters_have_their_own_scale(name: str) -> None:
    """Of two groups, two dtypes and different numbers of steps, one of them 0."""
    cls = by_name(name.split()[0])
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float64, torch.float64, torch.float32, torch.float64, torch.float64]
    parameters = [
        torch.nn.Parameter(torch.randn(3 + i, generator=generator, dtype=dtype))
        for i, dtype in enumerate(dtypes)
    ]
    groups: Any = [{"params": parameters[:3], "lr": 0.05}, {"params": parameters[3:], "lr": 0.2}]
    optimizer = cls.torch_class(groups, **MADE[name])
    for step in range(3):
        for i, p in enumerate(parameters):
            taken = i < 4 and (i != 1 or step > 0)
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) if taken else None
        optimizer.step()
    vector = [torch.linspace(-2.0, 3.0, len(p), dtype=p.dtype) for p in parameters]
    found = one_step_scale(vector, parameters, optimizer, preconditioned=True)
    for i, (v, p, scaled) in enumerate(zip(vector, parameters, found, strict=True)):
        group, state = optimizer.param_groups[i // 3], optimizer.state.get(p)
        alone = v * group["lr"] * (-1 if group.get("maximize") else 1)
        if state:
            alone = Optimizer.scaled.__func__(cls, v, p, state, group)  # type: ignore[attr-defined]
        torch.testing.assert_close(scaled, alone, rtol=32 * torch.finfo(v.dtype).eps, atol=0.0)


@pytest.mark.parametrize("name", MADE)
def test_the_map_is_torchs_step(name: str) -> None:
    cls = by_name(name.split()[0])
    optimizer, p = stepped(cls.torch_class, **MADE[name])
    before = p.detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
    p.grad = torch.linspace(-1.0, 1.0, 50, dtype=torch.float64)
    after, left = cls.step(before, p.grad, moments, optimizer.param_groups[0], lambda k, v: v)
    optimizer.step()
    torch.testing.assert_close(after, p.detach(), rtol=1e-13, atol=1e-15)
    for key, value in left.items():
        theirs = optimizer.state[p][key].to(value.dtype)
        torch.testing.assert_close(value, theirs, rtol=1e-13, atol=0.0)


def test_a_diagonal_of_ones_own_is_kept() -> None:
    """A class that says it of one parameter, derived from one that says it of many."""

    class Own(torch.optim.Adam):
        pass

    class Halved(by_name("adam")):  # type: ignore[misc]
        name: Literal["halved"] = "halved"

        torch_class = Own

        @classmethod
        def scaled(cls, v: Tensor, w: Tensor, moments: Any, group: Any) -> Tensor:
            result: Tensor = 0.5 * super().scaled(v, w, moments, group)
            return result

    whole, w = stepped(torch.optim.Adam)
    half, p = stepped(Own)
    ones = [torch.ones_like(p)]
    try:
        optimizers.register(Halved)
        (found,) = one_step_scale(ones, [p], half, preconditioned=True)
    finally:
        optimizers.OPTIMIZERS.remove("halved")
    (plain,) = one_step_scale(ones, [w], whole, preconditioned=True)
    torch.testing.assert_close(found, 0.5 * plain)


def test_every_file_is_found() -> None:
    folder = Path(optimizers.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if "@register" in path.read_text()}
    files -= {"base"}
    assert {cls.__module__.rsplit(".", 1)[1] for cls in known()} == files


def test_an_optimizer_is_known_by_the_nearest_class() -> None:
    class Own(torch.optim.AdamW):
        pass

    optimizer, _ = stepped(Own)
    assert find(optimizer) is by_name("adamw")
    assert find(stepped(torch.optim.Adadelta)[0]) is None


def test_an_optimizer_of_ones_own_is_one_class() -> None:
    """A settings class with a map: its diagonal follows."""

    class Signed(torch.optim.SGD):
        pass

    @optimizers.register
    class Softsign(Optimizer):
        """Descent along ``g / (1 + |g|)``, at the gradient zero of slope one."""

        name: Literal["softsign"] = "softsign"

        torch_class = Signed

        @staticmethod
        def step(w: Tensor, g: Tensor, moments: Any, group: Any, hold: Any) -> Any:
            return w - group["lr"] * g / (1.0 + g.abs()), {}

    try:
        assert Softsign in known()
        optimizer, p = stepped(Signed, momentum=0.5)
        (scaled,) = one_step_scale([torch.ones_like(p)], [p], optimizer, preconditioned=True)
        torch.testing.assert_close(scaled, torch.full_like(p, 0.05))
    finally:
        del registered()[Signed]
