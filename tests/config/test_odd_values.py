"""Whatever stands in the place of a config's value, it is taken or refused in one line."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlseg import config
from mlseg.errors import UserError
from mlseg.problems.systems import parse_run

CONFIGS = Path(__file__).parents[2] / "configs"
SYSTEMS = ("e2eaug_isic_small", "segan_isic_small", "load_camvid_small", "dct_isic_small")
ODD: tuple[Any, ...] = ({"name": {}}, [[1]], None, 10**400)


def places(values: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all values in a tree."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*above, key))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_value_of_another_kind(system: str) -> None:
    tree = config.load(CONFIGS / f"{system}.yaml")
    settings, _ = parse_run(tree)
    whole = settings.model_dump(mode="json")
    refused: list[str] = []
    for *above, key in places(whole):
        for odd in ODD:
            values = copy.deepcopy(whole)
            branch: Any = values
            for step in above:
                branch = branch[step]
            branch[key] = copy.deepcopy(odd)
            try:
                parse_run(replace(tree, values=values))
            except UserError as error:
                refused.append(str(error))
    assert len(refused) > 100
    assert not [text for text in refused if "\n" in text]
