"""Metrics against torchmetrics, the rules for empty masks, and invariances."""

import math
from collections.abc import Callable

import pytest
import torch
import torchmetrics.functional.classification as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlseg.errors import UserError
from mlseg.segmentation.metrics import SCORES, SegmentationMetrics, confusion_per_image

IGNORE = 255


def _maps(classes: int, seed: int, images: int = 3, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(classes, (images, 6, 5), generator=generator)
    target = torch.randint(classes, (images, 6, 5), generator=generator)
    hidden = torch.rand(target.shape, generator=generator) < ignored
    return prediction, target.masked_fill(hidden, IGNORE)


def _scores(prediction: Tensor, target: Tensor, classes: int = 2) -> dict[str, float]:
    metrics = SegmentationMetrics(classes, IGNORE)
    metrics.update(prediction, target)
    return metrics.compute()


@given(seed=st.integers(0, 10_000), ignored=st.sampled_from([0.0, 0.3]))
@settings(max_examples=20, deadline=None)
def test_binary_scores_agree_with_torchmetrics(seed: int, ignored: float) -> None:
    prediction, target = _maps(2, seed, ignored=ignored)
    metrics = SegmentationMetrics(2, IGNORE)
    metrics.update(prediction, target, ["a", "b", "c"])
    per_image = metrics.per_image()
    functions: dict[str, Callable[..., Tensor]] = {
        "jaccard": reference.binary_jaccard_index,
        "dice": reference.binary_f1_score,
        "accuracy": reference.binary_accuracy,
        "sensitivity": reference.binary_recall,
        "specificity": reference.binary_specificity,
        "precision": reference.binary_precision,
    }
    result = metrics.compute()
    for name, function in functions.items():
        values = [float(function(prediction[i], target[i], ignore_index=IGNORE)) for i in range(3)]
        for image, value in zip("abc", values, strict=True):
            assert math.isclose(per_image[image][name], value, abs_tol=1e-6)
        assert math.isclose(result[name], sum(values) / 3, abs_tol=1e-6)
        assert math.isclose(result[f"{name}_std"], float(torch.tensor(values).std()), abs_tol=1e-6)
        pooled = float(function(prediction, target, ignore_index=IGNORE))
        assert math.isclose(result[f"pooled_{name}"], pooled, abs_tol=1e-6)


@given(seed=st.integers(0, 10_000), classes=st.integers(3, 5), ignored=st.sampled_from([0.0, 0.3]))
@settings(max_examples=20, deadline=None)
def test_multiclass_scores_agree_with_torchmetrics(seed: int, classes: int, ignored: float) -> None:
    prediction, target = _maps(classes, seed, ignored=ignored)
    result = _scores(prediction, target, classes)
    matrix = reference.multiclass_confusion_matrix(prediction, target, classes, ignore_index=IGNORE)
    metrics = SegmentationMetrics(classes, IGNORE)
    metrics.update(prediction, target)
    assert torch.equal(metrics.confusion().sum(0), matrix)
    iou = reference.multiclass_jaccard_index(
        prediction, target, classes, average="none", ignore_index=IGNORE
    )
    for index in range(classes):
        assert math.isclose(result[f"iou_{index}"], float(iou[index]), abs_tol=1e-6)
    mean = reference.multiclass_jaccard_index(
        prediction, target, classes, average="macro", ignore_index=IGNORE
    )
    assert math.isclose(result["pooled_jaccard"], float(mean), abs_tol=1e-6)
    images = [
        float(
            reference.multiclass_jaccard_index(
                prediction[i], target[i], classes, ignore_index=IGNORE
            )
        )
        for i in range(len(target))
    ]
    assert math.isclose(result["jaccard"], sum(images) / len(images), abs_tol=1e-6)


@pytest.mark.parametrize(("hit", "expected"), [(65, 0.65), (64, 0.0), (100, 1.0), (0, 0.0)])
def test_thresholded_jaccard_is_zero_below_0_65(hit: int, expected: float) -> None:
    """The challenge's rule, per image; the mean over images comes after it."""
    target, prediction = torch.zeros(2, 1, 10, 10).long()
    target[:] = 1
    prediction.view(-1)[:hit] = 1
    metrics = SegmentationMetrics(2)
    metrics.update(prediction, target, ["a"])
    metrics.update(target, target, ["b"])
    assert metrics.per_image()["a"]["thresholded_jaccard"] == expected
    assert metrics.compute()["thresholded_jaccard"] == pytest.approx((expected + 1) / 2)
    assert "pooled_thresholded_jaccard" not in metrics.compute()


def test_distances_when_they_are_wanted() -> None:
    target = torch.zeros(2, 20, 20).long()
    target[:, 5:15, 5:15] = 1
    prediction = target.roll(3, 2)
    metrics = SegmentationMetrics(2, IGNORE, distances=True)
    metrics.update(prediction, target, ["a", "b"])
    metrics.update(torch.ones_like(target), torch.full_like(target, IGNORE), ["c", "d"])
    assert {image: v["hd95"] for image, v in metrics.per_image().items()} == {"a": 3, "b": 3}
    assert metrics.compute()["hd95"] == 3
    assert metrics.compute()["hd95_std"] == 0
    assert "hd95" not in _scores(prediction, target)


EMPTY, FULL = torch.zeros(1, 2, 2, dtype=torch.long), torch.ones(1, 2, 2, dtype=torch.long)
HALF = torch.tensor([[[0, 1], [0, 1]]])


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        (EMPTY, EMPTY, (1, 1, 1, 1, 1, 1, 1)),
        (HALF, EMPTY, (0, 0, 0.5, 0, 0.5, 0, 0)),
        (EMPTY, HALF, (0, 0, 0.5, 0, 1, 0, 0)),
        (FULL, FULL, (1, 1, 1, 1, 1, 1, 1)),
        (HALF, FULL, (0.5, 2 / 3, 0.5, 0.5, 0, 1, 0)),
        (FULL, EMPTY, (0, 0, 0, 0, 0, 0, 0)),
        (HALF, HALF, (1, 1, 1, 1, 1, 1, 1)),
    ],
)
def test_rules_for_empty_and_full_masks(
    prediction: Tensor, target: Tensor, expected: tuple[float, ...]
) -> None:
    result = _scores(prediction, target)
    assert tuple(result[name] for name in SCORES) == pytest.approx(expected)


@given(
    classes=st.integers(2, 4),
    seed=st.integers(0, 10_000),
    ignored=st.sampled_from([0.0, 0.5, 0.95]),
)
@settings(max_examples=40, deadline=None)
def test_always_finite_and_independent_of_batches_and_order(
    classes: int, seed: int, ignored: float
) -> None:
    prediction, target = _maps(classes, seed, images=4, ignored=ignored)
    prediction[0], target[0, 0, 0] = 0, 0
    whole = _scores(prediction, target, classes)
    assert all(0 <= value <= 1 for name, value in whole.items() if name != "images")
    parts = SegmentationMetrics(classes, IGNORE)
    for index in (3, 1, 0, 2):
        parts.update(prediction[index : index + 1], target[index : index + 1])
    assert parts.compute() == pytest.approx(whole)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    shuffled = _scores(
        prediction.reshape(4, 30)[:, order, None], target.reshape(4, 30)[:, order, None], classes
    )
    assert shuffled == pytest.approx(whole)


def test_image_of_ignored_pixels_is_left_out() -> None:
    metrics = SegmentationMetrics(2, IGNORE)
    metrics.update(HALF, torch.full_like(HALF, IGNORE), ["hidden"])
    with pytest.raises(UserError, match="ignore index"):
        metrics.compute()
    metrics.update(HALF, HALF, ["seen"])
    assert metrics.compute()["images"] == 1
    assert list(metrics.per_image()) == ["seen"]


def test_a_single_image_has_no_spread() -> None:
    result = _scores(HALF, FULL)
    assert all(result[f"{name}_std"] == 0 for name in SCORES)


def test_class_names_and_classes_that_never_occur() -> None:
    metrics = SegmentationMetrics(3, classes=["background", "road", "car"])
    metrics.update(HALF, HALF)
    result = metrics.compute()
    assert (result["iou_road"], result["iou_car"], result["pooled_jaccard"]) == (1, 1, 1)
    metrics.update(EMPTY, HALF)
    result = metrics.compute()
    assert result["iou_road"] == 0.5
    assert result["pooled_jaccard"] == pytest.approx((4 / 6 + 0.5) / 2)


def test_miou_is_over_the_classes_of_the_truth() -> None:
    metrics = SegmentationMetrics(4, classes=["background", "road", "car", "sky"])
    metrics.update(HALF * 2, HALF)  # a car where a road is
    assert metrics.shown() == ["background", "road"]
    result = metrics.compute()
    assert result["miou"] == pytest.approx(0.5)
    assert result["pooled_jaccard"] == pytest.approx(1 / 3)
    two = SegmentationMetrics(2)
    two.update(EMPTY, HALF)
    result = two.compute()
    assert result["miou"] == pytest.approx((result["iou_0"] + result["iou_1"]) / 2)


@pytest.mark.parametrize("distances", [False, True])
def test_scores_of_some_of_the_images(distances: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    found, truth = (torch.randint(3, (6, 5, 7), generator=generator) for _ in range(2))
    whole, part = (SegmentationMetrics(3, distances=distances) for _ in range(2))
    for start in (0, 2, 4):
        whole.update(found[start : start + 2], truth[start : start + 2])
    chosen = [1, 2, 5]
    part.update(found[chosen], truth[chosen], [str(n) for n in chosen])
    picked = whole.only({"1", "2", "5"})
    assert picked.compute() == part.compute()
    assert picked.per_image() == part.per_image()


def test_labels_outside_the_classes_are_reported() -> None:
    metrics = SegmentationMetrics(2)
    metrics.update(HALF, HALF.masked_fill(HALF == 1, IGNORE))
    with pytest.raises(UserError, match="2 mask pixels"):
        metrics.compute()
    counts, wrong = confusion_per_image(HALF - 5, HALF, 2)
    assert (int(counts.sum()), int(wrong)) == (0, 4)


def test_nothing_to_score() -> None:
    metrics = SegmentationMetrics(2)
    with pytest.raises(UserError, match="empty"):
        metrics.compute()
    metrics.update(HALF, HALF)
    metrics.reset()
    with pytest.raises(UserError, match="empty"):
        metrics.per_image()


@pytest.mark.parametrize(
    ("prediction", "ids"), [(HALF[0], None), (HALF[:, :1], None), (HALF, ["a", "b"])]
)
def test_mismatched_arguments(prediction: Tensor, ids: list[str] | None) -> None:
    with pytest.raises(ValueError, match=r"must both be|ids for"):
        SegmentationMetrics(2).update(prediction, HALF, ids)


def test_counts_have_no_limit_of_eight_bits() -> None:
    """Masks come as uint8; K^2 and pixel counts exceed it."""
    target = torch.full((1, 40, 40), 19, dtype=torch.uint8)
    counts, wrong = confusion_per_image(target, target, 20)
    assert int(counts[0, 19, 19]) == 1600
    assert int(wrong) == 0
    assert _scores(FULL.to(torch.uint8), FULL.to(torch.uint8))["jaccard"] == 1


def test_update_never_reads_from_the_device() -> None:
    """On the meta device any read of a value raises."""
    maps = torch.zeros(2, 8, 8, dtype=torch.long, device="meta")
    SegmentationMetrics(3, IGNORE).update(maps, maps)
