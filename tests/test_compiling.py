"""A level's network by torch.compile: the same numbers, and one line where it can't be."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from resuming import check
from scaled import Lower, X, gradient, program
from tiny_files import write_image
from torch import Tensor, nn

from mlseg import Config, compiling, config, evaluate, export, predict, run
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


def test_a_graph_is_gone_through_twice_in_any_thread() -> None:
    """As the Stackelberg game does, and in another thread as on CUDA; once before for good."""
    module = Small()
    compiling.compile_module("lower", module, BACKEND)
    module(X).sum().backward()
    loss = module(X).square().sum()
    expected = torch.autograd.grad(loss, module.last.weight, retain_graph=True)[0]
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(torch.autograd.grad, loss, module.last.weight, retain_graph=True)
        assert torch.equal(again.result()[0], expected)


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


LEVELS_OF = {
    "segan": ("segmentor", "critic"),
    "load": ("pretraining", "generator", "discriminator"),
    "semi_supervised": ("segmentor", "partner"),
}


@pytest.mark.slow
@pytest.mark.parametrize("system", LEVELS_OF)
def test_a_run_of_every_system_is_scored_exported_and_gone_on_with(
    system: str, tmp_path: Path
) -> None:
    # Traced is enough for what isn't training.
    backend = BACKEND if system == "segan" else "eager"
    changes: dict[str, Any] = {f"problems.{n}.compile": backend for n in LEVELS_OF[system]}
    if system == "segan":
        changes["game"] = "stackelberg"  # whose critic is differentiated twice
    if system != "load":
        changes |= {"engine.iterations": 2, "engine.validate_every": 2}
    path, out = tiny.write_config(tmp_path / "tiny.yaml", system, changes), tmp_path / "run"
    assert run.main([str(path), "--out", str(out)]) == 0
    images = tmp_path / "images"
    write_image(images / "a.png", np.zeros((40, 33, 3), np.uint8))
    assert evaluate.main([str(out)]) == 0
    assert predict.main([str(out), str(images), "--out", str(tmp_path / "masks")]) == 0
    assert export.main([str(out), "--format", "torchscript", "--out", str(tmp_path / "m.ts")]) == 0
    assert run.main(["--resume", str(out), "engine.iterations=3"]) == 0
    assert run.main([str(path), "--dry-run=timed"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_by_the_default_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double: sums in another order, 1e-16 times a few hundred, over an epsilon of 1e-5."""
    # The common cache doesn't tell the kernels of one ATEN_CPU_CAPABILITY from another's.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    truth = gradient(DIFFERENCE, Small())
    assert gradient(DIFFERENCE, Small(), **compiled(True)) == pytest.approx(truth, rel=1e-7)
