"""What evaluate and calibrate print of intervals, and leave in a run and on its page."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commanding import one_line, train
from pages import Page, read

from mlseg import calibrate, evaluate, run
from mlseg.files import claimed
from mlseg.reports.page import PAGE
from mlseg.reports.reading import LATER
from mlseg.segmentation import intervals


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def own(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "own"))


def cells(said: str, beginning: str) -> list[list[str]]:
    """The rows of a printed table whose first or second cell begins so, cells without spaces."""
    rows = [[part.strip() for part in line.strip("│").split("│")] for line in said.splitlines()]
    return [row for row in rows if any(part.startswith(beginning) for part in row[:2])]


def written(spans: dict[str, list[float]], name: str) -> str:
    return f"{spans[name][0]:.3f}-{spans[name][1]:.3f}" if name in spans else ""


def test_the_table_of_a_run_has_the_intervals_of_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path)
    rows = cells(capsys.readouterr().out, "95 %")
    results, found = read(out / "results.json"), read(out / "evaluation.json")
    assert len(rows) == 4, "of both weights and splits"
    places = [(w, s) for w, own in results["scores"].items() for s in own]
    for row, (weights, split) in zip(rows, places, strict=True):
        spans = found["scores"][weights][split]["intervals"]
        assert results["intervals"][weights][split] == spans
        assert row[-3:] == [written(spans, name) for name in ("jaccard", "dice", "accuracy")]
    (out / "evaluation.json").unlink()
    assert run.main(["--resume", str(out)]) == 0


def test_evaluate_prints_intervals_and_leaves_its_scores_on_the_page(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, results = read(own / "evaluation.json"), (own / "results.json").read_bytes()
    out = tmp_path / "scores.json"
    assert evaluate.main([str(own), "--out", str(out), "--threshold", "0.3"]) == 0
    said = capsys.readouterr()
    assert f"Also on {own / PAGE}" in said.out
    assert said.err == ""
    ((_, _, *shown),) = cells(said.out, "95 %")
    spans, scores = read(out)["intervals"]["test"], read(out)["scores"]["test"]
    jaccards = [image["jaccard"] for image in scores["per_image"].values()]
    assert spans["jaccard"] == list(intervals.of_mean(jaccards) or ())
    names = ["jaccard", "dice", "accuracy", "sensitivity", "specificity", "precision",
             "thresholded_jaccard", "hd95", "nsd", "pooled_jaccard"]  # fmt: skip
    assert shown == [written(spans, name) for name in names]

    after = read(own / "evaluation.json")
    (entry,) = after.pop(LATER)
    assert after == before, "what training ended with stays"
    assert (own / "results.json").read_bytes() == results
    scores.pop("per_image")
    assert (entry["scores"], entry["intervals"]) == (scores, spans)
    assert (entry["data"], entry["threshold"], entry["weights"]) == ("test", 0.3, "best")
    head, row = Page(own / PAGE).table("Scored by evaluate")
    about = dict(zip([text for text, _ in head], [text for text, _ in row], strict=True))
    assert about["score"] == f"{scores['jaccard']:.4f}"
    assert about["95 % over images"] == "{:.3f} to {:.3f}".format(*spans["jaccard"])
    assert about["threshold"] == "0.3"

    for more in (["--threshold", "0.3"], ["--tta", "flips"]):  # again, and another one
        assert evaluate.main([str(own), *more]) == 0
    entries = read(own / "evaluation.json")[LATER]
    assert [(e["threshold"], e["tta"]) for e in entries] == [(0.3, None), (0.5, "flips")]
    assert run.main(["--resume", str(own), "engine.iterations=6"]) == 0
    assert LATER not in read(own / "evaluation.json"), "other weights"


def test_calibrate_says_its_choice_with_intervals_and_on_the_page(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(own), "--k", "0.5", "1", "--thresholds", "0.3", "0.5"]
    assert calibrate.main(arguments) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("k ")]
    assert line.count("(95 % over images: ") == 2
    val = read(own / "evaluation.json")["scores"]["best"]["val"]
    low, high = val["intervals"]["jaccard"]
    mean = np.mean(val["scores"]["jaccard"])
    assert line.endswith(f"it was {mean:.4f} (95 % over images: {low:.3f} to {high:.3f})")
    (choice,) = read(own / "calibration.json")
    _, row = Page(own / PAGE).table("Chosen by calibrate")
    assert [text for text, _ in row][:4] == [
        f"{choice['k']:.3g}", f"{choice['threshold']:.3g}", "jaccard", f"{choice['value']:.4f}"
    ]  # fmt: skip


def test_an_ensemble_belongs_to_no_run(own: Path, trained: Path) -> None:
    before = (own / "evaluation.json").read_bytes()
    assert evaluate.main([str(own), str(trained)]) == 0
    assert (own / "evaluation.json").read_bytes() == before
    assert calibrate.main([str(own), str(trained), "--k", "1", "--thresholds", "0.4"]) == 0
    for each in (own, trained):
        assert "own, run" in [t for row in Page(each / PAGE).table("Chosen by") for t, _ in row]
        (each / "calibration.json").unlink()


def test_where_it_can_not_be_written_is_one_line(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated() -> str:
        capsys.readouterr()
        assert evaluate.main([str(own)]) == 0
        said = capsys.readouterr()
        assert "Also on" not in said.out
        assert cells(said.out, "test")
        (line,) = said.err.splitlines()
        assert line.startswith(f"note: no evaluation.json and report.html of {own} with these")
        return line

    before = {path: path.read_bytes() for path in (own / PAGE, own / "evaluation.json")}
    with claimed(own, own.parent):
        assert "another process is at work on it" in evaluated()

    def denied(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("mlseg.engines.evaluation.write_text", denied)
        assert "Permission denied" in evaluated()
    assert before == {path: path.read_bytes() for path in before}

    for text in ("{", "[]", "{}", "[" * 10**5):
        (own / "evaluation.json").write_text(text)
        assert "evaluation.json can't be read; remove it" in evaluated()
        assert (own / "evaluation.json").read_text() == text
    (own / "evaluation.json").unlink()
    (own / PAGE).write_text("precious")
    assert "no page of mlseg's" in evaluated()
    assert calibrate.main([str(own), "--k", "1", "--thresholds", "0.4"]) == 0
    assert "note: no report.html of" in one_line_of_notes(capsys)
    assert (own / PAGE).read_text() == "precious"
    assert not (own / "evaluation.json").exists()
    (own / PAGE).unlink()
    assert evaluate.main([str(own)]) == 0
    assert LATER in read(own / "evaluation.json")
    assert Page(own / PAGE).table("Scored by evaluate")
    (own / "config.yaml").rename(own / "other.yaml")
    capsys.readouterr()
    assert evaluate.main([str(own)]) == 2, "its data aren't known"
    assert "config.yaml" in one_line(capsys)


def one_line_of_notes(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("broken", [3, [3], [{"scores": 3, "k": "x", "intervals": {"dice": 1}}]])
def test_a_damaged_record_makes_a_page(broken: Any, own: Path) -> None:
    found = read(own / "evaluation.json")
    (own / "evaluation.json").write_text(json.dumps({**found, LATER: broken}))
    (own / "calibration.json").write_text(json.dumps(broken))
    assert evaluate.main([str(own), "--k", "1"]) == 0
    assert Page(own / PAGE).table("Scored by evaluate")
