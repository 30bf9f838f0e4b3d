"""A user's own network, data set, optimizer and loss, from a folder outside the checkout.

The files are those of ``docs/own-parts.md``. They are used by config alone, and the trained model
is found again wherever the folder can be imported from.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commanding import one_line
from tiny_files import half_mask, write_image

from mlseg import checkpoint, evaluate, predict, run

PAGE = Path(__file__).parents[1] / "docs" / "own-parts.md"
BLOCK = re.compile(r"^```\w+\n# (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILES = dict(BLOCK.findall(PAGE.read_text()))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, as working directory; its modules are forgotten afterwards."""
    folder = tmp_path / "project"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for number in range(8):
        write_image(folder / f"dots/pictures/{number}.png", 20 * number, "RGB")
        write_image(folder / f"dots/labels/{number}.png", half_mask())
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLSEG_DATA", raising=False)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield folder
    _forget()


def _forget() -> None:
    from mlseg.segmentation.data import DATA_SETS

    for name in [name for name in sys.modules if name.split(".")[0] == "my_parts"]:
        del sys.modules[name]
    if "my_dots" in DATA_SETS:
        DATA_SETS.remove("my_dots")


def test_used_by_config_alone_and_found_again(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = project.parent / "run"
    assert run.main(["own.yaml", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["data"], results["provenance"], results["metric"]) == ("dots", "real", "dice")
    state = checkpoint.load(out / "checkpoints" / "best.pt")
    assert state["segmentor"]["settings"] == {"name": "my_parts.nets:MyNet", "width": 6}
    assert state["segmentor"]["module"] == "my_parts.nets"
    resolved = (out / "config.yaml").read_text()
    assert "gamma: 1.5" in resolved
    assert "weight_decay: 0.0" in resolved, "defaults too"
    assert run.main(["--resume", str(out), "engine.iterations=6"]) == 0

    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write_image(Path("new.png"), 200, "RGB")
    _forget()
    capsys.readouterr()
    prediction = [str(out), "new.png", "--out", "masks", "--trust"]
    for code in (evaluate.main([str(out)]), predict.main(prediction[:-1])):
        assert code == 2
    for line in capsys.readouterr().err.strip().splitlines():
        assert "give --trust, which imports my_parts.nets" in line
    for code in (evaluate.main([str(out), "--trust"]), predict.main(prediction)):
        assert code == 2
    note, *lines = dict.fromkeys(capsys.readouterr().err.strip().splitlines())
    assert note == "note: --trust: importing my_parts.nets"
    for line in lines:
        assert "best.pt: its segmentor is defined in my_parts.nets: can't import" in line
    monkeypatch.syspath_prepend(str(project))
    assert predict.main(prediction) == 0
    assert len(list(Path("masks").iterdir())) >= 1
    named = [str(out), "--data", "my_parts.data:my_set", "--root", str(project / "dots")]
    assert evaluate.main([*named, "--trust", "--out", "scores.json"]) == 0
    (scores,) = json.loads(Path("scores.json").read_text())["scores"].values()
    assert np.isfinite(scores["dice"])
    # The config itself names data relative to the folder that it was run in.
    monkeypatch.chdir(project)
    assert evaluate.main([str(out), "--trust"]) == 0


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("segmentor.widht=3", "segmentor.widht: unknown key; did you mean 'segmentor.width'?"),
        ("segmentor.width=0", "segmentor.width: should be greater than or equal to 1, got 0"),
        ("segmentor.width=wide", "segmentor.width: expected an integer, got the string 'wide'"),
        ("segmentor.name=my_parts.nets:MyNett", "did you mean my_parts.nets:MyNet?"),
        ("segmentor.name=my_part.nets:MyNet", "segmentor.name: segmentor 'my_part.nets:MyNet': "),
        ("loss.gamma=-1", "loss: loss 'my_parts.losses:Focal': gamma: 0 or more"),
        ("loss.beta=1", "loss.beta: unknown key; valid here: name, gamma"),
        ("problems.segmentor.optimizer.lr=fast", "problems.segmentor.optimizer.lr: expected a num"),
        ("problems.segmentor.optimizer.lr=null", "problems.segmentor.optimizer.lr: missing"),
        ("problems.segmentor.optimizer.name=my_parts.nets:MyNet", "must be a mlseg.config.loading"),
        ("data.options={sufix: jpg}", "data.options: sufix: unknown key; did you mean 'suffix'?"),
        ("data.name=my_dot", "data.name: no data set 'my_dot'; did you mean 'my_dots'?"),
        ("imports=[my_parts.dat]", "imports.0: can't import 'my_parts.dat'"),
        ("imports=my_parts.data", "imports: expected a list of modules, got the string"),
    ],
)
def test_mistakes_are_one_line(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["own.yaml", override, "--out", "run"]) == 2
    assert said in one_line(capsys)
    assert not Path("run").exists()
