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
from commanding import one_line, train, trained
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlseg import calibrate, compare, config, evaluate, predict, run
from mlseg import data as data_command
from mlseg.commands import guarded, make_console
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
    out = trained(tmp_path)
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
    text = Path("single_level.py").read_text()
    Path("unsaved.py").write_text(text.replace(", out=out", ""))
    assert run.main(["own.yaml", "system=unsaved:build", "--out", "other"]) == 2
    assert "pass it on: Engine(..., out=out)" in one_line(capsys)
    assert not Path("other").exists()


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
    out = trained(tmp_path)
    capsys.readouterr()
    with monkeypatch.context() as patch, open("/dev/full", "w", encoding="utf-8") as full:
        patch.setattr(sys, "stdout", full)
        assert evaluate.main([str(out)]) == 1
    assert "failed: standard output: [Errno 28]" in one_line(capsys)


def test_a_checkpoint_cuts_off_no_file_but_the_runs_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, precious = trained(tmp_path), tmp_path / "precious.txt"
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
