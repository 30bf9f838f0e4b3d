"""The configs against the paper's section 4, and what docs/load.md offers beside it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mlseg.config import load
from mlseg.problems.load.networks import Discriminator, DiscriminatorSettings
from mlseg.problems.systems import parse_run

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[3] / "configs"


def settings(name: str) -> Any:
    return parse_run(load(CONFIGS / f"{name}.yaml"))[0]


@pytest.mark.parametrize("name", ["load_voc", "load_cityscapes", "load_stanford", "load_camvid"])
def test_section_4(name: str) -> None:
    run = settings(name)
    ahead = run.lookahead
    assert (ahead.beta_u, ahead.beta_l) == (0.001, 0.05)
    assert (ahead.patience, ahead.cycles, ahead.buffer_size) == (50, 50, 3)
    assert ahead.peak_patience is not None  # algorithm 3, "in practice"
    assert ahead.peak_patience < ahead.patience - 1  # else it could never restart the search
    assert ahead.on_peak == "flush"
    assert run.hold_out.fraction == 0.3
    generator, discriminator = run.problems.generator, run.problems.discriminator
    assert (generator.optimizer.name, generator.batch_size) == ("sgd", 5)
    assert (generator.optimizer.lr, generator.optimizer.momentum) == (5e-6, 0.95)
    assert (discriminator.optimizer.name, discriminator.optimizer.lr) == ("adagrad", 0.01)
    assert discriminator.batch_size == 16
    assert run.discriminator.name == "mobilenet_v1"
    assert (run.discriminator.input_size, run.discriminator.dropout) == (224, 0.01)
    own = run.adversarial
    assert (own.loss, own.reduction, own.cross_entropy) == ("non_saturating", "sum", 0.0)
    assert run.pretraining.model_dump() == {"weighted_epochs": 4, "epochs": 8}
    assert (run.problems.pretraining.optimizer.lr, run.problems.pretraining.batch_size) == (1e-4, 7)


def test_the_data_of_the_papers_tables() -> None:
    stanford = settings("load_stanford").data
    assert (stanford.train, stanford.val, stanford.test) == (400, 172, 143)
    assert stanford.image_size == 321
    assert settings("load_voc").data.image_size == 513
    assert settings("load_cityscapes").augmentation.window == 513


def gradient(changes: dict[str, Any]) -> Tensor:
    """The generator's, on its first batch."""
    quick = {"pretraining.weighted_epochs": 0, "pretraining.epochs": 1, "augmentation": "off"}
    engine: Any = tiny.build("load", {**quick, **changes})
    generator = engine.generator
    engine.train()
    loss = generator.training_step(generator.get_batch())["loss"]
    found = torch.autograd.grad(loss, generator.trainable_parameters(), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_sum_and_weight_scale_the_gradient() -> None:
    """By the batch's size, and by lambda; rounding is that of three sums of products."""
    mean = gradient({"problems.generator.batch_size": 4})
    keys = {"problems.generator.batch_size": 4, "adversarial.reduction": "sum"}
    atol = 1e-6 * float(mean.norm())
    torch.testing.assert_close(gradient(keys), 4 * mean, rtol=1e-4, atol=atol)
    halved = gradient({**keys, "adversarial.weight": 0.5})
    torch.testing.assert_close(halved, 2 * mean, rtol=1e-4, atol=atol)


def test_the_hybrid_loss_adds_the_cross_entropy() -> None:
    """Its gradient is the difference of the two, and goes down the plain cross-entropy."""
    hybrid = gradient({"adversarial.cross_entropy": 100.0})
    alone = gradient({})
    assert (hybrid - alone).norm() > 0
    doubled = gradient({"adversarial.cross_entropy": 200.0})
    bound = 1e-5 * float(doubled.norm())
    torch.testing.assert_close(doubled - alone, 2 * (hybrid - alone), rtol=1e-3, atol=bound)


def small(**changes: Any) -> Discriminator:
    torch.manual_seed(0)
    made = DiscriminatorSettings(name="cnn", input_size=None, channels=4, **changes)
    return Discriminator(made, 3, 5).eval()


def test_maps_alone_dont_see_the_image() -> None:
    network = small(sees="maps")
    maps = torch.rand(2, 5, 32, 32)
    images = torch.rand(2, 2, 3, 32, 32)
    assert torch.equal(network(images[0], maps), network(images[1], maps))
    split = small()
    assert not torch.equal(split(images[0], maps), split(images[1], maps))
    changed = maps.clone()
    changed[:, 0] = 0
    assert not torch.equal(network(images[0], maps), network(images[0], changed))


def test_the_masked_range() -> None:
    """A black image in [0, 1] masks to what an empty map does; in [-1, 1] mid grey does."""
    maps = torch.rand(2, 5, 32, 32)
    nothing = torch.zeros_like(maps)
    for masked_range, level in (("unit", -1.0), ("signed", 0.0)):
        network = small(masked_range=masked_range)
        image = torch.full((2, 3, 32, 32), level)
        assert torch.equal(network(image, maps), network(image, nothing))
        assert not torch.equal(network(image + 1.0, maps), network(image + 1.0, nothing))


@pytest.mark.parametrize("momentum", ["restore", "drop"])
def test_the_momentum_that_a_cycle_starts_with(momentum: str) -> None:
    """At the end of a cycle's first update the buffer is its gradient, or has the past in it."""
    changes = {
        "pretraining.weighted_epochs": 0,
        "pretraining.epochs": 1,
        "lookahead.momentum": momentum,
        "lookahead.beta_l": 1.0,
    }
    engine: Any = tiny.build("load", changes)
    hook = next(hook for hook in engine.hooks if hook.name == "lookahead")
    generator = engine.generator
    engine.train()
    for _ in range(2):
        generator.step_normal()
    hook.snapshots["start"].take({})
    kept = [generator.optimizer.state[p]["momentum_buffer"].clone() for p in generator.parameters()]
    generator.step_normal()
    hook._restore(engine, {})
    state = generator.optimizer.state
    if momentum == "drop":
        assert not state
    else:
        for parameter, before in zip(generator.parameters(), kept, strict=True):
            assert torch.equal(state[parameter]["momentum_buffer"], before)
    generator.step_normal()
    assert all(p.isfinite().all() for p in generator.parameters())
