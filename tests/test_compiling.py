"""A level's network by torch.compile: the same numbers, and one line where it can't be."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from resuming import check
from scaled import Lower, X, gradient, program
from torch import Tensor, nn

from mlseg import Config, compiling, config
from mlseg.errors import RunError, UserError
from mlseg.hypergradients.registry import classes
from mlseg.problems.systems import load_system

BACKEND = "aot_eager"
"""Traces and differentiates as the default one, and needs no C++ compiler."""

DIFFERENCE = {"method": "finite_difference", "epsilon": 1e-5}
LEVELS = ("generator", "discriminator", "segmentor", "architecture")
SECOND_ORDER = sorted(n for n, cls in classes().items() if not cls.first_derivatives_alone)


class Small(nn.Module):
    """Convolutions with BatchNorm, in double."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last = nn.Linear(12, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x.reshape(-1, 1, 2, 2))).tanh()
        return self.last(hidden.flatten(1))


@pytest.fixture(autouse=True)
def _anew() -> Any:
    """What another test has compiled counts for nobody."""
    yield
    torch._dynamo.reset()


def compiled(backend: str | bool = BACKEND) -> dict[str, Any]:
    return {"compile": backend}


@pytest.mark.parametrize("method", [DIFFERENCE, "penalty", "evolution"], ids=str)
def test_a_hop_and_a_step_are_the_uncompiled_ones(method: Any) -> None:
    """In double: sums in another order, 1e-16 times a few hundred, over an epsilon of 1e-5."""
    engines = [program(method, Small(), **c) for c in ({}, compiled())]
    for engine in engines:
        engine.iterate()
    plain, other = engines
    assert compiling.is_compiled(other.lower.module)
    assert not compiling.is_compiled(plain.lower.module)
    assert other.upper.gradients == pytest.approx(plain.upper.gradients, rel=1e-7)
    for (key, one), two in zip(
        plain.lower.module.state_dict().items(),
        other.lower.module.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14, msg=key)


def test_a_copy_is_not_compiled() -> None:
    engine = program(DIFFERENCE, Small(), **compiled())
    engine.iterate()
    module = engine.lower.module
    other = copy.deepcopy(module)
    assert not compiling.is_compiled(other)
    torch.testing.assert_close(other.eval()(X), module.eval()(X), rtol=1e-12, atol=1e-14)


def test_hooks_that_come_later_run() -> None:
    engine = program(DIFFERENCE, Small(), **compiled())
    engine.iterate()
    seen = []
    engine.lower.module.last.register_forward_hook(lambda *_: seen.append(1))
    engine.lower.module(X)
    assert seen


@pytest.mark.parametrize("method", SECOND_ORDER)
def test_methods_with_second_derivatives_are_refused_before_any_work(method: str) -> None:
    with pytest.raises(
        UserError, match=rf"'lower': compile: .*{method} .*problems\.lower\.compile"
    ):
        program(method, Small(), **compiled())


def test_with_forward_mode_too() -> None:
    with pytest.raises(UserError, match=r"compile: .*identity takes second derivatives"):
        program({"method": "identity", "mode": "forward_over_reverse"}, Small(), **compiled())


class Through(Lower):
    """Its loss is differentiated twice through the upper level's network."""

    def training_step(self, batch: Any) -> Any:
        return (self.upper.module(self(batch[0])) ** 2).mean()


def test_the_network_of_another_level_is_refused_at_the_first_hop() -> None:
    engine = program("identity", Small(), lower=Through)
    compiling.compile_module("upper", engine.upper.module, BACKEND)
    with pytest.raises(UserError, match=r"'lower': a compiled module .*compile of its level"):
        engine.iterate()


class Apart(Lower):
    def training_step(self, batch: Any) -> Any:
        module = self.module
        return ((module.last.weight * self.upper.module.weight) ** 2).sum()


def test_a_network_that_is_never_called_is_refused() -> None:
    with pytest.raises(UserError, match="'lower': compile: its network is never called"):
        program(DIFFERENCE, Small(), lower=Apart, **compiled()).iterate()


class Counting(Small):
    """Whose every pass is another program."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x) * self.passes


def test_a_network_that_is_compiled_anew_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiling._SETTINGS, "recompile_limit", 3)
    call = Counting()
    compiling.compile_module("lower", call, BACKEND)
    for _ in range(3):
        call(X)
    with pytest.raises(RunError, match=r"'lower': compile: its network is called in more than"):
        call(X)


def test_backends_are_known() -> None:
    match = r"compile 'indoctor': choose true, false or .*inductor"
    with pytest.raises(ValueError, match=match):
        Config(compile="indoctor")
    wrong = tiny.values("supervised", {"problems.segmentor.compile": "indoctor"})
    with pytest.raises(UserError, match=r"problems\.segmentor\.compile.*" + match):
        config.parse(load_system("supervised").settings, config.Tree(wrong, source="a.yaml"))


def test_without_a_compiler_and_other_failures() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    for error, match in (
        (InvalidCxxCompiler(), r"there is no working C\+\+ compiler; install one"),
        (RuntimeError("no such kernel"), r"torch can't compile its network \(no such kernel\)"),
    ):

        def broken(graph: Any, inputs: Any, error: Exception = error) -> Any:
            raise error

        module = Small()
        compiling.compile_module("lower", module, broken)
        with pytest.raises(RunError, match=rf"'lower': compile: {match}.*problems\.lower\.compile"):
            module(X)


def test_a_supervised_run_and_its_dry_run(tmp_path: Path) -> None:
    from mlseg.dry_run import dry_run

    changes = {"problems.segmentor.compile": BACKEND}
    dry_run(tiny.build("supervised", changes))
    logs = []
    for name, more in (("plain", {}), ("compiled", changes)):
        engine = tiny.build("supervised", more, tmp_path / name)
        engine.run()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    assert compiling.is_compiled(engine.problems[0].module)


@pytest.mark.slow
def test_e2eaug_with_all_levels_compiled_resumes_exactly(tmp_path: Path) -> None:
    changes: dict[str, Any] = {f"problems.{level}.compile": BACKEND for level in LEVELS}
    changes |= {"gan.pretrain": 1, "engine.iterations": 2, "engine.checkpoint_every": 1}
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, [2], "saved")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_by_the_default_backend() -> None:
    """In double: sums in another order, 1e-16 times a few hundred, over an epsilon of 1e-5."""
    truth = gradient(DIFFERENCE, Small())
    assert gradient(DIFFERENCE, Small(), **compiled(True)) == pytest.approx(truth, rel=1e-7)
