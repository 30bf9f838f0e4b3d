"""Every file in examples/ runs, here in a smaller size, and prints what its docstring promises."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.slow  # trains for seconds

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALLER: dict[str, dict[str, int]] = {
    "e2eaug_minimal": {"PRETRAINING": 10, "ITERATIONS": 12, "SHOW": 4, "TEST": 20},
    "segan_minimal": {"ITERATIONS": 16, "SHOW": 4, "TEST": 20},
    "reweighting": {"ITERATIONS": 60, "SHOW": 20, "TEST": 20},
}
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"

Shown = list[list[float]]


def load(name: str) -> ModuleType:
    """The file as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[Shown, Mapping[str, float]]]:
    """Runs an example: its rows of figures, and the figures at the end by their names."""

    def run(name: str) -> tuple[Shown, Mapping[str, float]]:
        module = load(name)
        for constant, value in SMALLER[name].items():
            assert value < getattr(module, constant)
            setattr(module, constant, value)
        threads = torch.get_num_threads()
        try:
            module.main()
        finally:
            torch.set_num_threads(threads)
        text = capsys.readouterr().out
        rows = re.findall(rf"^ *{NUMBER}(?: +{NUMBER})+$", text, re.MULTILINE)
        ends = re.findall(r"^  (\w[\w ]*?)  +(\d\.\d{3})$", text, re.MULTILINE)
        return [[float(n) for n in row.split()] for row in rows], {n: float(v) for n, v in ends}

    return run


def test_each_has_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALLER)


@pytest.mark.parametrize("name", SMALLER)
def test_each_is_one_file_that_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert f"\n    python examples/{name}.py " in text
    of_mlseg = re.findall(r"^(?:from|import) (mlseg\S*)", text, re.MULTILINE)
    assert of_mlseg == ["mlseg"], "only public names"


def test_e2eaug(shown: Callable[[str], tuple[Shown, Mapping[str, float]]]) -> None:
    rows, end = shown("e2eaug_minimal")
    assert [row[0] for row in rows] == [4, 8, 12]
    for _, loss, jaccard, direct, through, largest in rows:
        assert loss > 0.0
        assert 0.0 <= jaccard <= 1.0
        assert min(direct, through) > 0.0, "a path carries nothing"
        assert 1 / 3 < largest < 1.0
    assert rows[-1][-1] > rows[0][-1], "the alphas stay where they are"
    assert list(end) == ["real pairs alone", "three levels"]
    assert end["three levels"] == rows[-1][2]


def test_segan(shown: Callable[[str], tuple[Shown, Mapping[str, float]]]) -> None:
    rows, end = shown("segan_minimal")
    plain, leading = rows[:4], rows[4:]
    assert [row[0] for row in plain] == [row[0] for row in leading] == [4, 8, 12, 16]
    assert {len(row) for row in plain} == {4}
    assert {len(row) for row in leading} == {5}
    assert min(row[-1] for row in leading) > 0.0, "nothing comes through the critic"
    assert [row[3] for row in plain] == [1.0, 1.0, 0.9, 0.9]  # k, after every tenth step
    assert [row[1] for row in plain] != [row[1] for row in leading], "two games are the same"
    assert list(end) == ["lesion everywhere", "plain alternation", "Stackelberg game"]
    assert end["plain alternation"] == plain[-1][2]


def test_reweighting(shown: Callable[[str], tuple[Shown, Mapping[str, float]]]) -> None:
    rows, end = shown("reweighting")
    assert [row[0] for row in rows] == [20, 40, 60]
    _, _, _, right, wrong, jaccard = rows[-1]
    assert right > 0.5 > wrong, "the weights don't tell right masks from wrong ones"
    assert list(end) == ["all alike", "weights learned", "right ones only"]
    assert end["weights learned"] == jaccard
