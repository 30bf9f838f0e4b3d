"""SegAN's game: the traps, one test each, the variants, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from segan_game import PLAIN, parameters_that_differ, watch
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.engines.segmentation import Segmentation
from mlseg.errors import UserError
from mlseg.problems.segan import levels as segan
from mlseg.problems.segan.networks.critic import Critic

pytestmark = pytest.mark.slow

# -------------------------------------------------------------------------- the traps


@pytest.mark.parametrize("reduction", ["layer_mean", "concat", "sum"])
def test_1_the_critics_step_raises_the_loss_and_the_segmentors_lowers_it(reduction: str) -> None:
    changes = {**PLAIN, "loss.reduction": reduction}
    if reduction == "sum":  # a thousand times larger
        for name in ("critic", "segmentor"):
            changes[f"problems.{name}.optimizer"] = {"name": "sgd", "lr": 1e-6}
    engine = tiny.build("segan", changes)
    seen = watch(engine)
    for _ in range(3):
        engine.iterate()
        assert seen["after critic"][0] > seen["before critic"][0]
        assert seen["before segmentor"][0] == pytest.approx(seen["after critic"][0], rel=1e-5)
        assert seen["after segmentor"][0] < seen["before segmentor"][0]


def test_2_each_step_moves_its_own_player_alone() -> None:
    engine = tiny.build("segan")
    seen = watch(engine)
    for _ in range(2):
        engine.iterate()
        for name, other in (("critic", "segmentor"), ("segmentor", "critic")):
            before, after = (seen[f"{when} {name}"][1] for when in ("before", "after"))
            assert parameters_that_differ(engine, before, after) == {name}
            assert all(p.grad is None for p in getattr(engine, other).module.parameters())


def test_3_masks_with_a_channel_or_maps_without_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"class indices must be \(B, H, W\)"):
        segan.label_maps(torch.zeros(2, 1, 8, 8).long(), 2, None)
    engine = tiny.build("segan")
    image, label, counted = engine.critic.get_batch()
    assert label.shape == (3, 1, 32, 32)
    with pytest.raises(UserError, match=r"label.unsqueeze\(1\)"):
        engine.critic.training_step((image, label.squeeze(1), counted))


def test_4_real_and_predicted_images_have_statistics_of_their_own() -> None:
    """Together in one pass, the true image's features would depend on the prediction."""
    engine = tiny.build("segan", {"critic.layers": 3})
    inputs: list[Tensor] = []
    engine.critic.module.critics[0].register_forward_hook(
        lambda module, given, features: inputs.append(given[0].detach().clone())
    )
    engine.iterate()
    # The critic's step, then the segmentor's: true and predicted, each a batch by itself.
    assert [len(masked) for masked in inputs] == [3, 3, 3, 3]
    image, label, counted = engine.critic.cur_batch
    true = (image + 1) / 2 * label
    for index in (0, 2):
        torch.testing.assert_close(inputs[index], true)
        assert not torch.allclose(inputs[index + 1], true)

    def features(other: Tensor) -> Tensor:
        return engine.critic((image + 1) / 2, label)[0][-1] + 0 * other.sum()

    maps = engine.segmentor.maps(image, counted)
    assert torch.equal(features(maps), features(1 - maps))


@pytest.mark.parametrize("unroll", [1, 3])
def test_5_the_segmentors_statistics_move_once_per_step_of_its_own(unroll: int) -> None:
    """`no_grad` alone would count the critic's forward passes too."""
    engine = tiny.build("segan", {"problems.critic.unroll_steps": unroll})
    norm: Any = next(m for m in engine.segmentor.module.modules() if isinstance(m, nn.BatchNorm2d))
    moves = []
    for _ in range(6):
        before, steps = norm.running_mean.clone(), engine.segmentor.count
        engine.iterate()
        moved = not torch.equal(norm.running_mean, before)
        assert moved == (engine.segmentor.count > steps)
        moves.append(moved)
    assert sum(moves) == 6 // unroll == int(norm.num_batches_tracked)
    assert engine.critic.count == 6


def test_6_a_new_rate_keeps_the_optimizer_and_its_state() -> None:
    decay = {"name": "linear", "length": 4}
    engine = tiny.build(
        "segan", {f"problems.{name}.scheduler": decay for name in ("critic", "segmentor")}
    )
    kept = [p.optimizer for p in engine.problems]
    rates = []
    for step in range(1, 5):
        engine.iterate()
        rates += [p.optimizer.param_groups[0]["lr"] for p in engine.problems]
        for problem, optimizer in zip(engine.problems, kept, strict=True):
            assert problem.optimizer is optimizer
            assert {int(s["step"]) for s in optimizer.state.values()} == {step}
    expected = [3e-3 * (1 - step / 4) for step in range(1, 5) for _ in range(2)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_7_empty_masks_score_what_the_documentation_says() -> None:
    engine = tiny.build("segan")
    engine.hook(Segmentation).data.val.masks[:] = 0
    engine.segmentor.module.head.bias.data.fill_(-100.0)  # nothing is lesion
    figures = engine.validate()
    for name in ("jaccard", "dice", "accuracy", "sensitivity", "specificity"):
        assert figures[name] == 1
    engine.segmentor.module.head.bias.data.fill_(100.0)
    figures = engine.validate()
    assert {figures[name] for name in ("jaccard", "dice", "specificity")} == {0.0}


# ------------------------------------------------------------------------------- the clamp


@pytest.mark.parametrize("norm", [True, False])
def test_the_clamp_with_and_without_norm_layers(norm: bool) -> None:
    engine = tiny.build("segan", {"critic.clamp": 0.02, "critic.clamp_norm": norm})
    engine.iterate()
    module = engine.critic.module
    scales = [m.weight for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert max(float(w.detach().abs().max()) for w in weights) == pytest.approx(0.02)
    for scale in scales:
        expected = 0.02 if norm else 1.0
        torch.testing.assert_close(
            scale.detach(), torch.full_like(scale, expected), rtol=0, atol=0.02
        )
    largest = max(float(p.detach().abs().max()) for p in engine.segmentor.module.parameters())
    assert largest > 0.02, "the segmentor is never clamped"


def test_no_clamp_at_all() -> None:
    engine = tiny.build("segan", {"critic.clamp": None})
    engine.iterate()
    assert max(float(p.detach().abs().max()) for p in engine.critic.module.parameters()) > 0.5


# -------------------------------------------------------------------- logistic and warm-up


def test_k_is_annealed_by_epochs_of_the_training_images() -> None:
    """6 images in batches of 3: an epoch is two steps, and ends as the next one begins."""
    changes = {"logistic": {"decay": 0.5, "every": 2, "floor": 0.3}}
    engine = tiny.build("segan", changes)
    logistic = engine.segmentor.module.logistic
    found = []
    for _ in range(11):
        engine.iterate()
        found.append(float(logistic.k))
    assert found == pytest.approx([1.0] * 4 + [0.5] * 4 + [0.3] * 3)
    assert int(logistic.epochs) == 5
    # Both players and the prediction use it.
    image = engine.hook(Segmentation).data.val.images[:2].float() / 127.5 - 1
    engine.eval()
    now = engine.segmentor.module(image)[:, 1]
    logistic.k.fill_(0.6)
    torch.testing.assert_close(engine.segmentor.module(image)[:, 1], now * 0.5)


def test_a_segmentor_without_a_logistic_plays_too() -> None:
    changes = {"segmentor": {"name": "unet", "channels": 4, "levels": 2}}
    engine = tiny.build("segan", changes)
    before = tiny.weights(engine)
    for _ in range(3):
        engine.iterate()
    assert parameters_that_differ(engine, before, tiny.weights(engine)) == {"critic", "segmentor"}


def test_the_warm_up_trains_the_segmentor_alone_by_dice() -> None:
    changes = {
        "warmup_epochs": 2,
        "problems.segmentor.scheduler": {"name": "linear"},
        "engine.iterations": 3,
    }
    engine = tiny.build("segan", changes)
    assert [(s.name, s.iterations) for s in engine.stages] == [("warmup", 4), ("game", 3)]
    before, losses = tiny.weights(engine), []
    for _ in range(4):
        engine.iterate()
        losses.append(float(engine.segmentor.metrics["loss"]))
    assert parameters_that_differ(engine, before, tiny.weights(engine)) == {"segmentor"}
    assert all(0 < loss < 1 for loss in losses)
    assert engine.critic.count == 0
    assert int(engine.segmentor.module.logistic.epochs) == 1
    engine.enter_stage(1)
    before = tiny.weights(engine)
    for _ in range(3):
        engine.iterate()
    assert parameters_that_differ(engine, before, tiny.weights(engine)) == {"critic", "segmentor"}
    # A linear decay without a length takes the run's whole length, the warm-up included.
    assert engine.segmentor.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_schedule_by_epochs_reaches_the_segmentor() -> None:
    """It has no loader of its own."""
    halved = {"name": "exponential", "factor": 0.5, "step": "epoch"}
    engine = tiny.build(
        "segan", {f"problems.{name}.scheduler": halved for name in ("critic", "segmentor")}
    )
    for _ in range(5):
        engine.iterate()
    assert [p.optimizer.param_groups[0]["lr"] for p in engine.problems] == [3e-3 / 4] * 2


def test_the_dice_term_is_the_segmentors_alone() -> None:
    engine = tiny.build("segan", {"loss.dice_weight": 0.5})
    engine.iterate()
    critic, own = engine.critic.metrics, engine.segmentor.metrics
    assert "dice" not in critic
    assert float(critic["loss"]) == -float(critic["distance"])
    expected = float(own["distance"]) + 0.5 * float(own["dice"])
    assert float(own["loss"]) == pytest.approx(expected)


# ------------------------------------------------------------------------- several classes


@pytest.mark.parametrize("layout", ["each", "stacked"])
def test_several_classes_with_both_layouts(layout: str, tmp_path: Path) -> None:
    changes = {"data.name": "synthetic_scenes", "critic.classes": layout}
    engine = tiny.build("segan", changes, tmp_path)
    count = len(engine.hook(Segmentation).data.spec.classes)
    assert len(engine.critic.module.critics) == (count if layout == "each" else 1)
    before = tiny.weights(engine)
    engine.run()
    assert parameters_that_differ(engine, before, tiny.weights(engine)) == {"critic", "segmentor"}
    results = engine.results()
    assert 0 <= results["scores"]["best"]["test"]["pooled_jaccard"] <= 1


def test_ignored_pixels_reach_neither_player() -> None:
    mask = torch.tensor([[[0, 1, 2, 11]]])
    maps, counted = segan.label_maps(mask, 3, 11)
    assert maps[0, :, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert counted is not None
    assert counted[0, 0, 0].tolist() == [1, 1, 1, 0]
    assert segan.label_maps(mask, 3, None)[1] is None
    assert segan.label_maps(mask.clamp(0, 1), 2, None)[0].tolist() == [[[[0, 1, 1, 1]]]]

    engine = tiny.build("segan", {"data.name": "synthetic_scenes"})
    image, label, _ = engine.critic.get_batch()
    counted = torch.ones(3, 1, 32, 32)
    counted[..., :16] = 0
    maps = engine.segmentor.maps(image, counted)
    assert not maps[..., :16].any()
    assert maps[..., 16:].any()
    changed = image.clone()
    engine.critic.module.eval()
    one = engine.critic.distance(image, maps, label * counted)
    changed[..., :16] = 1.0
    two = engine.critic.distance(changed, maps, label * counted)
    assert torch.equal(one, two)


# ------------------------------------------------------------------------- other behaviour


def test_images_are_masked_in_the_range_that_the_config_says() -> None:
    for masked_range, black in (("unit", 0.0), ("signed", -1.0)):
        engine = tiny.build("segan", {"critic.masked_range": masked_range})
        inputs: list[Tensor] = []
        engine.critic.module.critics[0].register_forward_hook(
            lambda module, given, features, to=inputs: to.append(given[0])
        )
        engine.critic.distance(*(torch.full((2, c, 32, 32), v) for c, v in ((3, -1.0), (1, 1.0))),
                               torch.ones(2, 1, 32, 32))  # fmt: skip
        assert inputs[0].unique().tolist() == [black]


@pytest.mark.parametrize("changes", [{}, {"data.name": "synthetic_scenes"}])
def test_bf16_keeps_maps_and_loss_in_float32(changes: dict[str, Any]) -> None:
    engine = tiny.build("segan", {"precision": "bf16", **changes})
    types = []
    engine.critic.module.critics[0].blocks[0].register_forward_hook(
        lambda module, given, out: types.append(out.dtype)
    )
    for _ in range(2):
        engine.iterate()
    assert set(types) == {torch.bfloat16}
    assert engine.critic.metrics["distance"].dtype == torch.float32
    assert all(v.isfinite().all() for v in tiny.weights(engine).values())
    # The first distance is of equal weights: a dozen layers, each rounded to bfloat16's eight
    # bits, 2^-8 at most. Later ones aren't: where Adam divides by it, a gradient of rounding is a
    # whole step.
    first, plain = (tiny.build("segan", {**c, **changes}) for c in ({"precision": "bf16"}, {}))
    for made in (first, plain):
        made.iterate()
    found, expected = (float(made.critic.metrics["distance"]) for made in (first, plain))
    assert found == pytest.approx(expected, rel=12 * 2**-8)
    assert found != expected


def test_the_run_directory(tmp_path: Path) -> None:
    engine = tiny.build("segan", {"engine.samples": 2, "engine.tensorboard": True}, tmp_path)
    engine.run()
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {"metrics.jsonl", "events.jsonl", "checkpoints/last.pt", "checkpoints/best.pt"} <= names
    assert any(name.startswith("tensorboard/") for name in names)
    assert "samples/validation_000004.png" in names
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert {line["problem"] for line in lines} == {"critic", "segmentor", "validation"}
    state = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert state["segmentor"]["threshold"] == 0.4
    assert "logistic.k" in state["problems"]["segmentor"]["module"]


def test_the_same_start_and_batches_as_supervised() -> None:
    """So that a comparison within a seed is one of the losses."""
    game = tiny.build("segan")
    plain = tiny.build(
        "supervised",
        {
            "segmentor": {"name": "segan", "channels": 4, "levels": 3},
            "problems.segmentor.batch_size": 3,
        },
    )
    assert tiny.same(
        dict(game.segmentor.module.state_dict()), dict(plain.segmentor.module.state_dict())
    )
    for _ in range(3):
        image, label, _ = game.critic.get_batch()
        other, mask = plain.segmentor.get_batch()
        assert torch.equal(image, other)
        assert torch.equal(label[:, 0], mask.float())


def test_the_critic_never_normalises_by_kept_statistics() -> None:
    """In training mode only: features of a batch don't depend on former batches."""
    critic = Critic(3, channels=4, layers=3)
    image = torch.randn(4, 3, 32, 32)
    first = critic(image)[-1]
    for _ in range(3):
        critic(torch.randn(4, 3, 32, 32) * 5)
    assert torch.equal(critic(image)[-1], first)
