"""A step that is evaluated again draws what it drew and leaves no trace, or is refused."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scaled import Lower, S, Upper, X, Y, error, linear, program
from torch import Tensor, nn

from mlseg import EngineSettings
from mlseg.errors import RunError, UserError
from mlseg.multilevel.belongings import belongings

DIFFERENCE = {"method": "finite_difference", "epsilon": 1e-4}
METHODS: list[Any] = [DIFFERENCE, "identity", "unrolled", "penalty"]


def of_torch(generator: torch.Generator) -> Tensor:
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def of_numpy(generator: Any) -> Tensor:
    return torch.from_numpy(generator.normal(size=(6, 4)))


def of_python(generator: random.Random) -> Tensor:
    return torch.tensor([[generator.gauss(0.0, 1.0) for _ in range(4)] for _ in range(6)]).double()


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "torch": (lambda: torch.Generator().manual_seed(0), of_torch),
    "RandomState": (lambda: np.random.RandomState(0), of_numpy),
    "default_rng": (lambda: np.random.default_rng(0), of_numpy),
    "Philox": (lambda: np.random.Generator(np.random.Philox(0)), of_numpy),
    "Random": (lambda: random.Random(0), of_python),
}


class Transform:
    """As MONAI's and albumentations': a generator in an attribute, in a list, in an object."""

    def __init__(self, generator: Any, draw: Callable[[Any], Tensor]) -> None:
        self.R, self.draw = generator, draw

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.draw(self.R) / 2


class Noisy(Lower):
    """Its inputs are ``made`` of the batch's; what they were is kept."""

    kept: list[Tensor]

    def made(self, x: Tensor) -> Tensor:
        return self.transforms["train"][0](x)

    def training_step(self, batch: Any) -> Any:
        x = self.made(batch[0])
        if not self.replaying:
            self.kept = [*getattr(self, "kept", []), x]
        return super().training_step((x, batch[1]))


def truth(net: Any, x: Tensor, rate: float) -> float:
    """One step's hypergradient at the weights after it."""
    w, s = net.weight.detach().requires_grad_(), torch.tensor(S).double().requires_grad_()
    (v,) = torch.autograd.grad(error(X @ w.T, Y + 1.0, 2), w)
    (g,) = torch.autograd.grad(error(x @ w.T, Y) * s.exp(), w, create_graph=True)
    return float(torch.autograd.grad(-rate * (g * v).sum(), s)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_generators_of_a_programs_own_are_found_and_replayed(kind: str) -> None:
    make, draw = KINDS[kind]
    engine = program(DIFFERENCE, lower=Noisy)
    engine.lower.transforms = {"train": [Transform(make(), draw)]}
    engine.iterate()
    assert engine.upper.gradients[0] == pytest.approx(
        truth(engine.lower.module, engine.lower.kept[0], 0.01), rel=1e-5
    )
    engine.iterate()
    again = make()
    assert torch.equal(engine.lower.kept[0], X + draw(again) / 2)
    assert torch.equal(engine.lower.kept[1], X + draw(again) / 2), "a hop leaves no trace in it"


@pytest.mark.parametrize("kind", KINDS)
def test_so_they_are_in_closures_and_modules(kind: str) -> None:
    make, draw = KINDS[kind]
    generator = make()

    class Closed(Noisy):
        def made(self, x: Tensor) -> Tensor:
            return x + draw(generator)

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + draw(self.generator) if self.training else x)

    for lower, net in ((Closed, linear()), (Lower, Net(4, 1, bias=False).double())):
        net.generator = make()
        net.load_state_dict(linear().state_dict())
        engine = program(DIFFERENCE, net, lower=lower)
        engine.upper.module.eval()
        engine.lower.train()
        engine.iterate()  # checks that the loss is repeated, bit for bit


def test_global_generators_are_no_ones_own() -> None:
    found = belongings({"g": [torch.default_generator, np.random.mtrand._rand, random._inst]})
    assert not found.generators


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_draws_that_are_not_found_are_an_error(method: Any) -> None:
    class Hidden(Noisy):
        def made(self, x: Tensor) -> Tensor:
            return x + next(draws)

    draws = (points for points in torch.randn(99, 6, 4, dtype=torch.float64))
    with pytest.raises(UserError, match="'lower': its step gives another loss when it is eval"):
        program(method, lower=Hidden).iterate()


class Teacher(Lower):
    guarded = False

    def training_step(self, batch: Any) -> Any:
        if not (self.guarded and self.replaying):
            with torch.no_grad():
                for t, p in zip(self.teacher.parameters(), self.module.parameters(), strict=True):
                    t.mul_(0.9).add_(0.1 * p)
        return super().training_step(batch)


class Guarded(Teacher):
    guarded = True


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("within", [False, True])
def test_a_teacher_that_moves_in_the_step(method: Any, within: bool) -> None:
    def run(lower: type[Lower]) -> tuple[Any, Any]:
        engine = program(method, lower=lower, settings=EngineSettings(iterations=3))
        teacher = copy.deepcopy(linear(4)).requires_grad_(False)
        if within:  # as a part of the levels' own modules
            engine.upper.module.teacher = teacher
        engine.lower.teacher = teacher
        return engine, teacher

    engine, _ = run(Teacher)
    with pytest.raises(UserError, match=r"'lower': .* changes .*teacher.weight in place"):
        engine.run()
    engine, teacher = run(Guarded)
    weights = [engine.lower.module.weight.detach().clone()]
    expected = linear(4).weight
    for _ in range(3):
        expected = 0.9 * expected + 0.1 * weights[-1]
        engine.iterate()
        weights.append(engine.lower.module.weight.detach().clone())
    assert torch.equal(teacher.weight, expected)


class Bank(Lower):
    def training_step(self, batch: Any) -> Any:
        self.bank = [*getattr(self, "bank", []), self(batch[0]).detach()]
        return super().training_step(batch) + torch.stack(self.bank).sum() ** 2


class Recurrent(Lower):
    def training_step(self, batch: Any) -> Any:
        carried = getattr(self, "carried", torch.zeros(()))
        predicted = self(batch[0]) + carried
        self.carried = predicted.mean().detach()
        return super().training_step(batch) * (1.0 + carried)


class Warming(Lower):
    seen = 0

    def training_step(self, batch: Any) -> Any:
        self.seen += 1
        return super().training_step(batch) * min(1.0, self.seen / 100)


@pytest.mark.parametrize("lower", [Bank, Recurrent, Warming])
def test_states_that_are_carried_on_are_an_error(lower: type[Lower]) -> None:
    with pytest.raises(UserError, match=r"'lower': its step gives another loss .*replaying"):
        program("identity", lower=lower).iterate()


def test_it_is_looked_at_now_and_then() -> None:
    class Later(Lower):
        seen = 0

        def training_step(self, batch: Any) -> Any:
            self.seen += 1
            late = max(self.seen - 15, 0)
            return super().training_step(batch) * (1.0 + late)

    engine = program("identity", lower=Later)
    for _ in range(9):
        engine.iterate()
    engine.lower.seen = 15
    with pytest.raises(RunError, match="another loss"):
        engine.iterate()


def test_a_batch_that_is_changed_in_place() -> None:
    class Normalising(Lower):
        def training_step(self, batch: Any) -> Any:
            batch[0].sub_(batch[0].mean() + 1.0)
            return super().training_step(batch)

    loader = [(X.clone(), Y)]
    with pytest.raises(UserError, match=r"changes its batch\[0\] in place"):
        program("identity", lower=Normalising, loader=loader).iterate()


def test_buffers_may_change() -> None:
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Linear(4, 1))
    engine = program("identity", net.double())
    for _ in range(10):
        engine.iterate()


def test_generators_of_a_data_set_resume_where_they_were(tmp_path: Path) -> None:
    class Data(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.R = np.random.default_rng(3)

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return X[index] + self.R.normal(), Y[index]

    def make(iterations: int) -> Any:
        settings = EngineSettings(iterations=iterations, tensorboard=False)
        loader = torch.utils.data.DataLoader(Data(), 2)
        out = tmp_path / str(iterations)
        return program("identity", loader=loader, settings=settings, out=out, rate=1e-4)

    whole, part = make(7), make(4)
    whole.run()
    part.run()
    rest = make(7)
    rest.resume(tmp_path / "4")
    rest.run()
    assert torch.equal(rest.lower.module.weight, whole.lower.module.weight)


# --------------------------------------------------------------- freezing within a step


def frozen(problem: Any, yes: bool) -> None:
    problem.module.requires_grad_(not yes)


@pytest.mark.parametrize("method", ["identity", "unrolled", DIFFERENCE], ids=str)
def test_a_level_may_thaw_itself_in_its_step(method: Any) -> None:
    class Thawing(Lower):
        def training_step(self, batch: Any) -> Any:
            frozen(self, False)
            return super().training_step(batch)

        def param_callback(self) -> None:
            frozen(self, self.stays_frozen)

    plain, thawed = (program(method, lower=kind) for kind in (Lower, Thawing))
    thawed.lower.stays_frozen = False
    frozen(thawed.lower, True)
    for engine in (plain, thawed):
        engine.iterate()
        engine.iterate()
    assert thawed.upper.gradients == plain.upper.gradients
    frozen(thawed.lower, True)
    thawed.lower.stays_frozen = True
    with pytest.raises(
        UserError, match=r"'upper' has nothing to step along: .*levels that are froz"
    ):
        thawed.iterate()


def test_what_a_replayed_step_freezes_is_put_back() -> None:
    class Freezing(Lower):
        def training_step(self, batch: Any) -> Any:
            if self.replaying:
                frozen(self.levels["other"], True)
            return super().training_step(batch)

    engine = program("identity", lower=Freezing)
    other = program("identity").lower
    engine.lower._levels = {**engine.lower.levels, "other": other}
    engine.iterate()
    assert all(p.requires_grad for p in other.module.parameters())


def test_a_level_that_freezes_what_it_is_differentiated_by() -> None:
    class Freezing(Lower):
        def training_step(self, batch: Any) -> Any:
            frozen(self.upper, True)
            return super().training_step(batch)

    class Thawing(Upper):
        def training_step(self, batch: Any) -> Any:
            frozen(self, False)
            return super().training_step(batch)

    with pytest.raises(UserError, match="'lower': its training_step freezes"):
        program("identity", lower=Freezing, upper=Thawing).iterate()


@pytest.mark.parametrize("what", ["frozen", "detached"])
def test_nothing_to_step_along(what: str) -> None:
    class Odd(Lower):
        def training_step(self, batch: Any) -> Any:
            loss = super().training_step(batch)
            if what == "frozen":
                frozen(self, True)
                return loss
            return loss.detach()

    match = "all its parameters are frozen" if what == "frozen" else "depends on nothing"
    with pytest.raises(UserError, match=f"problem 'lower' has nothing to step along: .*{match}"):
        program("identity", lower=Odd).iterate()


# ------------------------------------------------------------------------- losses


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
def test_a_loss_of_one_element_is_a_loss(shape: tuple[int, ...]) -> None:
    class Shaped(Lower):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch).reshape(shape)

    plain, shaped = (program("cg", lower=kind) for kind in (Lower, Shaped))
    for engine in (plain, shaped):
        engine.run()
    assert shaped.upper.gradients == plain.upper.gradients


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda loss: loss.expand(3), r"shape \(3,\)"),
        (lambda loss: loss * 1j, "complex128"),
        (lambda loss: float(loss.detach()), "its loss is float"),
        (lambda loss: {"accuracy": loss}, "its loss is NoneType"),
    ],
)
def test_other_losses_are_refused(loss: Callable[[Tensor], Any], match: str) -> None:
    class Odd(Lower):
        def training_step(self, batch: Any) -> Any:
            return loss(super().training_step(batch))

    with pytest.raises(UserError, match=f"'lower': training_step .*{match}"):
        program("identity", lower=Odd).iterate()
