"""Every script in benchmarks/ still works: each runs here, as small as its flags allow.

What they measure at this size means nothing; that they come to their end, and report on all that
they were told to measure, is what is tested. Some check their own work besides: that two sides
agree, that a killed run ends as an untouched one.
"""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from commanding import one_line, parsed, train

from mlseg import config
from mlseg.commands import as_script
from mlseg.errors import RunError, UserError
from mlseg.problems.systems import parse_run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = BENCHMARKS.parent / "configs" / "e2eaug_isic_small.yaml"
LESIONS = ("data.name=synthetic_lesions", "data.train=4", "data.val=2", "data.test=2")
NETWORKS = (
    "data.image_size=32",
    "segmentor.channels=2",
    "segmentor.levels=2",
    "generator.channels=2",
    "generator.levels=3",
    "discriminator.channels=2",
    "discriminator.layers=2",
)
EVERY_PART = ("data", "optimizer", "rest", "**iteration**")

Script = Callable[..., str]


def rows(text: str) -> list[list[str]]:
    """The cells of every line of every table, without heads."""
    tables = re.findall(r"^\|.*\n\|(?:---\|)+-*\n?((?:\|.*\n)*)", text, re.MULTILINE)
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for table in tables
        for line in table.splitlines()
    ]


def columns(text: str, *numbers: int) -> list[tuple[str, ...]]:
    """Some columns of :func:`rows`."""
    return [tuple(row[number] for number in numbers) for row in rows(text)]


def test_every_script_is_here() -> None:
    scripts = {p.stem for p in BENCHMARKS.glob("*.py") if "__main__" in p.read_text()}
    here = Path(__file__)
    tested = set(re.findall(r'script\(\s*"(\w+)"', here.read_text()))
    elsewhere = {p.stem.removeprefix("test_") for p in here.parent.glob("test_*.py") if p != here}
    assert scripts == tested | elsewhere


def test_every_script_says_mistakes_in_a_line() -> None:
    """But for one whose parts say them, and one that takes nothing to be mistaken in."""
    for path in BENCHMARKS.glob("*.py"):
        if "__main__" in path.read_text() and path.stem not in ("faults", "betty_programs"):
            assert path.read_text().endswith("    raise SystemExit(as_script(main))\n"), path


@pytest.mark.parametrize("name", ["kernels", "iteration"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{configs}/compare_ridge.yaml"], "system: missing"),
        (["nosuch.yaml"], "nosuch.yaml: no such file"),
        (["{configs}/supervised_isic_small.yaml", "--device", "tpu"], "device: 'tpu' is none"),
        (["{configs}/supervised_isic_small.yaml", "--device", "meta"], "'meta' isn't supported"),
        (["{configs}/supervised_isic_small.yaml", "nosuch=1"], "nosuch: unknown key"),
        (["{configs}/supervised_isic_small.yaml", "--iterations", "0"], "no whole number from 1"),
        ([""], "an empty name"),
    ],
)
def test_a_mistake(
    name: str,
    given: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = BENCHMARKS / f"{name}.py"
    words = [word.format(configs=SMALL.parent) for word in given]
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.syspath_prepend(BENCHMARKS)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert said in shown.err.splitlines()[-1]
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (UserError("no such key"), 2, "error: no such key"),
        (RunError("a full disk"), 1, "failed: a full disk"),
        (MemoryError("two TiB."), 1, "failed: out of memory (two TiB); lower a batch_size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure(
    failure: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(failure: BaseException) -> None:
        raise failure

    assert as_script(lambda: fails(failure)) == code
    assert one_line(capsys).startswith(said)
    with pytest.raises(SystemExit):  # of a command line that can't be read
        as_script(lambda: fails(SystemExit(2)))
    with pytest.raises(RuntimeError, match="a bug"):
        as_script(lambda: fails(RuntimeError("a bug")))


def test_second_order(script: Script) -> None:
    shown = script("second_order", "--sizes", "tiny", "--rounds", 2)
    assert columns(shown, 1) == [("contiguous",), ("channels_last",)]


def test_underflow(script: Script) -> None:
    shown = script("underflow", "--steps", 5, "--block", 3)
    assert columns(shown, 0) == [("1 to 3",), ("4 to 5",)]


def test_tiny_step(script: Script) -> None:
    shown = script("tiny_step", "--rounds", 2)
    assert columns(shown, 0) == [("mlseg",), ("Betty",), ("by hand",)]


def test_cell(script: Script) -> None:
    shown = script(
        "cell", "--channels", 2, "--batches", 1, 2, "--largest", 2, "--repeats", 1
    )  # fmt: skip
    levels = [(side, batch) for side in ("2x2", "1x1") for batch in ("1", "2")]
    assert columns(shown, 0, 3, 4) == [(d, *level) for d in ("down", "up") for level in levels]


def test_engine_overhead(script: Script, tmp_path: Path) -> None:
    figures = tmp_path / "overhead.json"
    shown = script(
        "engine_overhead", *LESIONS, *NETWORKS, "--iterations", 4, "--warm-up", 1, "--blocks", 2,
        "--json", figures,
    )  # fmt: skip
    cases = [(case, clock) for case in ("e2eaug", "toy") for clock in ("wall", "cpu")]
    assert columns(shown, 0, 1) == cases
    assert re.search(r"^E2EAug: \d\.\d+, target 1\.05", shown, re.MULTILINE)
    assert set(json.loads(figures.read_text())["cases"]) == {"e2eaug", "toy"}


@pytest.mark.parametrize(
    ("system", "parts"),
    [
        ("e2eaug", {"segmentor: hop", "generator: hop", "outer gradient"}),
        ("segan", {"segmentor: forward", "critic: step", "clamp"}),
    ],
)
def test_iteration(system: str, parts: set[str], script: Script, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", system)
    shown = script("iteration", config, "--iterations", 1)
    assert parts | {*EVERY_PART} <= {row[0] for row in rows(shown)}


def test_kernels(script: Script, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug")
    shown = script("kernels", config, "--device", "cpu", "--iterations", 1, "--profiled", 1)
    counts = {name: int(count) for name, count, _ in rows(shown)}
    assert counts["generator: hop"] > counts["generator: step"] > 10
    assert counts["segmentor: hop"] > 10


def test_kernels_are_of_the_part_that_launched_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a GPU's trace, where they run later than that."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    kernels = runpy.run_path(str(BENCHMARKS / "kernels.py"))

    def event(kind: str, name: str, ts: float, dur: float, **args: int) -> dict[str, Any]:
        return {"cat": kind, "name": name, "ts": ts, "dur": dur, "args": args}

    trace = [
        event("user_annotation", "part: step", 0.0, 10.0),
        event("user_annotation", "part: data", 2.0, 2.0),
        event("user_annotation", "part: hop", 20.0, 5.0),
        event("cuda_runtime", "cudaLaunchKernel", 1.0, 0.5, correlation=1),
        event("cuda_runtime", "cudaMemcpyAsync", 3.0, 0.5, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 9.0, 0.5, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 15.0, 0.5, correlation=4),
        event("kernel", "gemm", 21.0, 30.0, correlation=1),
        event("gpu_memcpy", "copy", 51.0, 1.0, correlation=2),
        event("kernel", "gemm", 52.0, 30.0, correlation=3),
        event("kernel", "add", 82.0, 4.0, correlation=4),
    ]
    found = kernels["Profile"].read(trace, cuda=True)
    parts = {name: (part.count, part.microseconds) for name, part in found.parts.items()}
    assert parts == {"step": (2, 60.0), "data": (1, 1.0), "rest": (1, 4.0)}
    assert found.names["gemm"].count == 2


def test_checks(script: Script, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug")
    shown = script("checks", "--config", config, "--iterations", 2)
    kinds = ["an iteration", "all checks", "notes in every", "both, over"]
    assert all(row[0].startswith(kind) for row, kind in zip(rows(shown), kinds, strict=True))


def test_hypergradients(script: Script) -> None:
    shown = script(
        "hypergradients", "--size", "tiny", "--rounds", 2, "--steps", 2, "--products", 2,
        "--entries", "class weights", "--optimizers", "sgd",
    )  # fmt: skip
    names = [row[0] for row in rows(shown)]
    assert {"forward", "Betty darts", "bare product", "higher", "TorchOpt"} <= set(names)
    assert names.count("mlseg cg") == 2  # of its iteration, and of its whole hop
    assert "2 steps of sgd, class weights: mlseg, graphs to" in shown


def test_kill_and_resume(script: Script, tmp_path: Path) -> None:
    more = ("gan.pretrain=2", "engine.iterations=16", "engine.validate_every=8", "device=cpu")
    shown = script(
        "kill_and_resume", SMALL, *LESIONS, *NETWORKS, *more, "engine.checkpoint_every=3",
        "engine.tensorboard=false", "--kills", 1, "--seed", 7, "--out", tmp_path / "runs",
    )  # fmt: skip
    assert "kill 1: " in shown
    assert shown.endswith("1 kills: the same, bit for bit\n")


def test_secant_check(script: Script, tmp_path: Path) -> None:
    shown = script("secant_check", train(tmp_path, system="e2eaug"), "--steps", 1)
    names = [row[0] for row in rows(shown)]
    assert len(names) == 2 * len(set(names))  # each method over each of two hops
    assert {"identity, before_step", "finite_difference 0.01, after_step"} <= set(names)


def test_segan_clamp(script: Script, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "segan")
    shown = script("segan_clamp", "--config", config, "--steps", 1)
    layers = ["masked image", "layer 1", "layer 2", "layer 3"]
    assert [row[0] for row in rows(shown)] == 3 * layers


def test_segan_views(script: Script, tmp_path: Path) -> None:
    changes = {"data.image_size": 40, "augmentation": {"window": 32}}
    shown = script("segan_views", train(tmp_path, system="segan", changes=changes))
    ways = ["windows of 32x32", "resized to 32x32", "whole, 40x40", "whole, 60x60"]
    assert [row[0] for row in rows(shown)] == ways


def test_gpu(script: Script, tmp_path: Path) -> None:
    """Its toy form: every section in a process of its own, and both reports."""
    shown = script("gpu", "--toy", "--out", tmp_path, "--only", "product", "tests")
    assert re.findall(r"^(\w+): passed", shown, re.MULTILINE) == ["product", "tests"]
    assert "| contiguous |" in (tmp_path / "report.md").read_text()
    sections = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert [s["outcome"] for s in sections] == ["passed", "passed"]


GPU = runpy.run_path(str(BENCHMARKS / "gpu.py"))
SECTIONS = [*GPU["at_scale"]("cuda"), *GPU["compiled"]("cuda"), *GPU["toy"]()]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_section_of_gpu_is_a_command(section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are ones that the script takes, and its overrides keys of its config."""
    monkeypatch.chdir(BENCHMARKS.parent)
    program, *words = section.command
    if program == "-m":
        return  # pytest's
    found = vars(parsed(monkeypatch, BENCHMARKS.parent / program, words))
    overrides = [word for word in words if "=" in word]
    assert found.get("overrides", []) == overrides
    if "config" in found:
        parse_run(config.load(found["config"], overrides))


def test_beside_betty(script: Script, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug")
    shown = script("beside_betty", config, "--rounds", 2, "--slopes", 1)
    assert columns(shown, 0) == [("Betty",), ("mlseg",)]
    for row in rows(shown):
        cosine = re.fullmatch(r"\*\*-?\d\.\d\d\*\* \((.*)\)", row[4])
        assert cosine is not None, row
        assert len(cosine[1].split()) == 1


def test_scaling(script: Script, tmp_path: Path) -> None:
    """Two axes: one with pictures whose numbers grow, and the bound of few states on memory."""
    names = ("T", "T, 2 states", "levels")
    shown = script("scaling", "--tiny", "--rounds", 1, "--axes", *names, "--out", tmp_path)
    assert columns(shown, 0) == [(name,) for name in names]
    figures = json.loads((tmp_path / "scaling.json").read_text())["axes"]
    assert list(figures["T"]["sizes"]) == ["1", "2", "4", "8"]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "T.png",
        "T_2 states.png",
        "levels.png",
    }


def test_parallel(script: Script, tmp_path: Path) -> None:
    """In one process; what torchrun starts is tested elsewhere."""
    config = tiny.write_config(tmp_path / "tiny.yaml")
    more = ("--config", config, "--rounds", 1, "--iterations", 1)
    shown = script("parallel", "--ways", "1x1", *more)
    assert columns(shown, 0, 2, 4) == [("1x1", "1.000", "1.000")]


def test_threads(script: Script) -> None:
    """What each of its processes does; all of them would take a minute."""
    shown = json.loads(script("threads", "--child", 1, "--sizes", "1x2x8", "1x2x16"))
    assert list(shown) == ["1x2x8", "1x2x16"]
    assert min(shown.values()) > 0.0


@pytest.mark.slow
def test_sweep_overhead(script: Script) -> None:
    shown = script("sweep_overhead", "--rounds", 1, "--more", 1)
    assert columns(shown, 0) == [("a cell of a sweep",), ("a run",), ("the cell beside it",)]
    number = r"-?\d+\.\d\d"  # one round's start-up varies by more than a toy takes
    for row in rows(shown):
        assert all(re.fullmatch(rf"{number} \({number} to {number}\)", text) for text in row[1:])
