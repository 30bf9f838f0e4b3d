"""Methods by name, their settings, and a user's own."""

from collections.abc import Iterator
from typing import Any

import betty.configs
import pytest
from betty.hypergradient import jvp_fn_mapping

from mlseg.hypergradients import (
    ConjugateGradients,
    Cotangents,
    Diagnostics,
    FiniteDifference,
    Hop,
    Method,
    MinimalResidual,
    Vector,
    names,
    register,
    resolve,
)
from mlseg.hypergradients.registry import METHODS
from mlseg.multilevel.config import Config, method_of
from mlseg.testing import programs
from mlseg.testing.programs import GRAPHS


def test_by_name_and_by_mapping() -> None:
    assert {"finite_difference", "identity", "cg", "unrolled"} <= set(names())
    assert resolve("finite_difference") == FiniteDifference()
    made = resolve({"method": "finite_difference", "epsilon": 0.1})
    assert made == FiniteDifference(epsilon=0.1)
    assert resolve(made) is made


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("identiy", "no hypergradient method 'identiy'; did you mean 'identity'?"),
        (
            {"method": "identity", "epsilon": 0.1},
            "identity: epsilon: unknown key; valid",
        ),
        (
            {"method": "finite_difference", "epsilon": 0.0},
            "finite_difference: epsilon: should be greater than 0, got 0.0",
        ),
        (
            {"method": "finite_difference", "scale": "none at all"},
            "finite_difference: scale: 'none at all' is none of ",
        ),
    ],
)
def test_mistakes_are_named(spec: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        resolve(spec)


class Nothing(Method):
    """A user's own method."""

    factor: float = 2.0

    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        return [None] * len(hop.inputs), {"seen": vector[0].sum()}


@pytest.fixture
def nothing() -> Iterator[None]:
    register("nothing")(Nothing)
    yield
    METHODS.remove("nothing")
    del jvp_fn_mapping["nothing"]


@pytest.mark.usefixtures("nothing")
def test_a_users_own_method_runs_by_name_and_reports() -> None:
    engine = programs.small(GRAPHS["two levels"], {"method": "nothing", "factor": 3.0})
    engine.iterate()
    assert not engine.top.gradient.any()
    assert "hypergradient/low_seen" in engine.top.metrics


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="are named 'identity': "):
        register("identity")(Nothing)


def test_the_log_gets_each_paths_norm_and_the_step() -> None:
    engine = programs.small(GRAPHS["two paths"], "finite_difference")
    engine.iterate()
    reported = {k for k in engine.top.metrics if k.startswith("hypergradient/")}
    assert reported == {
        "hypergradient/into_middle",
        "hypergradient/into_low",
        "hypergradient/via_middle",
        "hypergradient/via_low",
        *(
            f"hypergradient/{level}_{key}"
            for level in ("middle", "low")
            for key in ("step", "evaluations", "products", "seconds")
        ),
    }
    none = {"hypergradient/middle_products", "hypergradient/low_products"}
    assert all(float(engine.top.metrics[key]) > 0 for key in reported - none)


def test_a_problems_config_refuses_a_contradiction() -> None:
    """Betty's ``type`` is derived; a method of Betty's must not be dropped in silence."""
    assert Config(hypergradient="identity").type == "identity"
    assert Config(type="identity", hypergradient="identity").type == "identity"
    with pytest.raises(ValueError, match="type 'darts' is no method of mlseg"):
        Config(type="darts")
    with pytest.raises(ValueError, match="type 'cg' and hypergradient 'identity' disagree"):
        Config(type="cg", hypergradient="identity")
    with pytest.raises(ValueError, match=r"cg_iterations .*'method': 'cg', 'iterations': "):
        Config(type="cg", cg_iterations=3)


def test_bettys_config_names_bettys_method_where_there_is_one() -> None:
    assert method_of(betty.configs.Config(type="cg")) is None
    assert method_of(betty.configs.Config(type="minres")) == MinimalResidual()
    assert method_of(Config(type="cg")) == ConjugateGradients()
