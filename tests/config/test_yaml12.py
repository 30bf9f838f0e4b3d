"""YAML 1.2: what is written is read back as the same."""

import math
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from yaml_texts import text

from mlseg.config import yaml12


@given(st.recursive(text | st.integers() | st.booleans() | st.none() | st.floats(), st.lists))
def test_plain_values_survive_yaml(value: Any) -> None:
    def same(one: Any, other: Any) -> bool:
        if isinstance(one, list):
            return len(one) == len(other) and all(map(same, one, other))
        if isinstance(one, float) and math.isnan(one):
            return isinstance(other, float) and math.isnan(other)
        return type(one) is type(other) and one == other

    for write in (yaml12.write, yaml12.write_line):
        assert same(value, yaml12.read(write(value), "text")[0])


def test_nested_values_in_one_line() -> None:
    value = {"name": "deeplabv3plus", "options": {"stride": 16, "rates": list(range(60))}}
    text = yaml12.write_line({"segmentor": value, "loss": None})
    rates = ", ".join(map(str, range(60)))
    nested = f"{{name: deeplabv3plus, options: {{stride: 16, rates: [{rates}]}}}}"
    assert text == f"{{segmentor: {nested}, loss: null}}"
    assert yaml12.write_line(0.05) == "0.05"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_way_to_write_a_float(value: float) -> None:
    for written in (repr(value), f"{value:e}", f"{value:E}", f"{value:+.17g}"):
        read, _ = yaml12.read(written, "text")
        assert float(read) == float(written)


def test_pyyaml_itself_is_left_alone() -> None:
    assert yaml.safe_load("[1e-5, no]") == ["1e-5", False]
