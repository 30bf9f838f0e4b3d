"""Walks over modules are torch's own, in their order."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from mlseg.hypergradients.modules import parameters_of, submodules


def network() -> Any:
    shared = nn.Linear(2, 2)
    made: Any = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(shared, nn.BatchNorm1d(2)), shared)
    made.add_module("none", None)
    made[1].extra = nn.Parameter(made[0].bias.detach().clone())
    made[2].tied = made[0].weight
    return made


def test_every_module_and_parameter_once_and_in_order() -> None:
    made = network()
    assert submodules([made, made[1]]) == list(made.modules())
    found = parameters_of(made)
    assert [id(p) for p in found] == [id(p) for p in made.parameters()]
    assert len(found) == 7


def test_a_module_may_say_itself_what_its_parameters_are() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.hidden = nn.Linear(1, 1), nn.Linear(1, 1)

        def parameters(self, recurse: bool = True) -> Iterator[Any]:
            return self.seen.parameters(recurse)

    made = Half()
    assert parameters_of(made) == list(made.seen.parameters())


def test_a_module_below_may_hide_some() -> None:
    """A teacher, say, that no optimizer is to see."""

    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.hidden = nn.Linear(1, 1), nn.Linear(1, 1)

        def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for path, module in super().named_modules(*args, **kwargs):
                if module is not self.hidden:
                    yield path, module

    for made, count in ((Hiding(), 2), (nn.Sequential(Hiding(), nn.Linear(1, 1)), 4)):
        assert submodules([made]) == list(made.modules())
        assert [id(p) for p in parameters_of(made)] == [id(p) for p in made.parameters()]
        assert len(parameters_of(made)) == count
