"""Which keys of two configs differ."""

from typing import Any

import numpy as np
import pytest
import torch

from mlseg import config


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(2),
        [0.5, torch.zeros(2)],
        {"a": [torch.zeros(2)]},
        np.zeros(2),
        [np.zeros(2)],
        {1},
    ],
    ids=str,
)
def test_what_is_not_plain_differs_from_everything(odd: Any) -> None:
    """As the config of a damaged checkpoint may hold."""
    for now in (odd, [0.5, 0.9], None, 1.0, {"a": [1]}):
        assert config.differences({"key": odd}, {"key": now})


def test_numbers_and_lists_that_are_the_same_do_not_differ() -> None:
    plain = {"a": [1, 2.0, None, {"b": (3, "c")}], "d": True}
    assert not config.differences(plain, {"a": (1.0, 2, None, {"b": [3, "c"]}), "d": True})
    assert config.differences(plain, {**plain, "a": [1, 2.0, None]}) == ["a"]
