"""Settings that are made of a signature."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
import pytest

from mlseg.config import Settings, dump, load, parse
from mlseg.config import registry as registries
from mlseg.config.components import Component
from mlseg.config.registry import Registry
from mlseg.errors import UserError

SHOP: Registry[Any] = Registry("fruit", example="basket:Plum")


@SHOP.register("apple")
class Apple:
    def __init__(  # type: ignore[no-untyped-def]
        self,
        where: str,
        size: Annotated[int, pydantic.Field(ge=1)],
        ripe: bool = False,
        spots: tuple[int, int] = (1, 2),
        maker: Callable[[], None] | None = None,
        colour: str = None,  # type: ignore[assignment]  # noqa: RUF013, as many write it
        shape=lambda: None,
        anything=3,
    ) -> None:
        if size == 13:
            raise ValueError("size: thirteen brings bad luck")
        self.values = (where, size, ripe, spots, colour, anything)


@SHOP.register("free")
def free(where: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return where, more


@SHOP.register("pear")
class Pear(Settings):
    name: str = "pear"
    weight: float = 1.0

    def build(self, where: str, day: int = 0) -> tuple[str, float, int]:
        return where, self.weight, day


class FruitSettings(Component):
    registry: ClassVar[Registry[Any]] = SHOP
    given: ClassVar[int] = 1

    price: int = 0


class Basket(Settings):
    fruit: FruitSettings
    others: list[FruitSettings] = []


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "PLUGINS", "no_such_package")


def read(tmp_path: Path, line: str) -> FruitSettings:
    path = tmp_path / "c.yaml"
    path.write_text(f"fruit: {line}\n")
    return parse(Basket, load(path)).fruit


def test_what_a_config_says_reaches_the_constructor(tmp_path: Path) -> None:
    found = read(tmp_path, "{name: apple, size: 4, spots: [3, 4], price: 7}")
    assert found.price == 7
    assert found.model_dump() == {
        "name": "apple",
        "price": 7,
        "size": 4,
        "ripe": False,
        "spots": (3, 4),
        "maker": None,
        "colour": None,
        "anything": 3,
    }
    assert found.build("tree").values == ("tree", 4, False, (3, 4), None, 3)
    (tmp_path / "again.yaml").write_text(dump(Basket(fruit=found)))
    assert parse(Basket, load(tmp_path / "again.yaml")).fruit == found


def test_a_class_of_settings_builds_itself(tmp_path: Path) -> None:
    made = read(tmp_path, "{name: pear, weight: 2}").build("tree", day=5)
    assert made == ("tree", 2.0, 5)


def test_keywords_of_any_name(tmp_path: Path) -> None:
    assert read(tmp_path, "{name: free, x: 1}").build("tree") == ("tree", {"x": 1})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "{name: apple, size: 4, riep: true}",
            "fruit.riep: unknown key; did you mean 'fruit.ripe'?",
        ),
        ("{name: apple, size: 4, qq: 1}", "fruit.qq: unknown key; valid here: name, price, size, "),
        ("{name: apple, size: 0}", "fruit.size: should be greater than or equal to 1, got 0"),
        ("{name: apple, size: four}", "fruit.size: expected an integer, got the string 'four'"),
        ("{name: apple}", "fruit.size: missing; it must be set to an integer"),
        ("{name: apple, size: null}", "fruit.size: missing; it must be set to an integer"),
        ("{name: apple, size: 1, shape: round}", "fruit.shape: unknown key"),
        ("{name: aple}", "fruit.name: no fruit 'aple'; did you mean 'apple'?"),
        ("{size: 4}", "fruit.name: missing; it must be set to one of apple, free, pear, or a dott"),
        ("{name: [apple]}", "fruit.name: expected a string, got the list ['apple']"),
        ("apple", "fruit: expected a mapping, got the string 'apple'"),
        ("{name: pear, wieght: 1}", "fruit.wieght: unknown key; did you mean 'fruit.weight'?"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, line)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/c.yaml:1: ")


def test_within_a_list(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("fruit: {name: pear}\nothers:\n- {name: pear, wieght: 1}\n")
    with pytest.raises(UserError) as caught:
        parse(Basket, load(tmp_path / "c.yaml"))
    said = "c.yaml:3: others.0.wieght: unknown key; did you mean 'others.0.weight'?"
    assert said in str(caught.value)


def test_null_undoes_an_inherited_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("fruit: {name: apple, size: 2, ripe: true, weight: 1}\n")
    (tmp_path / "c.yaml").write_text("base: base.yaml\nfruit: {ripe: null, weight: null}\n")
    assert parse(Basket, load(tmp_path / "c.yaml")).fruit.model_dump()["ripe"] is False


def test_a_constructors_refusal_names_the_thing() -> None:
    with pytest.raises(UserError, match="fruit 'apple': size: thirteen brings bad luck"):
        FruitSettings(name="apple", size=13).build("tree")


def test_signatures_that_a_config_cant_serve() -> None:
    for thing, said in (
        (lambda where, price: None, "its parameter 'price' means something else in a config"),
        (lambda: None, "it takes 0 arguments, and the program gives it 1"),
        (lambda where, _hidden: None, "its parameter '_hidden' can't be set by a config"),
    ):
        SHOP.register("odd")(thing)
        with pytest.raises(pydantic.ValidationError, match=said):
            FruitSettings(name="odd")
        SHOP.remove("odd")
