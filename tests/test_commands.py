"""The commands, as a user types them: what they leave, what they say, their exit codes."""

import argparse
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commanding import one_line, train
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlseg import calibrate, compare, config, evaluate, predict, run
from mlseg import data as data_command
from mlseg.commands import guarded, make_console
from mlseg.errors import UserError
from mlseg.segmentation.data.entry import DATA_SETS, data_set


def test_a_run_leaves_its_whole_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path, "engine.tensorboard=true")
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "splits.json", "results.json"):
        assert (out / name).stat().st_size > 0, name
    assert {p.stem for p in (out / "checkpoints").iterdir()} == {"last", "previous", "best"}
    assert list((out / "tensorboard").iterdir())
    assert {p.name.partition("_")[0] for p in (out / "samples").iterdir()} == {"validation"}
    curves = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0}).Reload()
    (*_, shown) = curves.Images("validation")
    with Image.open(out / "samples" / f"validation_{shown.step:06d}.png") as sheet:
        again = Image.open(io.BytesIO(shown.encoded_image_string))
        assert np.array_equal(np.asarray(sheet), np.asarray(again))
    results = json.loads((out / "results.json").read_text())
    assert results["provenance"] == "synthetic"
    assert results["seed"] == 1
    assert results["steps"] == 4
    assert set(results["scores"]) == {"best", "last"}
    assert set(results["scores"]["best"]) == {"val", "test"}
    assert results["split_hash"] == json.loads((out / "splits.json").read_text())["hash"]
    assert {"torch", "betty-ml", "python"} <= set(results["versions"])
    said = capsys.readouterr()
    assert said.err.count("SYNTHETIC") == 2, "once at the start, once at the end"
    title = "Scores, mean over images, counted at the size of each mask's file"
    assert title in " ".join(said.out.split())


def test_evaluate_gives_what_the_run_gave(tmp_path: Path) -> None:
    out = train(tmp_path)
    scores = tmp_path / "scores.json"
    assert evaluate.main([str(out), "--out", str(scores), "--device", "cpu"]) == 0  # as it trained
    evaluated = json.loads(scores.read_text())["scores"]["test"]
    reported = json.loads((out / "results.json").read_text())["scores"]["best"]["test"]
    per_image = evaluated.pop("per_image")
    assert evaluated == reported
    assert {"thresholded_jaccard", "hd95", "pooled_dice", "pooled_sensitivity"} <= set(reported)
    mean = sum(image["jaccard"] for image in per_image.values()) / len(per_image)
    assert mean == pytest.approx(reported["jaccard"])


def test_evaluate_on_another_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = train(tmp_path)
    folder = tmp_path / "own"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(2):
        image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        mask = np.zeros((40, 50), np.uint8)
        mask[10:30, 10:40] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    capsys.readouterr()
    assert evaluate.main([str(out), "--data", "folder", "--root", str(folder)]) == 0
    assert "folder" in capsys.readouterr().out
    assert evaluate.main([str(out), "--data", "camvid"]) == 2
    assert "camvid" in one_line(capsys)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("synthetic_scenes", "name a data set by --data"),
        ("voc2012", "--data voc2012 scores its validation part, which has chosen the weights"),
    ],
)
def test_evaluate_without_a_test_split_says_so(
    name: str, mend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"data.name={name}", "data.when_missing=synthetic", "data.test=0"]
    out = train(tmp_path, *changes, "data.root=none")
    capsys.readouterr()
    assert evaluate.main([str(out), "--out", str(tmp_path / "scores.json")]) == 2
    said = one_line(capsys)
    assert "its test split is empty" in said
    assert said.rstrip(")").endswith(mend)
    assert not (tmp_path / "scores.json").exists()


def test_predict_writes_masks_at_each_images_own_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    sizes = {"wide": (90, 31), "tall": (33, 64), "grey": (48, 48)}
    for name, size in sizes.items():
        mode = "L" if name == "grey" else "RGB"
        Image.effect_noise(size, 60).convert(mode).save(images / f"{name}.png")
    masks = tmp_path / "masks"
    assert predict.main([str(out), str(images), "--out", str(masks)]) == 0
    for name, size in sizes.items():
        mask = Image.open(masks / f"{name}.png")
        assert mask.size == size
        assert set(np.unique(np.asarray(mask))) <= {0, 255}
        assert Image.open(masks / f"{name}_overlay.png").size == size
    for where, count in ((images / "wide.png", 1), (images / "*a*.png", 1)):
        some = tmp_path / f"some_{count}_{where.stem.strip('*')}"
        assert predict.main([str(out), str(where), "--out", str(some)]) == 0
        assert len(list(some.iterdir())) == 2 * count
    capsys.readouterr()

    (images / "broken.jpg").write_bytes(b"no image")
    (images / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    cut_off = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00"
    Image.new("RGB", (40, 40)).save(images / "turned.jpg", exif=cut_off)
    assert predict.main([str(out), str(images), "--out", str(tmp_path / "again")]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "broken.jpg: not a readable image" in said
    assert "drawing.png: not a readable image" in said
    done = {path.name for path in (tmp_path / "again").iterdir()}
    assert {f"{name}.png" for name in sizes} <= done, "the others are segmented all the same"
    assert predict.main([str(out), str(tmp_path / "none"), "--out", str(masks)]) == 2
    assert "none" in one_line(capsys)


def test_what_predict_takes_for_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photographs"
    for name in ("a.png", "b/c.JPG", "b/._c.png", "__MACOSX/d.png", ".thumbs/e.png", "._a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "Thumbs.db").touch()
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to("/nowhere/gone.png")
    (folder / "up").symlink_to(folder)
    (folder / "b" / "up").symlink_to(tmp_path)
    (folder / os.fsdecode(b"caf\xe9.png")).touch()

    def found(where: str) -> set[str]:
        return {str(path.relative_to(folder)) for path in predict.find_images(where)}

    here = {"a.png", "gone.png", os.fsdecode(b"caf\xe9.png")}
    assert found(str(folder)) == here
    assert found(f"{folder}/*.png") == here
    assert found(f"{folder}/**/*.[pJ]*") == here | {"b/c.JPG"}
    assert found(f"{folder}/**/c.*") == found(f"{folder}/*/c.*") == {"b/c.JPG"}
    assert found(f"{folder}/._a.png") == {"._a.png"}, "where it is named"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/photographs") == found("~/photographs/*.png") == here
    with pytest.raises(UserError, match="no images there"):
        predict.find_images(f"{folder}/none/**/*.png")


def test_a_tilde_is_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for command, given in (
        (run, ["--out=~/x", "--resume=~/x"]),
        (compare, ["--out=~/x", "--resume=~/x"]),
        (evaluate, ["~/x", "--out=~/x"]),
        (predict, ["~/x", "~/images", "--out=~/x"]),
        (calibrate, ["~/x"]),
    ):
        arguments = vars(command.parser().parse_args(given))
        paths = [*arguments.get("runs", []), arguments.get("out"), arguments.get("resume")]
        assert {path for path in paths if path is not None} == {tmp_path / "x"}, command.__name__
    (tmp_path / "a.yaml").write_text("base: ~/b.yaml\n")
    (tmp_path / "b.yaml").write_text("seed: 3\n")
    assert config.load("~/a.yaml").values == {"seed": 3}
    for start, said in (
        ("~/x.pt", f"{tmp_path}/x.pt: no such"),
        ("~nobody-at-all/x.pt", "no user"),
    ):
        path = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug", {"gan.pretrained": start})
        assert run.main([str(path), "--dry-run"]) == 2
        assert said in one_line(capsys)
    assert not list(tmp_path.glob("~*"))


def test_what_a_terminal_cannot_show_is_shown_in_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))

    def command(arguments: argparse.Namespace) -> int:
        make_console().print(os.fsdecode(b"caf\xe9 \xc3\xa9"))
        return 0

    assert guarded(command, argparse.Namespace()) == 0
    assert written.getvalue() == b"caf\\udce9 \\xe9\n"


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml")
    before = set(tmp_path.rglob("*"))
    assert run.main([str(config), "--dry-run", "--out", str(tmp_path / "never")]) == 0
    assert set(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert "stage training, 4 iterations" in said
    assert "segmentor (Segmentor)" in said
    assert "MiB" in said
    assert "GFLOP/iteration" in said
    # An override behind the flag is an override.
    assert run.main([str(config), "--dry-run", "engine.iterations=7"]) == 0
    assert "stage training, 7 iterations" in capsys.readouterr().out


def test_a_timed_dry_run_takes_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml")
    assert run.main([str(config), "--dry-run=timed", "engine.iterations=7"]) == 0
    said = capsys.readouterr().out
    assert "stage training, 7 iterations" in said
    assert "s/iteration" in said
    assert set(tmp_path.iterdir()) == {config}


def test_resume_takes_the_runs_own_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path)
    capsys.readouterr()
    assert run.main(["--resume", str(out), "engine.iterations=6"]) == 0
    assert json.loads((out / "results.json").read_text())["steps"] == 6
    capsys.readouterr()
    assert run.main(["--resume", str(out), "seed=5"]) == 2
    assert "seed differs" in one_line(capsys)
    config = str(tmp_path / "tiny.yaml")
    assert run.main([config, "--out", str(out)]) == 2
    assert "--resume" in one_line(capsys)
    assert run.main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert "config.yaml" in one_line(capsys)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("engine.iteration=5", "did you mean 'engine.iterations'"),
        ("engine.iterations=many", "engine.iterations"),
        ("system=superwised", "did you mean 'supervised'"),
        ("problems.segmentor.hypergradient.method=cq", "no hypergradient method"),
        ("problems.segmentor.hypergradient.damping=1", "hypergradient.damping: unknown key"),
        ("problems.segmentor.optimizer.betas=[0.9,0.99]", "betas"),
        ("data.name=kvasir", "kvasir"),
        ("device=abacus", "abacus"),
        ("device=mps", "device: 'mps' isn't supported"),
        ("device=meta", "device: 'meta' isn't supported"),
        ("device=xla:0", "device: 'xla:0' isn't supported"),
        ("engine.scoring=own", "engine.scoring"),
    ],
)
def test_mistakes_are_one_line(
    override: str,
    names: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLSEG_DATA", str(tmp_path / "empty"))
    config = tiny.write_config(tmp_path / "tiny.yaml")
    out = tmp_path / "run"
    assert run.main([str(config), override, "--out", str(out)]) == 2
    assert names in one_line(capsys)
    assert not out.exists(), "nothing was done"


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_the_list_of_data_sets_cuts_nothing(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert data_command.main([]) == 0
    said = capsys.readouterr().out
    for name in DATA_SETS.names():
        (line,) = [line for line in said.splitlines() if name in line.split()]
        assert data_set(name).source in line
    assert "…" not in said


def test_help_lists_the_systems(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "a segmentor alone, with or without augmentation" in said


def test_a_system_of_ones_own_by_dotted_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "single_level.py").write_text(
        """
import torch
from pathlib import Path
from mlseg import Engine, Problem
from mlseg.problems.systems import RunSettings

class Settings(RunSettings):
    rate: float = 0.1

class Fit(Problem):
    def training_step(self, batch):
        return (self(batch[0]) - 1).square().mean()

def build(settings: Settings, out: Path | None) -> Engine:
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), settings.rate)
    problem = Fit("fit", net, optimizer, [(torch.ones(1, 1),)])
    return Engine([problem], settings.engine, device=settings.device, out=out)
"""
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(
        "system: single_level:build\nrate: 0.2\nengine: {iterations: 3, tensorboard: false}\n"
    )
    assert run.main(["own.yaml", "--out", "run"]) == 0
    assert json.loads(Path("run/results.json").read_text())["steps"] == 3
    capsys.readouterr()
    assert run.main(["own.yaml", "rat=1"]) == 2
    assert "did you mean 'rate'" in one_line(capsys)
    assert run.main(["own.yaml", "system=games:bild"]) == 2
    assert "games:bild" in one_line(capsys)


def test_predictions_that_would_overwrite_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.png", "x_overlay.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert predict.main([str(tmp_path), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "x_overlay.png" in one_line(capsys)


def test_without_validation_data_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml")
    assert run.main([str(config), "data.val=0", "--out", str(tmp_path / "run")]) == 2
    assert "val" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_output_that_nobody_reads_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    config = tiny.write_config(tmp_path / "tiny.yaml")
    with open(writer, "w", buffering=1, encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "stderr", closed)
        assert run.main([str(config), "--out", str(tmp_path / "run")]) == 0
        assert sys.stdout is closed
    assert json.loads((tmp_path / "run/results.json").read_text())["steps"] == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_written_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path)
    capsys.readouterr()
    with monkeypatch.context() as patch, open("/dev/full", "w", encoding="utf-8") as full:
        patch.setattr(sys, "stdout", full)
        assert evaluate.main([str(out)]) == 1
    assert "failed: standard output: [Errno 28]" in one_line(capsys)


def test_a_checkpoint_cuts_off_no_file_but_the_runs_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, precious = train(tmp_path), tmp_path / "precious.txt"
    precious.write_text("precious")
    last = out / "checkpoints" / "last.pt"
    state = torch.load(last, weights_only=True)
    for offsets in ({str(precious): 0}, {"../made.txt": 0}, {"metrics.jsonl": -1}):
        state["records"]["offsets"] = offsets
        torch.save(state, last)
        capsys.readouterr()
        assert run.main(["--resume", str(out), "engine.iterations=6"]) == 2
        assert "records.offsets" in one_line(capsys)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "made.txt").exists()


def test_predict_overwrites_nothing_but_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images, masks = train(tmp_path), tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    Image.effect_noise((40, 40), 60).convert("RGB").save(images / "a.png")
    before = (images / "a.png").read_bytes()

    def said(*more: str, where: Path = masks) -> str:
        capsys.readouterr()
        assert predict.main([str(out), str(images), "--out", str(where), *more]) == 2
        return one_line(capsys)

    (tmp_path / "link").symlink_to(images)
    for where in (images, tmp_path / "link"):
        for more in ((), ("--overwrite",)):
            assert "is one of the images" in said(*more, where=where)
    assert (images / "a.png").read_bytes() == before
    assert "is a file; name a folder" in said(where=images / "a.png")

    masks.mkdir()
    theirs, target = masks / "a_overlay.png", tmp_path / "target.png"
    theirs.write_bytes(b"somebody's work")
    assert "a_overlay.png is there already" in said()
    theirs.unlink()
    target.write_bytes(b"elsewhere")
    theirs.symlink_to(target)
    assert "a_overlay.png is there already" in said()
    assert not (masks / "a.png").exists(), "refused before any work"

    again = [str(out), str(images), "--out", str(masks)]
    assert predict.main([*again, "--overwrite"]) == 0
    assert target.read_bytes() == b"elsewhere", "the link was replaced"
    assert not theirs.is_symlink()
    assert predict.main(again) == 0, "its own files are its to replace"
    assert {path.name for path in masks.iterdir()} == {"a.png", "a_overlay.png"}


def test_too_much_memory_or_too_many_threads_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tiny.write_config(tmp_path / "tiny.yaml"))
    out = ["--out", str(tmp_path / "run")]
    # Addresses that no machine has: refused at once by numpy, and by torch's allocator.
    for override in ("data.image_size=100000000", "segmentor.channels=10000000"):
        assert run.main([path, override, *out]) == 1
        assert "failed: out of memory (" in one_line(capsys)
    assert run.main([path, "threads=100000", *out]) == 2
    assert "threads: " in one_line(capsys)
    with pytest.raises(SystemExit):
        run.main([path, "--threads", "100000", *out])

    def raises(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run, "parse_run", raises)
    with pytest.raises(RuntimeError, match="a bug"):
        run.main([path, *out])


def test_names_that_look_like_markup_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_config(tmp_path / "tiny.yaml")
    assert run.main(["tiny.yaml", "--out", "[bold]a[/red]"]) == 0
    assert "All of it is in [bold]a[/red]" in capsys.readouterr().err
    assert evaluate.main(["[bold]a[/red]"]) == 0
    assert "[bold]a[/red]" in capsys.readouterr().out
