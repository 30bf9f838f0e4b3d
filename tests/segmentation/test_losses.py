"""Losses against segmentation-models-pytorch, closed forms, and finite differences."""

import math
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mlseg.config import Settings
from mlseg.segmentation.losses import (
    LossSettings,
    balanced_cross_entropy,
    build_loss,
    dice_of_maps,
    fooling_loss,
    gan_loss,
    multi_scale_l1,
    relax,
)

IGNORE = 255


def _case(classes: int, seed: int = 0, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 5, 4, dtype=torch.float64, generator=generator)
    target = torch.randint(classes, (2, 5, 4), generator=generator)
    target[0, 0, :classes] = torch.arange(classes)  # every class occurs
    hidden = torch.rand(2, 5, 4, generator=generator) < ignored
    hidden[0, 0, :classes] = False
    return logits, target.masked_fill(hidden, IGNORE)


def _only(**weights: float | bool) -> LossSettings:
    return LossSettings.model_validate({"cross_entropy": 0.0, "smooth": 0.0} | weights)


def test_the_default_is_cross_entropy_alone() -> None:
    logits, target = _case(3)
    loss = build_loss(LossSettings())(logits, target)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, target))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_overlap_terms_agree_with_smp(classes: int, smooth: float) -> None:
    """Every class occurs, so the difference in absent classes doesn't show."""
    logits, target = _case(classes)
    dice = build_loss(_only(dice=1.0, smooth=smooth))(logits, target)
    # There, s stands beside I and the mean of P and T; here, beside 2 I and their sum.
    expected = smp.losses.DiceLoss("multiclass", smooth=smooth / 2)(logits, target)
    torch.testing.assert_close(dice, expected)
    jaccard = build_loss(_only(jaccard=1.0, smooth=smooth))(logits, target)
    expected = smp.losses.JaccardLoss("multiclass", smooth=smooth)(logits, target)
    torch.testing.assert_close(jaccard, expected)


@given(seed=st.integers(0, 1000), classes=st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_ignored_pixels_are_as_if_they_were_not_there(seed: int, classes: int) -> None:
    logits, target = _case(classes, seed, ignored=0.4)
    loss = build_loss(LossSettings(dice=0.5, jaccard=2.0), IGNORE)
    kept = target != IGNORE
    rows = logits.permute(0, 2, 3, 1)[kept].T[None, :, None]
    alone = build_loss(LossSettings(dice=0.5, jaccard=2.0))(rows, target[kept][None, None])
    torch.testing.assert_close(loss(logits, target), alone)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    assert not gradient.permute(0, 2, 3, 1)[~kept].any()


def test_terms_add_up_with_their_weights() -> None:
    logits, target = _case(3)
    whole = build_loss(LossSettings(cross_entropy=0.5, dice=2.0, jaccard=3.0))
    parts = [
        weight * build_loss(_only(smooth=1.0, **{name: 1.0}))(logits, target)
        for name, weight in (("cross_entropy", 0.5), ("dice", 2.0), ("jaccard", 3.0))
    ]
    torch.testing.assert_close(whole(logits, target), sum(parts))


def test_closed_form() -> None:
    """One pixel of each class, right with q: Dice 1 - q, Jaccard 1 - q / (2 - q)."""
    q = 0.8
    logit = math.log(q / (1 - q))
    logits = torch.tensor([[[[logit, 0.0]], [[0.0, logit]]]], dtype=torch.float64)
    target = torch.tensor([[[0, 1]]])
    for name, value in (
        ("cross_entropy", -math.log(q)),
        ("dice", 1 - q),
        ("jaccard", 1 - q / (2 - q)),
    ):
        assert math.isclose(float(build_loss(_only(**{name: 1.0}))(logits, target)), value)


def test_absent_classes_and_background() -> None:
    logits, _ = _case(4)
    target = torch.randint(2, (2, 5, 4))
    target[0, 0, :2] = torch.tensor([0, 1])
    probability = logits.softmax(1)
    dice = []
    for index in (0, 1):
        truth = target == index
        inside = (probability[:, index] * truth).sum()
        dice.append(1 - 2 * inside / (probability[:, index].sum() + truth.sum()))
    both = build_loss(_only(dice=1.0))(logits, target)
    torch.testing.assert_close(both, (dice[0] + dice[1]) / 2)
    foreground = build_loss(_only(dice=1.0, background=False))(logits, target)
    torch.testing.assert_close(foreground, dice[1])


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_nothing_but_ignored_pixels_is_zero(smooth: float) -> None:
    logits, target = _case(3)
    logits.requires_grad_()
    weights = LossSettings(dice=1.0, jaccard=1.0, smooth=smooth)
    loss = build_loss(weights, IGNORE)(logits, torch.full_like(target, IGNORE))
    assert float(loss) == 0
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert not gradient.any()
    assert torch.autograd.grad(gradient.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("term", ["cross_entropy", "dice", "jaccard"])
def test_derivatives(term: str) -> None:
    logits, target = _case(3, ignored=0.2)
    logits = logits[:, :, :2, :3].clone().requires_grad_()
    target = target[:, :2, :3]
    loss = build_loss(_only(smooth=1.0, **{term: 1.0}), IGNORE)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_single(dtype: torch.dtype) -> None:
    logits, target = _case(2)
    weights = LossSettings(dice=1.0)
    loss = build_loss(weights)(logits.to(dtype), target)
    assert loss.dtype == torch.float32
    expected = build_loss(weights)(logits, target)
    assert math.isclose(float(loss), float(expected), abs_tol=1e-2)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_saturated_logits_stay_finite(extreme: float) -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 1] = extreme
    logits.requires_grad_()
    weights = LossSettings(dice=1.0, jaccard=1.0, smooth=0.0)
    loss = build_loss(weights)(logits, torch.zeros(1, 2, 2, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "values",
    [{"cross_entropy": 0.0}, {"dice": -1.0}, {"smooth": -1.0}, {"dice": math.inf}, {"x": 1}],
)
def test_settings_refuse(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"above 0|greater than|finite|Extra"):
        LossSettings.model_validate(values)
    assert issubclass(LossSettings, Settings)


@pytest.mark.parametrize("real", [True, False])
def test_gan_loss(real: bool) -> None:
    logits = torch.tensor([[-30.0, -1.0, 0.0, 2.0, 40.0]], dtype=torch.float64)
    sign = -1 if real else 1
    expected = torch.log1p(torch.exp(sign * logits)).mean()
    torch.testing.assert_close(gan_loss(logits, real), expected)
    point = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: gan_loss(x, real), point)


def test_nothing_is_read_from_the_device() -> None:
    """On the meta device any read of a value raises."""
    with torch.device("meta"):
        logits = torch.empty(2, 3, 4, 4, requires_grad=True)
        target = torch.empty(2, 4, 4, dtype=torch.long)
        loss = build_loss(LossSettings(dice=1.0, jaccard=1.0), IGNORE)(logits, target)
        (loss + gan_loss(logits, real=True)).backward()
    assert loss.shape == ()


# ------------------------------------------------------------------------------- SegAN's game


def features(seed: int) -> list[Tensor]:
    """Seven maps of two images, as the critic gives them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 8, 8), (4, 4, 4), (8, 2, 2), (8, 1, 1), (8, 1, 1), (8, 1, 1), (8, 1, 1)]
    return [torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in shapes]


def test_multi_scale_l1_by_its_three_definitions() -> None:
    a, b = features(0), features(1)
    absolute = [(x - y).abs().flatten(1).numpy() for x, y in zip(a, b, strict=True)]
    assert float(multi_scale_l1(a, b)) == pytest.approx(sum(layer.mean() for layer in absolute) / 7)
    # Equation 2 to the letter: a norm, divided by L; equation 1: the mean over images.
    by_image = [sum(layer[n].sum() for layer in absolute) / 7 for n in range(2)]
    assert float(multi_scale_l1(a, b, "sum")) == pytest.approx(sum(by_image) / 2)
    # The public code: weighted features side by side, one mean.
    weights = (1, 1, 2, 2, 2, 2, 4)

    def joined(maps: list[Tensor]) -> Tensor:
        return torch.cat([w * f.flatten(1) for w, f in zip(weights, maps, strict=True)], 1)

    expected = functional.l1_loss(joined(a), joined(b))
    assert float(multi_scale_l1(a, b, "concat")) == pytest.approx(float(expected))


@pytest.mark.parametrize("reduction", ["layer_mean", "concat", "sum"])
def test_multi_scale_l1_is_a_distance(reduction: Any) -> None:
    a, b = features(0), features(1)
    assert float(multi_scale_l1(a, a, reduction)) == 0
    assert float(multi_scale_l1(a, b, reduction)) == float(multi_scale_l1(b, a, reduction)) > 0
    half = [x.bfloat16() for x in a]
    assert multi_scale_l1(half, half, reduction).dtype == torch.float32
    assert float(multi_scale_l1(a[:3], b[:3], reduction)) > 0


def test_dice_of_maps() -> None:
    label = (torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    assert float(dice_of_maps(label, label)) == pytest.approx(0, abs=1e-12)
    maps = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    expected = []
    for m in range(3):
        p, t = maps[:, m], label[:, m]
        expected.append(1 - float((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)))
    assert float(dice_of_maps(maps, label)) == pytest.approx(sum(expected) / 3)
    # Of one map it is the Dice of the two-class loss without its background.
    logits = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    settings = LossSettings(cross_entropy=0, dice=1, background=False)
    whole = build_loss(settings)(logits, label[:, 0].long())
    found = dice_of_maps(logits.softmax(1)[:, 1:], label[:, :1])
    assert float(found) == pytest.approx(float(whole))


# ------------------------------------------------------------------------------- LoAd's


def test_balanced_cross_entropy_is_the_weighted_sum_over_pixels() -> None:
    logits, target = _case(3, ignored=0.3)
    mean_pixels = torch.tensor([7.0, 2.0, 1.0])
    total = labelled = 0.0
    for image in range(len(target)):
        for row in range(target.shape[1]):
            for column in range(target.shape[2]):
                label = int(target[image, row, column])
                if label == IGNORE:
                    continue
                here = int((target[image] == label).sum())
                log_p = logits[image, :, row, column].log_softmax(0)[label]
                total -= float(mean_pixels[label]) / here * float(log_p)
                labelled += 1
    found = balanced_cross_entropy(logits, target, mean_pixels, IGNORE)
    assert float(found) == pytest.approx(total / labelled, rel=1e-12)


def test_balanced_cross_entropy_of_images_with_the_mean_number_of_pixels_is_plain() -> None:
    logits, _ = _case(2)
    target = torch.tensor([0, 1] * 10).reshape(1, 5, 4).repeat(2, 1, 1)
    found = balanced_cross_entropy(logits, target, torch.tensor([10.0, 10.0]))
    assert torch.allclose(found, functional.cross_entropy(logits, target))


def test_relaxations() -> None:
    logits = _case(4)[0].requires_grad_()
    soft = (logits / 3).softmax(1)
    assert torch.equal(relax(logits, "softmax", 3.0), soft)
    hard = relax(logits, "straight_through", 3.0)
    assert set(hard.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.argmax(1), logits.argmax(1))
    weights = torch.randn_like(soft)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    (found,) = torch.autograd.grad((hard * weights).sum(), logits)
    assert torch.allclose(found, expected)


def test_gumbel_samples_follow_the_softmax_at_temperature_one() -> None:
    """The class with the highest noisy logit is a draw from the softmax of the logits."""
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 200, 200)
    drawn = relax(logits, "gumbel", 20.0)
    assert torch.allclose(drawn.sum(1), torch.ones(1, 200, 200))
    shares = torch.bincount(drawn.argmax(1).flatten(), minlength=3) / 40_000
    assert torch.allclose(shares, logits[0, :, 0, 0].softmax(0), atol=0.01)
    assert drawn.max() < 0.8, "a temperature of 20 blurs"


@pytest.mark.parametrize("saturating", [False, True])
def test_fooling_loss_and_its_gradient(saturating: bool) -> None:
    logits = torch.tensor([-3.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    loss = fooling_loss(logits, saturating)
    probability = logits.detach().sigmoid()
    expected = (1 - probability).log() if saturating else -probability.log()
    assert float(loss) == pytest.approx(float(expected.mean()))
    (gradient,) = torch.autograd.grad(loss, logits)
    slope = -probability if saturating else probability - 1
    assert torch.allclose(gradient, slope / 3)
