"""``docs/define-a-problem.md`` runs from top to bottom, block by block, and does what it says."""

import json
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from betty.hypergradient import jvp_fn_mapping

from mlseg import run
from mlseg.errors import UserError
from mlseg.hypergradients import names, resolve
from mlseg.hypergradients.registry import METHODS
from mlseg.testing.families import SHAPES, Settled

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "define-a-problem.md"


@cache
def blocks(language: str) -> list[tuple[str, str, int]]:
    """All fenced blocks of a language: the section that each is in, its text, its first line."""
    text = PAGE.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        above = text[: match.start(1)]
        section = re.findall(r"^## (.*)$", above, re.MULTILINE)[-1]
        found.append((section, match.group(1), above.count("\n")))
    return found


def is_file(block: str) -> bool:
    """Whether a block is the content of the file that its first line names."""
    return re.match(r"# [\w/]+\.\w+\n", block) is not None


Names = dict[str, Any]
"""What the program has defined so far."""


def one_level_gets_it_wrong(ran: Names) -> None:
    assert ran["plain_accuracy"] < 0.65


def two_levels_mend_it(ran: Names) -> None:
    assert ran["two_level_accuracy"] > 0.85


def report_and_error_are_those_quoted(ran: Names) -> None:
    report = ran["report"]
    hop = ("residual", "evaluations", "products", "seconds")
    assert {
        "loss",
        "accuracy",
        "hypergradient/into_classifier",
        "hypergradient/via_classifier",
        *(f"hypergradient/classifier_{figure}" for figure in hop),
    } <= set(report)
    assert all(map(math.isfinite, report.values()))
    assert report["hypergradient/classifier_residual"] < 1e-6
    assert ran["message"] in PAGE.read_text(encoding="utf-8")


def the_third_level_serves_the_student(ran: Names) -> None:
    assert ran["student_accuracy"] > 0.85
    assert ran["unaided_accuracy"] < 0.65
    unaided = ran["engine"].weighting.module
    assert not unaided.weight.any(), "without its edge in u2l the upper level stays where it is"


def the_rate_is_learned(ran: Names) -> None:
    assert ran["found_rate"] > 10 * 1e-3
    assert ran["test_loss"] < 2 / 3 * ran["fixed_test_loss"]
    for method in ("unrolled", "evolution"):
        engine = ran["learned_rate"](method)
        for _ in range(20):
            engine.iterate()
        assert float(engine.rate.module()) > 1.5e-3, method


def an_expensive_source_is_passed_once_a_step(ran: Names) -> None:
    assert ran["forwards"] == 200
    assert ran["generated_accuracy"] > 0.85


OWN: dict[str, tuple[dict[str, Any], str, float]] = {
    "chebyshev": ({"iterations": 100}, "minimisers", 1e-6),
    "one_sided": ({"epsilon": 1e-6}, "one step", 1e-4),
    "clipped_identity": ({"largest": 1e6}, "one step", 1e-9),
}
"""Settings of the page's methods, what they should give, and their relative error."""


def own_method_is_right(method: str, shape: str) -> None:
    made = Settled("ridge", shape)
    settings, truth, tolerance = OWN[method]
    settings = {"method": method, **settings}
    if method == "chebyshev":
        settings |= {"lowest": made.lowest, "highest": made.highest}
    if method == "clipped_identity":
        settings["rate"] = made.rate
    engine = made.engine(settings)
    engine.iterate()
    expected = made.exact() if truth == "minimisers" else made.one_step()
    error = (engine.top.gradient - expected).norm() / expected.norm()
    assert error < tolerance, (method, shape)


def own_methods_are_right_in_every_graph(ran: Names) -> None:
    for method in OWN:
        for shape in SHAPES:
            own_method_is_right(method, shape)
    figures = ran["own_figures"]
    clipped = figures["clipped_identity"]
    assert clipped["hypergradient/classifier_factor"] == pytest.approx(
        0.1 / clipped["hypergradient/into_classifier"]
    )
    assert figures["chebyshev"]["hypergradient/classifier_residual"] < 0.5
    assert figures["chebyshev"]["hypergradient/classifier_products"] == 20 + 1
    assert clipped["hypergradient/classifier_products"] == 1
    assert figures["one_sided"]["hypergradient/classifier_evaluations"] == 2
    with pytest.raises(ValueError, match="chebyshev: lowest: missing; it must be set to a number"):
        resolve("chebyshev")
    accumulating: Any = SimpleNamespace(name="low", stepping=SimpleNamespace(batches=2))
    with pytest.raises(UserError, match="'low': clipped_identity takes one batch a step"):
        resolve("clipped_identity").check(accumulating)


def the_resumed_run_is_the_uninterrupted_one(ran: Names) -> None:
    whole = ran["two_levels"]("unrolled", iterations=100)
    whole.run()
    assert tiny.same(tiny.weights(whole), tiny.weights(ran["again"]))
    assert ran["again"].global_step == 100
    # At 10, 20, 30, 37 (the end of the first part), 40, 50, ..., 100.
    assert len(ran["norms"]) == 11
    assert all(norm > 0 for norm in ran["norms"])
    part = ran["two_levels"]("unrolled", iterations=37)
    part.run()
    assert len(part.state_dict()["problems"]["classifier"]["trajectory"]["steps"]) == 5


def the_hook_sees_every_validation(ran: Names) -> None:
    engine, sparsity = ran["engine"], ran["sparsity"]
    left_out = float((engine.weighting(sparsity.batch).sigmoid() < 0.5).float().mean())
    assert sparsity.history == [pytest.approx(left_out)], "one validation, at the end"
    assert 0.0 < left_out < 1.0
    assert engine.results()["left_out"] == sparsity.history
    assert engine.state_dict()["hooks"] == {"sparsity": {"history": sparsity.history}}


CHECKS: dict[str, Callable[[Names], None]] = {
    "One level": one_level_gets_it_wrong,
    "Two levels": two_levels_mend_it,
    "Choose the method": report_and_error_are_those_quoted,
    "Three levels": the_third_level_serves_the_student,
    "Learning rates as an upper level": the_rate_is_learned,
    "Expensive sources": an_expensive_source_is_passed_once_a_step,
    "A method of your own": own_methods_are_right_in_every_graph,
    "Records, checkpoints, resume": the_resumed_run_is_the_uninterrupted_one,
    "What a run adds: hooks": the_hook_sees_every_validation,
}
"""What is claimed, by section."""


@pytest.fixture
def own_methods_are_forgotten() -> Iterator[None]:
    """Those that the page registers."""
    known, at_bettys = set(names()), dict(jvp_fn_mapping)
    yield
    for name in set(names()) - known:
        METHODS.remove(name)
    jvp_fn_mapping.clear()
    jvp_fn_mapping.update(at_bettys)


@pytest.mark.usefixtures("own_methods_are_forgotten")
def test_every_section_does_what_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one test: the sections build on each other, and would run again in each worker."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program: Names = {"__name__": "define_a_problem"}
    sections = [(s, block, line) for s, block, line in blocks("python") if not is_file(block)]
    assert list(dict.fromkeys(section for section, _, _ in sections)) == list(CHECKS)
    for index, (section, block, line) in enumerate(sections):
        # Tracebacks point to lines of the page.
        exec(compile("\n" * line + block, str(PAGE), "exec"), program)
        if section not in [later for later, _, _ in sections[index + 1 :]]:
            CHECKS[section](program)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files of the page, and no module of them loaded."""
    for language in ("python", "yaml"):
        for _, block, _ in blocks(language):
            if is_file(block):
                path = tmp_path / block.splitlines()[0].removeprefix("# ")
                path.parent.mkdir(exist_ok=True)
                path.write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    for module in ("games", "games.cleaning"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def test_the_commands_run_the_system(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((_, shell, _),) = blocks("sh")
    commands = [shlex.split(line) for line in shell.splitlines()]
    assert [command[:3] for command in commands] == [["python", "-m", "mlseg.run"]] * 3
    for command in commands:
        assert run.main(command[3:]) == 0
    cleaning = json.loads((here / "runs/cleaning/results.json").read_text())
    assert cleaning["steps"] == 600
    assert cleaning["best"]["value"] > 0.85
    figures = [json.loads(x) for x in (here / "runs/cg/metrics.jsonl").read_text().splitlines()]
    assert any("hypergradient/classifier_residual" in line for line in figures)

    capsys.readouterr()
    assert run.main(["cleaning.yaml", "problems.classifier.hypergradient.iterations=3"]) == 2
    said = capsys.readouterr().err.strip()
    assert "hypergradient.iterations: unknown key; valid here: linearise" in said
    assert said.count("\n") == 0


def test_links_lead_somewhere() -> None:
    """To files of the repository, and to sections of the page or its neighbour."""
    pages = sorted(DOCS.glob("*.md"))
    anchors = {
        page.name: {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        }
        for page in pages
    }
    for page in pages:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors[target.name], f"{page.name}: {link}"
