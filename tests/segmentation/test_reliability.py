"""Reliability and intervals against other libraries, closed forms and plain loops."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from mlseg.segmentation import intervals
from mlseg.segmentation.reliability import BINS, Reliability

STEP = 2.0**-21
"""By which a summed probability is off at most."""


@pytest.mark.parametrize("classes", [2, 5])
def test_the_error_is_torchmetrics(classes: int) -> None:
    draw = torch.Generator().manual_seed(classes)
    found = torch.randn(3, classes, 9, 7, generator=draw).mul(2).softmax(1)
    target = torch.randint(0, classes, (3, 9, 7), generator=draw)
    own, theirs = Reliability(), MulticlassCalibrationError(classes, n_bins=BINS, norm="l1")
    for image, mask in zip(found, target, strict=True):  # batches add up
        own.update(image[None], image[None].argmax(1), mask[None])
    reference = theirs(found, target)
    assert own.compute()["ece"] == pytest.approx(float(reference), abs=2 * STEP + 1e-6)
    assert sum(own.compute()["pixels"]) == target.numel()


def test_a_threshold_chooses_whose_probability_counts() -> None:
    """Below one half the chosen class may be the less probable one."""
    foreground = torch.tensor([[[0.32, 0.08, 0.47, 0.97]]])
    found = torch.stack([1 - foreground, foreground], 1)
    labels = (foreground > 0.25).long()
    own = Reliability()
    own.update(found, labels, torch.tensor([[[1, 0, 0, 1]]]))
    filled = {
        place: (pixels, own.compute()["accuracy"][place])
        for place, pixels in enumerate(own.compute()["pixels"])
        if pixels
    }
    assert filled == {
        int(probability * BINS): (1, right)
        for probability, right in zip((0.32, 0.92, 0.47, 0.97), (1.0, 1.0, 0.0, 1.0), strict=True)
    }


def test_ignored_pixels_count_nowhere_and_no_pixel_is_no_error() -> None:
    own = Reliability(ignore_index=255)
    found = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    target = torch.full((2, 4, 4), 255)
    own.update(found, found.argmax(1), target)
    assert own.compute()["ece"] is None
    target[0, 0, 0] = 1
    own.update(found, found.argmax(1), target)
    assert sum(own.compute()["pixels"]) == 1
    assert Reliability().compute()["ece"] is None


def test_of_large_images_evenly_spaced_pixels_are_counted() -> None:
    foreground = torch.full((1, 1500, 1400), 0.8)
    own = Reliability()
    mask = torch.ones(1, 1500, 1400, dtype=torch.uint8)
    mask[:, 750:] = 0
    own.update(torch.stack([1 - foreground, foreground], 1), (foreground > 0.5).long(), mask)
    found = own.compute()
    assert 2**16 < sum(found["pixels"]) <= 2**18
    assert found["ece"] == pytest.approx(0.3, abs=1 / 300 + STEP)  # a row more or less


# ------------------------------------------------------------------------- intervals


def test_the_interval_of_a_mean_is_the_normal_one_for_many_values() -> None:
    """Half its width is 1.96 standard errors; its ends are drawn, R times."""
    values = np.random.default_rng(1).beta(4, 2, 500)
    error = values.std() / np.sqrt(len(values))
    low, high = intervals.of_mean(values) or (0.0, 0.0)
    # A quantile at p of R draws has the deviation sqrt(p (1 - p) / R) / density.
    density = np.exp(-(1.96**2) / 2) / np.sqrt(2 * np.pi)
    room = 5 * error * np.sqrt(0.025 * 0.975 / intervals.RESAMPLES) / density
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=room)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=room)
    assert intervals.of_mean(values) == (low, high), "the same every time"


def test_few_values() -> None:
    assert intervals.of_mean([]) is None
    assert intervals.of_mean([0.3]) is None
    assert intervals.of_mean([0.3, 0.3]) == pytest.approx((0.3, 0.3))
    assert intervals.of_mean([0.0, 1.0]) == (0.0, 1.0)


@pytest.mark.parametrize("number", [2, 7, 60])
def test_the_interval_of_a_pooled_score_is_that_of_a_plain_loop(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(number)
    confusion = draw.integers(0, 50, (number, 3, 3))
    confusion[:, 2] = 0  # a class that the truth never shows, though it is predicted
    found = []
    again = np.random.default_rng(0)
    for _ in range(intervals.RESAMPLES):
        chosen = confusion[again.integers(0, number, number)].sum(0)
        ious = [
            chosen[k, k] / (chosen[k].sum() + chosen[:, k].sum() - chosen[k, k]) for k in range(2)
        ]
        found.append(np.mean(ious))
    reference = np.quantile(found, (0.025, 0.975))
    assert intervals.of_pooled_miou(confusion) == pytest.approx(tuple(reference))
    assert intervals.of_pooled_miou(confusion[:1]) is None
    monkeypatch.setattr(intervals, "_AT_ONCE", 5 * number)
    assert intervals.of_pooled_miou(confusion) == pytest.approx(tuple(reference)), "in parts"
