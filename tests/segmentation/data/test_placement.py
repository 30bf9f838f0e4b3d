import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlseg.segmentation.data import PADDING, padded, placed, to_float, to_uint8

SIDE = st.integers(1, 3000)
SHAPE = st.tuples(SIDE, SIDE)


@pytest.mark.parametrize(
    ("native", "size", "expected"),
    [
        ((375, 500), (513, 513), (375, 500)),  # it fits
        ((500, 375), (513, 513), (500, 375)),
        ((240, 320), (240, 320), (240, 320)),
        ((1024, 2000), (512, 1000), (512, 1000)),  # half
        ((100, 100), (36, 48), (36, 36)),  # the height binds
        ((100, 300), (90, 60), (20, 60)),  # the width does
        ((7, 5), (5, 5), (5, 4)),  # 5 * 5 / 7 = 3.57
        ((30, 31), (40, 21), (20, 21)),  # 30 * 21 / 31 = 20.3
        ((1, 1000), (10, 10), (1, 10)),  # never without a pixel
    ],
)
def test_an_image_is_shrunk_only_where_it_does_not_fit(
    native: tuple[int, int], size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert placed(native, size, "pad") == expected
    assert placed(native, size, "stretch") == size


@given(SHAPE, SHAPE)
def test_an_image_keeps_its_shape_and_stays_within(
    native: tuple[int, int], size: tuple[int, int]
) -> None:
    height, width = placed(native, size, "pad")
    assert 1 <= height <= min(native[0], size[0])
    assert 1 <= width <= min(native[1], size[1])
    assert (height, width) == native or height == size[0] or width == size[1]
    # The side that doesn't bind is within half a pixel of the shape, or is the single pixel left.
    assert abs(height * native[1] - width * native[0]) <= max(native) / 2 or 1 in (height, width)


def test_padding_comes_to_the_right_and_below() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    found = padded(array, (3, 5), 99)
    assert found.dtype == np.uint8
    assert np.array_equal(found[:, :2, :3], array)
    assert (found[:, 2:] == 99).all()
    assert (found[:, :, 3:] == 99).all()
    assert padded(array, (2, 3), None) is array


def test_no_grey_is_nearer_to_zero() -> None:
    greys = to_float(torch.arange(256, dtype=torch.uint8)).abs()
    assert float(greys[PADDING]) == pytest.approx(float(greys.min()), rel=1e-4)
    assert to_uint8(torch.zeros(1)) == PADDING
