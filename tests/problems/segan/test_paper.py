"""What docs/segan.md says of the paper's gaps: the pixel level, the scalar critic, the split."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from mlseg.config import load
from mlseg.problems.systems import parse_run

CONFIGS = Path(__file__).parents[3] / "configs"


def gradient_under_a_critic_of_zeros(changes: dict[str, Any]) -> list[Tensor]:
    """The segmentor's gradient of the game's loss when no weight of the critic is other than 0."""
    engine = tiny.build("segan", changes)
    with torch.no_grad():
        for parameter in engine.critic.module.parameters():
            parameter.zero_()
    image, label, counted = engine.critic.get_batch()
    maps = engine.segmentor.maps(image, counted)
    loss = engine.critic.distance(image, maps, label, critic_fixed=True)
    return list(torch.autograd.grad(loss, engine.segmentor.trainable_parameters()))


@pytest.mark.parametrize("reduction", ["layer_mean", "sum"])
def test_only_the_pixel_level_reaches_the_segmentor_past_the_critic(reduction: str) -> None:
    """Section 1's "only gradients flowing through the critic" holds without it alone."""
    changes = {"loss.reduction": reduction}
    assert any(g.any() for g in gradient_under_a_critic_of_zeros(changes))
    without = gradient_under_a_critic_of_zeros({**changes, "critic.pixel_level": False})
    assert not any(g.any() for g in without)


def test_the_pixel_level_is_one_of_l_terms() -> None:
    """L1 of the masked images over L, against the whole: the rest is the loss without it."""
    engine = tiny.build("segan")
    image, label, counted = engine.critic.get_batch()
    maps = engine.segmentor.maps(image, counted).detach()
    levels = engine.critic.module.critics[0].layers + 1
    whole = engine.critic.distance(image, maps, label)
    engine.critic.module.critics[0].pixel_level = False
    rest = engine.critic.distance(image, maps, label)
    masked = (image + 1) / 2
    pixels = (masked * maps - masked * label).abs().mean()
    torch.testing.assert_close(whole, (pixels + (levels - 1) * rest) / levels)


def test_the_public_codes_weights_want_the_pixel_level() -> None:
    with pytest.raises(ValueError, match=r"critic.pixel_level: .* concat .*layer_mean or sum"):
        tiny.build("segan", {"critic.pixel_level": False, "loss.reduction": "concat"})


SCALAR = {"critic.output": "scalar", "critic.clamp": None}


def test_the_scalar_critics_loss_is_binary_cross_entropy_with_its_sign_changed() -> None:
    """The independent answer: torch's loss on labels 1 for true and 0 for predicted."""
    engine = tiny.build("segan", SCALAR)
    image, label, counted = engine.critic.get_batch()
    maps = engine.segmentor.maps(image, counted).detach()
    value = engine.critic.distance(image, maps, label)
    masked = (image + 1) / 2
    ((true,), (predicted,)) = (engine.critic(masked, m)[0] for m in (label, maps))
    assert true.shape == (len(image), 1)
    expected = functional.binary_cross_entropy_with_logits(true, torch.ones_like(true))
    expected = expected + functional.binary_cross_entropy_with_logits(
        predicted, torch.zeros_like(predicted)
    )
    torch.testing.assert_close(value, -expected)


@pytest.mark.parametrize("game", ["alternating", "stackelberg"])
def test_the_scalar_critic_plays(game: str) -> None:
    engine = tiny.build("segan", {**SCALAR, "game": game})
    before = tiny.weights(engine)
    for _ in range(2):
        engine.iterate()
    after = tiny.weights(engine)
    assert all(value.isfinite().all() for value in after.values())
    for name in ("critic", "segmentor"):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(name))


def test_the_papers_recipe() -> None:
    """Section 3, and the 2000 images within which the paper trains and validates."""
    run: Any = parse_run(load(CONFIGS / "segan_isic.yaml"))[0]
    assert run.game == "alternating"
    assert run.data.name == "isic2017"
    assert run.data.splits == "official_test"
    assert run.data.train + run.data.val == 2000
    assert run.data.test is None  # all 600
    assert run.data.image_size == [135, 180]
    assert run.augmentation.window == 128
    assert run.augmentation.flip_horizontal == run.augmentation.flip_vertical == 0.5
    for level in (run.problems.critic, run.problems.segmentor):
        assert (level.optimizer.name, level.optimizer.lr, level.batch_size) == ("adam", 3e-3, 25)
        assert level.scheduler.name == "linear"
    assert (run.logistic.decay, run.logistic.every, run.logistic.floor) == (0.9, 25, 0.3)
    assert run.threshold == 0.4
    assert (run.critic.clamp, run.critic.clamp_norm) == (0.05, True)
    assert run.loss.dice_weight == run.warmup_epochs == 0
    batches = run.data.train // 25
    assert run.engine.iterations == 400 * batches
    assert run.engine.validate_every % batches == 0


@pytest.mark.parametrize("name", ["segan_isic_unrolled", "segan_isic_small_unrolled"])
def test_the_unrolled_critic_looks_as_far_as_it_steps(name: str) -> None:
    run: Any = parse_run(load(CONFIGS / f"{name}.yaml"))[0]
    critic = run.problems.critic
    assert run.game == "stackelberg"
    assert type(critic.hypergradient).name == "unrolled"
    assert critic.hypergradient.steps == critic.unroll_steps > 1
