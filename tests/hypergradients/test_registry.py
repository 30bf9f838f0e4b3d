"""Methods by name, their settings, and a user's own."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
import toys
from betty.hypergradient import jvp_fn_mapping
from torch import Tensor
from toys import GRAPHS

from mlseg.hypergradients import FiniteDifference, Hop, Method, Vector, names, register, resolve
from mlseg.hypergradients.registry import _METHODS
from mlseg.problems.config import Config


def test_by_name_and_by_mapping() -> None:
    assert names() == ["finite_difference", "identity"]
    assert resolve("finite_difference") == FiniteDifference()
    made = resolve({"method": "finite_difference", "epsilon": 0.1})
    assert made == FiniteDifference(epsilon=0.1)
    assert resolve(made) is made


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("identiy", "no hypergradient method 'identiy'; did you mean 'identity'?"),
        ({"method": "identity", "epsilon": 0.1}, "identity has no setting 'epsilon'"),
        ({"method": "finite_difference", "epsilon": 0.0}, "setting 'epsilon'"),
        ({"method": "finite_difference", "scale": "none at all"}, "setting 'scale'"),
    ],
)
def test_mistakes_are_named(spec: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        resolve(spec)


class Doubled(Method):
    """Twice nothing: a user's own method."""

    method: Literal["doubled"] = "doubled"

    def mixed_product(
        self, vector: Vector, hop: Hop
    ) -> tuple[Sequence[Tensor | None], dict[str, Tensor]]:
        return [None] * len(hop.inputs), {"seen": vector[0].sum()}


@pytest.fixture
def doubled() -> Iterator[None]:
    register(Doubled)
    yield
    del _METHODS["doubled"], jvp_fn_mapping["doubled"]


@pytest.mark.usefixtures("doubled")
def test_a_users_own_method_runs_by_name_and_reports() -> None:
    engine = toys.program(GRAPHS["two levels"], "doubled")
    engine.iterate()
    assert all(not g.any() for g in engine.top.gradient)
    assert "hypergradient/low_seen" in engine.top.metrics


def test_a_name_is_given_once() -> None:
    class Other(Method):
        method: Literal["identity"] = "identity"

    with pytest.raises(ValueError, match="'identity' is registered already"):
        register(Other)


def test_the_log_gets_each_paths_norm_and_the_step() -> None:
    engine = toys.program(GRAPHS["two paths"], "finite_difference")
    engine.iterate()
    reported = {k for k in engine.top.metrics if k.startswith("hypergradient/")}
    assert reported == {
        "hypergradient/into_middle",
        "hypergradient/into_low",
        "hypergradient/via_middle",
        "hypergradient/via_low",
        "hypergradient/middle_step",
        "hypergradient/low_step",
    }
    assert all(float(engine.top.metrics[key]) > 0 for key in reported)


def test_a_problems_config_refuses_a_contradiction() -> None:
    """Betty's ``type`` is derived; a method of Betty's must not be dropped in silence."""
    assert Config(hypergradient="identity").type == "identity"
    assert Config(type="identity", hypergradient="identity").type == "identity"
    with pytest.raises(ValueError, match=r"type 'cg'.*hypergradient"):
        Config(type="cg", cg_iterations=3)
