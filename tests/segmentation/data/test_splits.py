import hashlib
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlseg.errors import UserError
from mlseg.segmentation.data.splits import (
    Split,
    draw,
    fingerprint,
    manifest,
    official,
    seeded_order,
)

IDS = [f"ISIC_{index:07d}" for index in range(1194)]
pools = st.sets(st.text(min_size=1, max_size=6), min_size=3, max_size=60)


@given(pools, st.integers(0, 2**31), st.data())
def test_larger_splits_contain_smaller_ones_and_nothing_overlaps(
    pool: set[str], seed: int, data: st.DataObject
) -> None:
    test = data.draw(st.integers(0, len(pool) - 2))
    left = len(pool) - test
    train = data.draw(st.integers(1, left))
    val = data.draw(st.integers(0, left - train))
    smaller_train = data.draw(st.integers(1, train))
    smaller_val = data.draw(st.integers(0, val))
    large = draw(list(pool), train, val, test, seed)
    small = draw(sorted(pool), smaller_train, smaller_val, test, seed)
    assert (len(large.train), len(large.val), len(large.test)) == (train, val, test)
    assert set(small.train) <= set(large.train)
    assert set(small.val) <= set(large.val)
    assert small.test == large.test
    everything = large.train + large.val + large.test
    assert len(set(everything)) == len(everything)
    assert set(everything) <= pool


def test_the_papers_sizes_are_nested() -> None:
    splits = [draw(IDS, train, val, 594) for train, val in ((32, 8), (80, 20), (160, 40))]
    for small, large in pairwise(splits):
        assert set(small.train + small.val) < set(large.train + large.val)
        assert small.test == large.test


def test_the_order_is_that_of_sha256_of_seed_and_id() -> None:
    expected = sorted(IDS, key=lambda name: hashlib.sha256(f"3:{name}".encode()).hexdigest())
    assert seeded_order(IDS[::-1], 3) == expected


def test_an_added_id_does_not_reshuffle_the_others() -> None:
    before = seeded_order(IDS, 0)
    after = seeded_order([*IDS, "new"], 0)
    assert [name for name in after if name != "new"] == before


def test_seeds_differ() -> None:
    assert set(draw(IDS, 32, 8, 594, seed=0).train) != set(draw(IDS, 32, 8, 594, seed=1).train)


def test_defaults_are_four_to_one() -> None:
    split = draw(IDS[:100])
    assert (len(split.train), len(split.val), len(split.test)) == (64, 16, 20)
    assert len(draw(IDS[:100], train=32).val) == 8


def test_asking_for_more_than_there_is() -> None:
    with pytest.raises(UserError, match=r"set has 10 examples.*5 \+ 2 \+ 4 = 11"):
        draw(IDS[:10], 5, 2, 4, name="set")


def test_an_id_in_two_splits() -> None:
    with pytest.raises(UserError, match="'b' is in more than one place \\(train and test\\)"):
        Split(("a", "b"), (), ("b",))
    with pytest.raises(UserError, match="'x' is in more than one place"):
        official({"train": ["x", "y"], "val": ["z"], "test": ["x"]}, train=1)


def test_official_parts_are_kept_or_thinned_to_nested_subsets() -> None:
    parts = {"train": IDS[:50], "val": IDS[50:60], "test": IDS[60:90]}
    whole = official(parts)
    assert {name: sorted(ids) for name, ids in whole.as_dict().items()} == parts
    small, large = official(parts, 10, 2, 5), official(parts, 20, 4, 9)
    for name in parts:
        assert set(small.as_dict()[name]) < set(large.as_dict()[name]) < set(parts[name])


def test_validation_comes_from_the_training_part_where_there_is_no_official_one() -> None:
    split = official({"train": IDS[:50], "test": IDS[60:90]}, train=40)
    assert (len(split.train), len(split.val), len(split.test)) == (40, 10, 30)
    assert set(split.train + split.val) == set(IDS[:50])


def test_manifest_hash_depends_on_which_id_is_where_and_on_nothing_else() -> None:
    split = draw(IDS, 32, 8, 594)

    def made(split: Split, **changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "dataset": "isic2018",
            "how": "drawn",
            "seed": 0,
            "provenance": "real",
        }
        return manifest(split, **(settings | changes))

    written = made(split)
    assert written["hash"] == made(split, dataset="copy", seed=5)["hash"]
    assert written["hash"] == made(Split(split.train[::-1], split.val, split.test))["hash"]
    swapped = Split((split.val[0], *split.train[1:]), (split.train[0], *split.val[1:]), split.test)
    assert written["hash"] != made(swapped)["hash"]
    assert json.loads(json.dumps(written)) == written
    assert written["train"] == list(split.train)
    # The recipe, spelled out: any machine must come to this very value.
    assert fingerprint({"train": ["b", "a"], "test": []}) == (
        hashlib.sha256(b"[test]\n[train]\na\nb\n").hexdigest()
    )
