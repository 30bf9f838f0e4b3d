"""The page of a run: what it says is what the directory holds, whatever that is."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from commanding import one_line
from pages import Page, read

from mlseg import report, run
from mlseg.engines.engine import Engine
from mlseg.reports.page import MARK, PAGE
from mlseg.reports.starting import STARTS

FILES = ("results.json", "evaluation.json", "starts.json", "metrics.jsonl", "events.jsonl",
         "times.jsonl", "splits.json")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a tiny supervised system that differ in their seed, and the folder of both."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        config = tiny.write_config(folder / f"seed{seed}.yaml", changes={"seed": seed})
        assert run.main([str(config), "engine.log_every=2", "--out", str(folder / f"s{seed}")]) == 0
    return folder


@pytest.fixture
def own(runs: Path, tmp_path: Path) -> Path:
    """A copy of the first, to be changed."""
    return Path(shutil.copytree(runs / "s1", tmp_path / "own"))


def again(directory: Path) -> Page:
    assert report.main([str(directory)]) == 0
    return Page(directory / PAGE)


def test_every_run_ends_with_a_page_that_says_what_the_results_say(runs: Path) -> None:
    out = runs / "s1"
    page, results = Page(out / PAGE), read(out / "results.json")
    head, *rows = page.table("Means over images")
    names = [text for text, _ in head]
    assert len(rows) == 4
    assert names[-2:] == ["hd95", "nsd"]
    for row in rows:
        weights, split = row[0][0].split(", ")
        scores = results["scores"][weights][split]
        for name, (text, value) in zip(names[1:], row[1:], strict=True):
            assert value == scores[name.replace(" ", "_")]
            digits = {"images": 0, "hd95": 2}.get(name, 4)
            assert text.split(" ±")[0] == f"{value:.{digits}f}"
    value = results["scores"]["best"]["test"]["jaccard"]
    assert f"{value:.4f} jaccard on test" in " ".join(page.text.split())
    low, high = read(out / "evaluation.json")["scores"]["best"]["test"]["intervals"]["jaccard"]
    assert f"95 % interval over images {low:.4f} to {high:.4f}" in page.text
    assert low <= value <= high
    assert "SYNTHETIC DATA" in page.text
    facts = {row[0][0]: row[1][0] for row in page.table("The run")}
    assert facts["seed"] == "1"
    assert facts["provenance"] == "synthetic"
    assert facts["split hash"] == results["split_hash"]


def test_every_image_and_class_is_there_with_its_score(runs: Path) -> None:
    page, found = Page(runs / "s1" / PAGE), read(runs / "s1" / "evaluation.json")
    results = read(runs / "s1" / "results.json")["scores"]["best"]["test"]
    own = found["scores"]["best"]["test"]
    head, *rows = page.table("Images of the test split, best weights")
    assert [text for text, _ in head][:2] == ["image", "jaccard"]
    shown = {row[0][0]: row[1][1] for row in rows}
    assert shown == dict(zip(own["images"], own["scores"]["jaccard"], strict=True))
    assert [row[1][1] for row in rows] == sorted(own["scores"]["jaccard"])
    for name in ("jaccard", "dice", "hd95"):
        assert np.mean(own["scores"][name]) == pytest.approx(results[name])
    pictures = [about for tag, about in page.tags if tag == "img"]
    assert len(pictures) == len(rows) == 3
    assert all(str(p["src"]).startswith("data:image/jpeg;base64,") and p["alt"] for p in pictures)
    anchors = {about["id"] for _, about in page.tags if "id" in about}
    links = [about["href"] for tag, about in page.tags if tag == "a"]
    assert {f"#{anchor}" for anchor in anchors} == set(links)
    classes = {row[0][0]: row[1][1] for row in page.table("Pooled over all pixels")[1:]}
    assert classes == {
        name.removeprefix("iou_"): value
        for name, value in results.items()
        if name.startswith("iou_")
    }


def test_curves_and_what_it_was_made_by(runs: Path) -> None:
    page = Page(runs / "s1" / PAGE)
    labels = [about["aria-label"] for tag, about in page.tags if tag == "svg" and "role" in about]
    lines = [json.loads(x) for x in (runs / "s1" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["problem"] == "segmentor"]
    (loss,) = [x for x in labels if x and x.startswith("Loss of segmentor")]
    assert loss == f"Loss of segmentor. loss: from {losses[0]:.4g} to {losses[-1]:.4g}"
    for title in ("Validation", "Learning rates", "Seconds per step", "Memory", "Share of pixels"):
        assert any(label and label.startswith(title) for label in labels), title
    (start,) = read(runs / "s1" / STARTS)
    assert start["command"].startswith("python -m mlseg.run ")
    assert start["set"]["command line"] == {"engine.log_every": 2}
    assert start["set"][str(runs / "seed1.yaml")]["seed"] == 1
    assert start["command"] in page.text
    assert start["machine"]["revision"] in page.text
    assert ("engine.log_every", "2") in [
        (row[0][0], row[1][0]) for row in page.table("Set by the command line")
    ]


def test_a_page_stands_alone_and_can_be_heard(runs: Path) -> None:
    """Nothing is asked for from anywhere; pictures have words, tables heads, buttons names."""
    page = Page(runs / "s1" / PAGE)
    for tag, about in page.tags:
        for name in ("src", "href"):
            value = about.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not re.search(r"url\(|@import", page.source)
    for tag, about in page.tags:
        if tag == "img":
            assert about["alt"]
        if tag == "th":
            assert about.get("scope") in ("col", "row")
        if tag == "svg":
            assert about.get("aria-label") or about.get("aria-hidden") == "true"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert len(page.source) < 2**21


def strings_replaced(value: Any, by: str) -> Any:
    """Every string in plain values, keys of scores too, made dangerous."""
    if isinstance(value, str):
        return by + value
    if isinstance(value, list):
        return [strings_replaced(item, by) for item in value]
    if isinstance(value, dict):
        return {key: strings_replaced(item, by) for key, item in value.items()}
    return value


def test_what_a_run_says_is_never_markup(own: Path, tmp_path: Path) -> None:
    evil = "\udce9<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    found = read(own / "evaluation.json")
    pictures = found["pictures"]["of"]
    test = found["scores"]["best"]["test"]
    test["classes"] = {evil + name: value for name, value in test["classes"].items()}
    test["images"] = [evil + name for name in test["images"]]
    found["pictures"]["of"] = {evil + name: data for name, data in pictures.items()}
    found["pictures"]["of"][test["images"][0]] = '" onerror="alert(3)'
    found["pictures"]["heads"] = [evil]
    (own / "evaluation.json").write_text(json.dumps(found))
    (own / STARTS).write_text(json.dumps(strings_replaced(read(own / STARTS), evil)))
    results = read(own / "results.json")
    scores = {evil: results["scores"]["last"], **results["scores"]}
    changed = strings_replaced(results, evil) | {"scores": scores, "metric": "jaccard"}
    (own / "results.json").write_text(json.dumps(changed))
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    lines += [{"step": 3, "problem": evil, evil: 1.0, "loss": 2.0}]
    (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (own / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": evil, "step": 4, evil: evil}) + "\n")
    page = again(Path(own.rename(tmp_path / "<b>run")))
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    assert not [tag for tag, _ in page.tags if tag == "b"]
    assert not [about for _, about in page.tags if any(name.startswith("on") for name in about)]
    assert all(str(a["src"]).startswith("data:image/jpeg") for t, a in page.tags if t == "img")
    assert page.text.count("alert(1)") > 20


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_said(own: Path, name: str) -> None:
    (own / name).unlink()
    page = again(own)
    if name not in ("events.jsonl", "splits.json"):
        assert f"{name}: " in page.text
    if name == "results.json":
        assert "Not finished" not in page.text, "its events say that it has"
    else:
        assert "jaccard on test" in page.text


@pytest.mark.parametrize("third", [[86, 180, 233], [86, 180], [86, 180, "x;"], [86, 180, 256]])
def test_three_classes_have_a_legend_of_colours(own: Path, third: list[Any]) -> None:
    path = own / "evaluation.json"
    content = json.loads(path.read_text())
    content["palette"] = [[0, 0, 0], [230, 159, 0], third]
    for weights in content["scores"].values():
        for split in weights.values():
            split["classes"] = {name: {"jaccard": 0.5} for name in ("skin", "mole", "hair")}
    path.write_text(json.dumps(content))
    page = again(own)
    styles = [about["style"] for _, about in page.tags if about.get("style")]
    colours = ["0, 0, 0", "230, 159, 0", "86, 180, 233"]
    known = third == [86, 180, 233]
    assert styles == ([f"background: rgb({shade})" for shade in colours] if known else [])


@pytest.mark.parametrize("name", ["results.json", "evaluation.json"])
def test_a_damaged_file_is_not_called_missing(own: Path, name: str) -> None:
    path = own / name
    path.write_bytes(path.read_bytes()[:-20])
    page = again(own)
    assert "it is there and can't be read" in page.text
    assert page.text.index(f"{name}: ") < page.text.index("it is there and can't be read")


def test_an_old_directory_has_a_page_too(own: Path) -> None:
    for name in ("evaluation.json", STARTS, "times.jsonl"):
        (own / name).unlink()
    page = again(own)
    assert "jaccard on test" in page.text
    assert [row[0][0] for row in page.table("Pooled over all pixels")] == [
        "class", "background", "lesion",
    ]  # fmt: skip


WRONG: list[Any] = [None, 1, "x", [], {}, [[1]], {"a": {"b": [None]}}, float("nan"), 10**400]


def spoilt(value: Any, draw: np.random.Generator) -> Any:
    """Plain values in which some are something else."""
    if draw.random() < 0.08:
        return WRONG[draw.integers(len(WRONG))]
    if isinstance(value, dict):
        return {key: spoilt(item, draw) for key, item in value.items()}
    if isinstance(value, list):
        return [spoilt(item, draw) for item in value]
    return value


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_make_a_page_all_the_same(own: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    name = FILES[seed % len(FILES)]
    path = own / name
    if seed < len(FILES):
        path.write_bytes(draw.bytes(2000))
    elif name.endswith("l"):
        lines = [spoilt(json.loads(line), draw) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_text(json.dumps(spoilt(read(path), draw)))
    assert MARK in again(own).source


# ---------------------------------------------------------------------- several runs


def test_several_runs_are_compared_image_by_image(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert report.main([str(runs / "s1"), str(runs / "s2"), "--out", str(out)]) == 0
    page = Page(out)
    scores = [
        read(runs / name / "results.json")["scores"]["best"]["test"]["jaccard"]
        for name in ("s1", "s2")
    ]
    rows = page.table("Runs")
    assert [row[6][1] for row in rows[1:]] == scores
    (_, seeds) = page.table("Over seeds")
    assert seeds[3][1] == pytest.approx(np.mean(scores))
    assert seeds[4][1] == pytest.approx(np.std(scores, ddof=1))
    own = [read(runs / n / "evaluation.json")["scores"]["best"]["test"] for n in ("s1", "s2")]
    assert own[0]["images"] == own[1]["images"]
    differences = np.subtract(own[1]["scores"]["jaccard"], own[0]["scores"]["jaccard"])
    (_, paired) = page.table("Paired by image")
    assert paired[0][0] == "s2 less s1"
    assert paired[2][1] == pytest.approx(differences.mean())
    assert [paired[4][1], paired[5][1]] == [(differences > 0).sum(), (differences < 0).sum()]
    ids = [about["id"] for _, about in page.tags if "id" in about]
    assert len(ids) == len(set(ids)) == 6


def test_runs_that_cannot_be_paired_are_said_to_be_so(runs: Path, own: Path) -> None:
    found = read(own / "evaluation.json")
    found["scores"]["best"]["test"]["images"][0] = "another"
    (own / "evaluation.json").write_text(json.dumps(found))
    results = read(own / "results.json") | {"provenance": "real", "split_hash": "other"}
    (own / "results.json").write_text(json.dumps(results))
    out = own / "both.html"
    assert report.main([str(runs / "s1"), str(own), "--out", str(out)]) == 0
    page = Page(out)
    assert "Not paired with s1" in page.text
    assert "Real beside SYNTHETIC data" in page.text
    assert "not all on one split" in page.text
    assert not [name for name in page.tables if name.startswith(("Paired", "Over seeds"))]


# ------------------------------------------------------------------- whose files are whose


def test_nobodys_file_is_written_over(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "notes.html"
    theirs.write_text("precious")
    link = tmp_path / "link.html"
    link.symlink_to(own / PAGE)
    for path, said in ((theirs, "no page of mlseg's"), (link, "no page of"), (tmp_path, "folder")):
        capsys.readouterr()
        assert report.main([str(own), "--out", str(path)]) == 2
        assert said in one_line(capsys)
    assert theirs.read_text() == "precious"
    assert report.main([str(own), "--out", str(theirs), "--overwrite"]) == 0
    assert report.main([str(own), "--out", str(theirs)]) == 0, "by now it is ours"


@pytest.mark.parametrize("made", ["nothing", "empty", "a file"])
def test_what_is_no_run_is_refused(
    made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    if made == "empty":
        place.mkdir()
    if made == "a file":
        place.touch()
    for trust in ([], ["--trust"]):
        capsys.readouterr()
        assert report.main([str(place), *trust]) == 2
        assert str(place) in one_line(capsys)
    assert not (place / PAGE).exists()


@pytest.mark.parametrize("broken", ["page", "evaluation", "starts"])
def test_no_page_and_no_detail_endangers_a_run(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("it is broken\nin two lines")

    where = {
        "page": "mlseg.reports.page.page",
        "evaluation": "mlseg.engines.evaluation.figures",
        "starts": "mlseg.reports.starting.describe",
    }
    monkeypatch.setattr(where[broken], fail)
    config, out = tiny.write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: no ")]
    assert len(notes) == 1
    assert "(it is broken)" in notes[0]
    assert read(out / "results.json")["steps"] == 4
    assert (out / PAGE).exists() == (broken != "page")


def test_an_interrupted_run_has_a_page_and_goes_on(
    tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    config, out = tiny.write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    stop_at(3)
    assert run.main([str(config), "--out", str(out)]) == 143
    page = Page(out / PAGE)
    assert "Interrupted after step 3" in page.text
    assert "SYNTHETIC DATA" in page.text
    assert "results.json: final scores" in page.text
    stop_at(0)
    assert run.main(["--resume", str(out), "engine.iterations=6"]) == 0
    page = Page(out / PAGE)
    assert "Interrupted" not in page.text
    assert [start["step"] for start in read(out / STARTS)] == [0, 3]
    assert read(out / STARTS)[1]["set"] == {"command line": {"engine.iterations": 6}}
    assert "Went on after step 3" in page.text
    steps = [json.loads(line)["step"] for line in (out / "times.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have a run be asked to stop in a step."""
    chosen = [0]
    step = Engine.train_step

    def train_step(self: Engine) -> None:
        step(self)
        if self.global_step == chosen[0]:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Engine, "train_step", train_step)

    def choose(number: int) -> None:
        chosen[0] = number

    return choose
