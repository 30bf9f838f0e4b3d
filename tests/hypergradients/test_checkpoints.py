"""Long windows from few stored states: bit for bit what storing all gives, within the bounds."""

import io
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from unrolling import OPTIMIZERS, program, run

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import RunError, UserError
from mlseg.hypergradients.checkpoints import Checkpointed, split, steps_taken, stored_first
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem
from mlseg.segmentation.data.augmentation import Augmentation, AugmentationSettings
from mlseg.segmentation.data.loader import BatchLoader
from mlseg.segmentation.data.samples import DatasetSpec, Samples
from mlseg.segmentation.data.synthetic import synthetic_lesions
from mlseg.testing.exact import distance
from mlseg.testing.programs import sgd

pytestmark = pytest.mark.slow


def few(states: int, **more: Any) -> dict[str, Any]:
    return {"method": "unrolled", "store": {"states": states}, **more}


ALL = {"method": "unrolled"}


# ------------------------------------------------------------------------------ the schedule


@cache
def fewest(length: int, states: int) -> int:
    """Steps, by trying every place for the next state."""
    if length == 1:
        return 0
    if states == 1:
        return length * (length - 1) // 2
    return min(at + fewest(length - at, states - 1) + fewest(at, states) for at in range(1, length))


def test_no_schedule_takes_fewer_steps() -> None:
    for states in range(1, 7):
        for length in range(1, 41):
            assert steps_taken(length, states) == fewest(length, states), (length, states)


def test_published_numbers() -> None:
    """Revolve's: 1000 steps with 20 states take 2.75 steps per step."""
    assert steps_taken(1000, 20) == 2747
    assert steps_taken(100, 10) == 222
    assert len(stored_first(1000, 20)) == 20
    assert stored_first(10, 30) == list(range(10))
    assert split(2, 2) == 1


# ----------------------------------------------------------------------------- the same answer


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bit_for_bit(optimizer: str) -> None:
    """In the second window, whose steps start from moments, with dropout and BatchNorm."""
    found = [
        run(program(method, OPTIMIZERS[optimizer], unroll=7), 2)
        for method in (ALL, few(2), few(3), few(1))
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "options",
    [
        {"unroll": 4, "gradient_accumulation": 2, "gradient_clipping": 0.3},
        {"unroll": 5, "with_rate": True},
    ],
)
def test_accumulation_clipping_and_learned_rates(options: dict[str, Any]) -> None:
    one, other = (run(program(m, OPTIMIZERS["adam"], **options), 2) for m in (ALL, few(2)))
    assert torch.equal(one, other)


@pytest.mark.usefixtures("double")
def test_a_part_of_the_window_and_more_states_than_steps() -> None:
    optimizer = OPTIMIZERS["adam"]
    for steps, states in ((3, 2), (1, 1), (6, 50)):
        one = run(program({**ALL, "steps": steps}, optimizer, unroll=6), 2)
        assert torch.equal(one, run(program(few(states, steps=steps), optimizer, unroll=6), 2))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("mode", ["forward_over_reverse", "difference"])
def test_other_modes(mode: str) -> None:
    """Their gradients are evaluated, where storing all keeps them: the same to rounding."""
    optimizer = OPTIMIZERS["adam"]
    one = run(program({**ALL, "mode": mode}, optimizer, unroll=5), 2)
    other = run(program(few(2, mode=mode), optimizer, unroll=5), 2)
    # A difference divides by its step, 1e-3 relative to the weights: 1e-16 / 1e-3 per operation.
    assert distance(one, other) < 1e-9


@pytest.mark.usefixtures("double")
def test_training_takes_no_note() -> None:
    """Weights, moments, buffers and random streams go on as if all had been stored."""
    states = []
    for method in (ALL, few(2)):
        engine = program(method, OPTIMIZERS["adam"], unroll=5)
        run(engine, 3)
        states.append((engine.state_dict()["problems"], torch.get_rng_state()))
    (one, random), (other, also_random) = states
    assert torch.equal(random, also_random)
    for name in one:
        for part in ("module", "optimizer"):
            assert str(one[name][part]) == str(other[name][part])
    assert engine.low.optimizer.param_groups[0]["lr"] == 0.05


# --------------------------------------------------------------------------- memory and time


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("length", "states"), [(12, 3), (9, 2), (6, 1), (5, 5)])
def test_states_and_steps_are_bounded(
    length: int, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    memory: set[int] = set()
    work = Checkpointed._work_on

    def counted(self: Checkpointed, *args: Any) -> None:
        work(self, *args)
        look(self)

    def look(self: Checkpointed) -> None:
        nonlocal most
        held = [s for s in (*self.steps, self._open, self._working) if s is not None and s.weights]
        held_free = [weights for weights, _ in self._free]
        everything = [*(s.weights for s in held), *held_free]
        memory.update(w[0].data_ptr() for w in everything)
        most = max(most, self.states())

    store = Checkpointed._store

    def stored(self: Checkpointed, *args: Any) -> None:
        store(self, *args)
        look(self)

    monkeypatch.setattr(Checkpointed, "_work_on", counted)
    monkeypatch.setattr(Checkpointed, "_store", stored)
    engine = program(few(states), OPTIMIZERS["adam"], unroll=length)
    run(engine, 3)
    assert most == states
    assert len(memory) == states + 1  # the working one
    # Training took the steps up to the last one itself.
    assert engine.low.trajectory.taken == 3 * (steps_taken(length, states) - (length - 1))


# ------------------------------------------------------------------------------------ batches


AUGMENTATION = Augmentation(AugmentationSettings(flip_horizontal=0.5, rotate=30.0))


class Rows(nn.Module):
    """What stands in for a network: a colour's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x)


class Lower(Problem):
    def training_step(self, batch: Any) -> Any:
        image, mask = batch
        loss = functional.cross_entropy(self.module(image), mask, reduction="none")
        return (loss * self.top.module(image).softmax(1)[:, 0]).mean()


class Own(Lower):
    def get_batch(self) -> Any:
        image, mask = super().get_batch()
        return image.clone(), mask


class Upper(Problem):
    def training_step(self, batch: Any) -> Any:
        image, mask = batch
        return functional.cross_entropy(self.low.module(image), mask)

    def grad_callback(self) -> None:
        self.gradients = [*getattr(self, "gradients", []), self.module.line.weight.grad.clone()]


def segmentation(method: Any, kind: type[Problem] = Lower) -> Engine:
    ids = [f"e{index}" for index in range(7)]
    images, masks = synthetic_lesions(range(7), (8, 8))
    samples = Samples(ids, images, masks, DatasetSpec("tiny", 3, ("skin", "lesion")))
    torch.manual_seed(0)
    nets = Rows(), Rows()
    loaders = [BatchLoader(samples, 2, seed=n, augmentation=AUGMENTATION) for n in (0, 1)]
    low = kind(
        "low",
        nets[0],
        torch.optim.SGD(nets[0].parameters(), 0.1, momentum=0.9),
        loaders[0],
        config=Config(hypergradient=method, unroll_steps=6),
    )
    top = Upper("top", nets[1], torch.optim.SGD(nets[1].parameters(), 0.1), loaders[1])
    return Engine(
        [low, top], EngineSettings(), u2l={top: [low]}, l2u={low: [top]}, device="cpu", quiet=True
    )


@pytest.mark.parametrize("kind", [Lower, Own])
def test_batches_are_drawn_again_where_a_loader_knows_its_place(kind: type[Problem]) -> None:
    """Over the ends of epochs of three batches, with augmentation; else they are kept."""
    engines = [segmentation(method, kind) for method in (ALL, few(2))]
    for engine in engines:
        for _ in range(18):
            engine.iterate()
    one, other = (torch.cat(engine.top.gradients) for engine in engines)
    assert len(one)
    assert torch.equal(one, other)
    for step in engines[1].low.trajectory.steps:
        kept = [batch for batch, _ in step.seen]
        assert all((batch is None) == (kind is Lower) for batch in kept)


# -------------------------------------------------------------------------------- going on after


@pytest.mark.parametrize("method", [few(2), few(1)])
def test_resumed_within_a_window(method: Any) -> None:
    through = segmentation(method)
    for _ in range(10):
        through.iterate()
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    resumed = segmentation(method)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for engine in (through, resumed):
        for _ in range(8):
            engine.iterate()
    assert torch.equal(through.top.gradients[-1], resumed.top.gradients[-1])


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ({"steps": 5}, {"unroll": 3}, "more than the level's unroll_steps 3"),
        ({"optimizer_state": "fresh"}, {}, "needs the gradients of all steps"),
        ({}, {"precision": "bf16"}, "and not in bf16; set the hypergradient's store to weights"),
        ({"backend": "higher"}, {}, "set store to weights"),
    ],
)
def test_what_cant_be_taken_again_is_refused_when_it_is_made(
    method: Any, options: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        program(few(2, **method), sgd(), **options)


class Scaled(nn.Module):
    """Its output depends on what is no buffer and no weight."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x) * self.scale


def test_a_step_that_does_not_repeat_itself_is_refused() -> None:
    engine = segmentation(few(2))
    engine.low.module.line = Scaled()
    engine.low.optimizer.add_param_group({"params": list(engine.low.module.parameters())})
    for _ in range(5):
        engine.iterate()
    engine.low.module.line.scale = 1.1
    with pytest.raises(RunError, match="depends on what has changed since"):
        engine.iterate()


def test_windows_that_are_not_whole_are_refused() -> None:
    engine = segmentation(few(2))
    for _ in range(5):
        engine.iterate()
    engine.low.trajectory.steps.pop()
    with pytest.raises(RunError, match="steps after 5 of the 6 steps of a window"):
        engine.iterate()
