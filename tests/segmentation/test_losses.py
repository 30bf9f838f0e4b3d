"""Losses against segmentation-models-pytorch, closed forms, and finite differences."""

import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from mlseg.config import Settings
from mlseg.segmentation.distances import squared_distance
from mlseg.segmentation.losses import LossSettings, build_loss

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


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 0.0)])
def test_tversky_agrees_with_smp(weights: tuple[float, float]) -> None:
    logits, target = _case(3)
    false_positives, false_negatives = weights
    ours = build_loss(
        _only(
            tversky=1.0,
            smooth=1.0,
            false_positives=false_positives,
            false_negatives=false_negatives,
        )
    )
    expected = smp.losses.TverskyLoss(
        "multiclass", alpha=false_positives, beta=false_negatives, smooth=1.0
    )
    torch.testing.assert_close(ours(logits, target), expected(logits, target))


def test_tversky_of_equal_weights_is_dice() -> None:
    logits, target = _case(4)
    dice = build_loss(_only(dice=1.0, smooth=2.0))(logits, target)
    half = _only(tversky=1.0, smooth=1.0, false_positives=0.5, false_negatives=0.5)
    torch.testing.assert_close(build_loss(half)(logits, target), dice)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_the_focal_term_agrees_with_torchvision(gamma: float) -> None:
    """Of two classes: the softmax of (0, z) is the sigmoid of z."""
    logits, target = _case(2)
    ours = build_loss(_only(focal=1.0, gamma=gamma))(logits, target)
    alone = logits[:, 1] - logits[:, 0]
    expected = sigmoid_focal_loss(alone, target.double(), alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(ours, expected)


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.05, 0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_distances_are_scipys(seed: int, share: float) -> None:
    inside = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(seed)) < share
    found = squared_distance(inside)
    for mine, mask in zip(found, inside, strict=True):
        if not mask.any():
            assert mine.isinf().all()
            continue
        expected = distance_transform_edt(~mask.numpy())
        # Squares of whole numbers: exact in single precision.
        assert torch.equal(mine, torch.from_numpy((expected**2).round()).float())


@pytest.mark.parametrize("background", [True, False])
def test_the_boundary_term_by_its_formula(background: bool) -> None:
    logits, target = _case(3, ignored=0.2)
    target[1] = torch.where(target[1] == 2, 0, target[1])  # the second image doesn't show class 2
    probability, valid = logits.softmax(1), target != IGNORE
    total, classes = 0.0, range(0 if background else 1, 3)
    for image in range(2):
        for index in classes:
            region = (target[image] == index).numpy()
            if not region.any():
                continue
            inner, outer = distance_transform_edt(region), distance_transform_edt(~region)
            signed = torch.from_numpy(np.where(region, 1 - inner, outer))
            total += float((signed * probability[image, index] * valid[image]).sum())
    expected = total / len(classes) / int(valid.sum())
    settings = _only(cross_entropy=1.0, boundary=0.5, background=background)
    loss = build_loss(settings, IGNORE)(logits, target)
    loss = loss - build_loss(_only(cross_entropy=1.0), IGNORE)(logits, target)
    # Distances are single.
    assert float(loss) == pytest.approx(0.5 * expected, rel=1e-6)


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
    terms = {"dice": 1.0, "jaccard": 1.0, "tversky": 1.0, "focal": 1.0, "boundary": 1.0}
    weights = LossSettings.model_validate({**terms, "smooth": smooth})
    loss = build_loss(weights, IGNORE)(logits, torch.full_like(target, IGNORE))
    assert float(loss) == 0
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert not gradient.any()
    assert torch.autograd.grad(gradient.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("term", ["cross_entropy", "dice", "jaccard", "tversky", "focal"])
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
    terms = {"dice": 1.0, "jaccard": 1.0, "tversky": 1.0, "focal": 1.0, "gamma": 0.5}
    weights = LossSettings.model_validate({**terms, "smooth": 0.0})
    loss = build_loss(weights)(logits, torch.zeros(1, 2, 2, dtype=torch.long))
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert gradient.isfinite().all()
    assert torch.autograd.grad(gradient.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize(
    "values",
    [
        {"cross_entropy": 0.0},
        {"cross_entropy": 0.0, "boundary": 1.0},
        {"dice": -1.0},
        {"smooth": -1.0},
        {"dice": math.inf},
        {"x": 1},
        {"tversky": 1.0, "false_positives": 0.0, "false_negatives": 0.0},
    ],
)
def test_settings_refuse(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"above 0|greater than|finite|Extra"):
        LossSettings.model_validate(values)
    assert issubclass(LossSettings, Settings)


def test_nothing_is_read_from_the_device() -> None:
    """On the meta device any read of a value raises."""
    with torch.device("meta"):
        logits = torch.empty(2, 3, 4, 4, requires_grad=True)
        target = torch.empty(2, 4, 4, dtype=torch.long)
        terms = {"dice": 1.0, "jaccard": 1.0, "tversky": 1.0, "focal": 1.0, "boundary": 1.0}
        loss = build_loss(LossSettings.model_validate(terms), IGNORE)(logits, target)
        loss.backward()
    assert loss.shape == ()
