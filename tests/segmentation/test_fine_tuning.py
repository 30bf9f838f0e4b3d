"""``init``: a run that starts from another one's weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commanding import one_line

from mlseg import checkpoint, export, run
from mlseg.problems.systems import parse_run
from mlseg.segmentation.nets.unet import UNet

pytestmark = pytest.mark.slow  # trains for seconds


def train(folder: Path, name: str, system: str = "supervised", **changes: Any) -> int:
    config = tiny.write_config(folder / f"{name}.yaml", system, changes)
    return run.main([str(config), "--out", str(folder / name)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    assert train(folder, "run") == 0
    return folder / "run"


def weights(out: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(out / "checkpoints" / "best.pt")
    found: dict[str, torch.Tensor] = state["problems"]["segmentor"]["module"]
    return found


def started(system: str, **changes: Any) -> dict[str, torch.Tensor]:
    """The segmentor's weights before the first step."""
    return {
        name.removeprefix("segmentor/"): tensor
        for name, tensor in tiny.weights(tiny.build(system, changes)).items()
        if name.startswith("segmentor/")
    }


@pytest.mark.parametrize("system", ["supervised", "e2eaug"])
def test_the_weights_are_taken_over(system: str, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    assert export.main([str(base), "--format", "torch", "--out", str(file)]) == 0
    theirs, fresh = weights(base), started(system)
    for named in (base, file, base / "checkpoints" / "best.pt"):
        found = started(system, init=str(named))
        assert tiny.same(found, theirs), named
    assert not tiny.same(fresh, theirs)


def test_other_draws_are_as_without(base: Path) -> None:
    """The data order, augmentation, other levels' weights: only the segmentor is another."""
    with_init, without = (
        tiny.build("e2eaug", {"init": init} if init else {}) for init in (str(base), None)
    )
    for mine, its in zip(with_init.problems, without.problems, strict=True):
        if mine.name != "segmentor":
            assert tiny.same(mine.module.state_dict(), its.module.state_dict()), mine.name


def test_other_classes_have_a_new_head(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = {"data.name": "synthetic_scenes"}
    theirs, fresh = weights(base), started("supervised", **scenes)
    found = started("supervised", init=str(base), **scenes)
    heads = {"head.weight", "head.bias"}
    for name, tensor in found.items():
        assert torch.equal(tensor, (fresh if name in heads else theirs)[name]), name
    capsys.readouterr()
    assert train(tmp_path, "tuned", init=str(base), **scenes) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "new head: its classes are others (background, lesion)" in said
    assert "new: head.weight, head.bias" in said
    record = json.loads((tmp_path / "tuned" / "results.json").read_text())["init"]["segmentor"]
    assert record["new"] == ["head.weight", "head.bias"]
    assert record["unused"] == ["head.weight", "head.bias"]
    assert record["loaded"] == record["tensors"] - 2 == len(theirs) - 2
    assert record["classes"] == ["background", "lesion"]
    assert record["digest"] == checkpoint.fingerprint(theirs)


def test_classes_of_other_names_have_a_new_head(base: Path, tmp_path: Path) -> None:
    """As many of them as before: what the outputs meant is another thing."""
    file = tmp_path / "other.pt"
    state = checkpoint.load(base / "checkpoints" / "best.pt")
    state["segmentor"]["classes"] = ["background", "nucleus"]
    checkpoint.save(file, state)
    theirs, fresh = weights(base), started("supervised")
    found = started("supervised", init=str(file))
    assert torch.equal(found["head.weight"], fresh["head.weight"])
    assert torch.equal(found["encoder.0.0.weight"], theirs["encoder.0.0.weight"])


def test_a_run_goes_on_without_the_file(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pt"
    assert export.main([str(base), "--format", "torch", "--out", str(file)]) == 0
    assert train(tmp_path, "tuned", init=str(file)) == 0
    out = tmp_path / "tuned"
    before = json.loads((out / "results.json").read_text())["init"]
    file.unlink()
    capsys.readouterr()
    assert run.main(["--resume", str(out), "engine.iterations=6"]) == 0
    assert "init: " in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text())["init"] == before
    assert run.main(["--resume", str(out), f"init={base}"]) == 2
    assert "init differs" in one_line(capsys)


def test_what_can_not_be_started_from_is_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(init: Any, **changes: Any) -> str:
        capsys.readouterr()
        assert train(tmp_path, "refused", init=str(init), **changes) == 2
        assert not (tmp_path / "refused").exists()
        return one_line(capsys)

    assert "init: " in said(tmp_path / "none")
    assert "no such run directory" in said(tmp_path / "none")
    assert "no such checkpoint; name the directory of a run" in said(tmp_path)
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    checkpoint.save(tmp_path / "bare" / "checkpoints" / "last.pt", {"segmentor": None})
    assert "this run has no segmentor to load" in said(tmp_path / "bare")
    assert "there is no user" in said("~nobody-at-all/run")
    file = tmp_path / "file.pt"
    file.write_bytes(b"no checkpoint")
    assert "truncated or not a checkpoint" in said(file)
    state = checkpoint.load(base / "checkpoints" / "best.pt")
    for damage, words in (
        ({"segmentor": None}, "no segmentor in it"),
        ({"problems": {}}, "doesn't fit the checkpoint"),
        ({"problems": {"segmentor": {"module": [1]}}}, "doesn't fit the checkpoint"),
        ({"problems": {"segmentor": {"module": {}}}}, "it is another network's"),
    ):
        checkpoint.save(file, {**state, **damage})
        assert words in said(file)
    tensors = dict(state["problems"]["segmentor"]["module"])
    tensors["head.bias"] = torch.full_like(tensors["head.bias"], float("nan"))
    checkpoint.save(file, {**state, "problems": {"segmentor": {"module": tensors}}})
    assert "head.bias is not finite" in said(file)
    other = {"segmentor.channels": 8}
    assert "it is another network's; name its settings under segmentor (name: unet" in (
        said(base, **other)
    )

    (tmp_path / "lone.py").write_text(
        "import torch\nfrom pathlib import Path\n"
        "from mlseg import Engine, Problem\nfrom mlseg.problems.systems import RunSettings\n"
        "class Fit(Problem):\n    def training_step(self, batch): return self(batch[0]).sum()\n"
        "def build(settings: RunSettings, out: Path | None) -> Engine:\n"
        "    net = torch.nn.Linear(1, 1)\n"
        "    step = torch.optim.SGD(net.parameters(), 1e-3)\n"
        "    fit = Fit('fit', net, step, [(torch.ones(1, 1),)])\n"
        "    return Engine([fit], settings.engine, device='cpu', out=out)\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lone.yaml").write_text("system: lone:build\n")
    capsys.readouterr()
    for more in (["--dry-run"], ["--out", str(tmp_path / "lone")]):
        assert run.main(["lone.yaml", f"init={base}", *more]) == 2
        assert "init: this system makes no segmentor that it could start" in one_line(capsys)


def test_both_see_pixels_in_the_same_range(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the tensors mean depends on it, and their names and shapes don't say it."""
    file = tmp_path / "unit.pt"
    state = checkpoint.load(base / "checkpoints" / "best.pt")
    state["segmentor"]["settings"]["normalise"] = "unit"
    checkpoint.save(file, state)
    other = {"segmentor.normalise": "unit"}
    for named, changes, mend in ((file, {}, "unit"), (base, other, "none")):
        capsys.readouterr()
        assert train(tmp_path, "refused", init=str(named), **changes) == 2
        line = one_line(capsys)
        assert f"init: {named}" in line
        assert f"set segmentor.normalise to {mend}" in line
        assert not (tmp_path / "refused").exists()
    assert tiny.same(started("supervised", init=str(file), **other), weights(base))


class Own(UNet):
    """Takes ``weights`` for itself, which then says nothing of pixels."""

    def __init__(self, in_channels: int, num_classes: int, *, weights: str = "drawn") -> None:
        super().__init__(in_channels, num_classes, channels=4, levels=2)


def test_a_network_with_weights_of_its_own_says_nothing_of_pixels(tmp_path: Path) -> None:
    out, own = tmp_path / "run", {"segmentor": {"name": f"{__name__}:Own", "weights": "imagenet"}}
    engine = tiny.build("supervised", own, out)
    engine.run()
    engine.results()
    assert tiny.same(started("supervised", init=str(out), **own), weights(out))
    network = {**own["segmentor"], "weights": "drawn"}
    assert tiny.same(started("supervised", init=str(out), segmentor=network), weights(out))


def test_settings_of_every_system_have_it(base: Path) -> None:
    from mlseg.config import Tree

    settings, _ = parse_run(Tree({**tiny.values("segan"), "init": str(base)}, source="test"))
    assert settings.init == str(base)
