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


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_empty_text_is_no_name_and_no_path(system: str) -> None:
    tree = config.load(CONFIGS / f"{system}.yaml")
    settings, _ = parse_run(tree)
    whole = settings.model_dump(mode="json")
    tried = 0
    for *above, key in places(whole):
        for empty in ("", " "):
            values = copy.deepcopy(whole)
            branch: Any = values
            for step in above:
                branch = branch[step]
            if not (branch[key] is None or isinstance(branch[key], str)):
                continue
            branch[key] = empty
            tried += 1
            with pytest.raises(UserError) as caught:
                parse_run(replace(tree, values=values))
            assert "\n" not in str(caught.value)
            assert str(key) in str(caught.value)
    assert tried > 60


@pytest.mark.parametrize("written", ["", " ", "# a comment"])
@pytest.mark.parametrize("key", ["init", "data.root", "segmentor.weights", "data.train"])
def test_nothing_behind_an_equals_sign(key: str, written: str) -> None:
    """An unset variable of a shell; null has to be said."""
    path = CONFIGS / "supervised_isic_small.yaml"
    with pytest.raises(UserError) as caught:
        parse_run(config.load(path, [f"{key}={written}"]))
    assert str(caught.value).startswith(f"command line: {key}: nothing stands behind the =;")
    parse_run(config.load(path, [f"{key}=null", f"{key}=~"]))
