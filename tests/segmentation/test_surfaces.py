"""HD95 and NSD against distance transforms, and their rules for empty masks and edges."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt, gaussian_filter

from mlseg.segmentation.surfaces import Apart, apart, classes_apart

Mask = NDArray[np.bool_]


def blobs(seed: int, shape: tuple[int, int] = (40, 56), share: float = 0.3) -> Mask:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 4)
    return noise > np.quantile(noise, 1 - share)


def hd95(prediction: Mask, target: Mask) -> float:
    return apart(prediction, target).hd95


def by_distance_transform(prediction: Mask, target: Mask) -> Apart:
    """Another algorithm: distances to the nearest boundary pixel from a transform of the image."""
    boundaries = [mask ^ binary_erosion(mask) for mask in (prediction, target)]
    there, back = (distance_transform_edt(~to)[of] for of, to in (boundaries, boundaries[::-1]))
    met = int((there <= 2).sum() + (back <= 2).sum())
    furthest = max(np.percentile(there, 95), np.percentile(back, 95))
    return Apart(float(furthest), met / (len(there) + len(back)))


@given(seed=st.integers(0, 10_000), shift=st.integers(0, 5), share=st.floats(0.05, 0.9))
@settings(max_examples=30, deadline=None)
def test_agrees_with_distance_transforms(seed: int, shift: int, share: float) -> None:
    target = blobs(seed, share=share)
    prediction = np.roll(blobs(seed + shift, share=share), shift, 1)
    assert apart(prediction, target) == pytest.approx(by_distance_transform(prediction, target))


def test_known_distances() -> None:
    target = np.zeros((50, 60), bool)
    target[10:30, 10:30] = True
    assert hd95(target, target) == 0
    assert hd95(np.roll(target, 7, 1), target) == 7
    assert [apart(np.roll(target, by, 0), target).nsd for by in (0, 2)] == [1, 1]
    # All boundaries of a square grown by two lie two outwards; the corners are cut off.
    grown = binary_dilation(target, iterations=2)
    assert hd95(grown, target) == 2
    # One pixel far away is within the 5 % that the percentile leaves out.
    outlier = target.copy()
    outlier[49, 59] = True
    assert hd95(outlier, target) == 0


def test_a_region_at_the_images_edge_has_its_boundary_there() -> None:
    whole = np.ones((20, 20), bool)
    left = whole.copy()
    left[:, 10:] = False
    # The right half's edge pixels are up to ten columns from the left half.
    assert apart(left, whole) == pytest.approx(by_distance_transform(left, whole))
    assert hd95(left, whole) > 8


def test_empty_masks() -> None:
    empty, some = np.zeros((30, 40), bool), blobs(0, (30, 40))
    assert hd95(empty, empty) == 0
    assert hd95(empty, some) == hd95(some, empty) == math.hypot(30, 40) == 50
    assert [apart(*pair).nsd for pair in ((empty, empty), (empty, some), (some, empty))] == [
        1,
        0,
        0,
    ]


def test_several_classes_are_averaged_over_those_that_occur() -> None:
    target = np.zeros((30, 40), np.uint8)
    target[5:15, 5:15], target[20:25, 20:35] = 1, 2
    prediction = np.roll(target, 3, 1)
    single = [apart(prediction == k, target == k) for k in range(3)]
    assert classes_apart(prediction, target, 5) == pytest.approx(np.mean(single, 0))
    assert classes_apart((prediction == 1) * 1, (target == 1) * 1, 2).hd95 == 3
    # Ignored pixels are nobody's.
    hidden = target.copy()
    hidden[:, :20] = 255
    seen = [apart((prediction == k) & (hidden != 255), hidden == k) for k in (0, 2)]
    assert classes_apart(prediction, hidden, 3, 255) == pytest.approx(np.mean(seen, 0))
    assert classes_apart(prediction, np.full_like(target, 255), 3, 255) == (0, 1)
