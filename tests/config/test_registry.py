"""Registries: by name, by dotted path, and what is said when there is nothing there."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlseg.config import registry as registries
from mlseg.config.registry import Registry, import_module
from mlseg.errors import UserError

FRUITS = """
from shop import FRUITS

@FRUITS.register("pear")
def pear(): ...
"""


class Fruit:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def fruits(monkeypatch: pytest.MonkeyPatch) -> Registry[Callable[[], Any]]:
    monkeypatch.setattr(registries, "PLUGINS", "no_such_package")
    return Registry("fruit", example="basket:Plum")


def test_what_is_registered_is_returned_unchanged(fruits: Registry[Any]) -> None:
    class Apple: ...

    assert fruits.register("apple")(Apple) is Apple
    assert fruits.get("apple") is Apple
    assert fruits.names() == ["apple"]
    assert "apple" in fruits
    assert "pear" not in fruits


def test_an_unknown_name(fruits: Registry[Any]) -> None:
    fruits.register("apple")(Fruit)
    fruits.register("medlar")(Fruit)
    with pytest.raises(UserError) as caught:
        fruits.get("aple")
    assert str(caught.value) == (
        "no fruit 'aple'; did you mean 'apple'? (there are apple, medlar, or a dotted path such "
        "as basket:Plum)"
    )


def test_a_name_taken_twice(fruits: Registry[Any]) -> None:
    def one() -> None: ...

    def other() -> None: ...

    fruits.register("apple")(one)
    fruits.register("apple")(one)  # its module was loaded again
    with pytest.raises(ValueError, match=r"two of the kind fruit are named 'apple'") as caught:
        fruits.register("apple")(other)
    assert f"{__name__}:test_a_name_taken_twice.<locals>.one" in str(caught.value)
    assert f"{__name__}:test_a_name_taken_twice.<locals>.other" in str(caught.value)


def test_objects_without_a_place_of_their_own_have_that_of_their_entry() -> None:
    fruits: Registry[Fruit] = Registry("fruit", base=Fruit, example="basket:Plum")
    fruits.register("apple")(Fruit())
    with pytest.raises(ValueError, match=rf"{__name__}, line \d+ and {__name__}, line \d+"):
        fruits.register("apple")(Fruit())


@pytest.mark.parametrize("name", ["", "a:b"])
def test_what_is_no_name(fruits: Registry[Any], name: str) -> None:
    with pytest.raises(ValueError, match="is no name"):
        fruits.register(name)


@pytest.mark.parametrize("thing", [3, int, Fruit])
def test_a_base_is_required(thing: Any) -> None:
    numbers: Registry[Any] = Registry("number", base=(float, Fruit), example="basket:Plum")
    if thing is Fruit:
        assert numbers.register("fruit")(thing) is thing
        return
    with pytest.raises(ValueError, match=r"must be a builtins.float or a .*Fruit"):
        numbers.register("number")(thing)


def test_packages_are_searched_one_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those at the back, the plug-ins and another library's only for what is not found before."""
    (folder / "shop.py").write_text(
        "from mlseg.config.registry import Registry\n"
        "FRUITS = Registry('fruit', packages=['one', 'two'], example='x:y')\n"
    )
    for package, name in (("one", "apple"), ("two", "pear"), ("plugins", "plum")):
        (folder / package / "deep").mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
        (folder / package / "deep" / "__init__.py").write_text("")
        (folder / package / "deep" / "fruit.py").write_text(FRUITS.replace("pear", name))
    monkeypatch.setattr(registries, "PLUGINS", "plugins")
    fruits: Registry[Any] = import_module("shop").FRUITS
    asked = []

    @fruits.source
    def others() -> dict[str, Any]:
        asked.append(1)
        return {"quince": Fruit, "plum": Fruit}

    assert fruits.get("apple").__name__ == "apple"
    assert "two" not in sys.modules
    assert fruits.get("plum").__name__ == "plum"
    assert not asked
    assert fruits.get("quince") is Fruit
    assert fruits.names() == ["apple", "pear", "plum", "quince"]


class TestDottedPaths:
    def test_from_the_working_directory(self, folder: Path, fruits: Registry[Any]) -> None:
        (folder / "basket.py").write_text("class Plum:\n    class Stone: ...\n")
        assert fruits.get("basket:Plum").__name__ == "Plum"
        assert fruits.get("basket:Plum.Stone").__name__ == "Stone"

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            (
                "basket:Plums",
                "fruit 'basket:Plums': basket has no 'Plums'; did you mean basket:Plum?",
            ),
            ("basket:", "basket has no ''"),
            ("basket:Plum.Leaf", "basket has no 'Plum.Leaf'"),
            ("basket:number", "fruit 'basket:number': it must be a class or a function"),
            ("baskets:Plum", "can't import 'baskets' (there is no module 'baskets' here"),
            ("basket.plum:Plum", "can't import 'basket.plum'"),
            (":Plum", "fruit ':Plum': can't import ''"),
            (".basket:Plum", "can't import '.basket'"),
            ("needy:Plum", "can't import 'needy' (No module named 'rare')"),
            ("broken:Plum", "can't import 'broken' (invalid syntax (broken.py, line 2))"),
            ("raising:Plum", "raising.py:3: division by zero)"),
        ],
    )
    def test_that_lead_nowhere(
        self, folder: Path, fruits: Registry[Any], path: str, expected: str
    ) -> None:
        (folder / "basket.py").write_text("class Plum: ...\nnumber = 3\n")
        (folder / "needy.py").write_text("import rare\n")
        (folder / "broken.py").write_text("x = 1\nclass class\n")
        (folder / "raising.py").write_text("\nx = 0\ny = 1 / x\n")
        with pytest.raises(UserError) as caught:
            fruits.get(path)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
