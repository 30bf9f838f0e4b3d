"""Exports: equal to ``mlseg.predict``, and refused in one line where they can't be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commanding import one_line
from PIL import Image
from torch import Tensor, nn

import mlseg
from mlseg import checkpoint, export, predict
from mlseg.segmentation import exporting
from mlseg.segmentation.data.given import resized
from mlseg.segmentation.nets import SEGMENTORS, SegmentorSettings, build_segmentor
from mlseg.segmentation.pipeline import Pipeline
from mlseg.segmentation.segmenting import brought

pytestmark = pytest.mark.slow  # exports for seconds


def made(folder: Path, name: str = "unet", **description: Any) -> Path:
    """The directory of a run that has just begun: random weights, statistics of noise."""
    options = {"unet": {"channels": 4, "levels": 2}, "segan": {"channels": 4, "levels": 3}}
    settings = SegmentorSettings.model_validate(
        {"name": name, **options.get(name, {}), **description.pop("settings", {})}
    )
    classes = description.get("classes", ["background", "lesion"])
    channels = description.get("in_channels", 3)
    torch.manual_seed(0)
    network = build_segmentor(settings, channels, len(classes))
    network(torch.randn(4, channels, 32, 32))
    about = {
        **settings.describe(),
        "in_channels": channels,
        "num_classes": len(classes),
        "image_size": [32, 40],
        "classes": classes,
        "ignore_index": None,
        "palette": [[index, 0, 0] for index in range(len(classes))],
        "metric": "jaccard",
        "problem": "segmentor",
        "precision": "fp32",
        **description,
    }
    about.pop("module", None)  # this one, which nobody else could import
    state = {
        "segmentor": about,
        "data": "drawn",
        "engine": {"global_step": 3},
        "problems": {"segmentor": {"module": network.state_dict()}},
    }
    checkpoint.save(folder / "run" / "checkpoints" / "best.pt", state)
    return folder / "run"


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (channels, height, width), dtype=np.uint8)


# -------------------------------------------------------------------------- the module of it all


def test_the_network_sees_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the sizes and the shapes: images are made smaller exactly as Pillow does it."""
    seen: list[Tensor] = []
    draw = np.random.default_rng(1)
    for fit in ("stretch", "pad"):
        ensemble = mlseg.load(made(tmp_path, fit=fit)).ensemble
        pipeline = Pipeline(ensemble)
        ensemble.first.module.register_forward_hook(lambda _m, given, _o: seen.append(given[0]))
        for seed in range(60):
            height, width = (int(side) for side in draw.integers(1, 150, 2))
            image = picture(height, width, seed=seed)
            seen.clear()
            with torch.no_grad():
                found, mask = pipeline(torch.from_numpy(image)[None])
            expected = brought(image, (32, 40), ensemble.first.fit)
            assert torch.equal(seen[0], torch.from_numpy(expected)[None] / 127.5 - 1.0)
            assert found.shape == (1, 2, height, width)
            assert mask.shape == (1, height, width)


def test_it_predicts_what_mlseg_predicts(tmp_path: Path) -> None:
    """Where logits are tempered, windows overlap and images are padded, too."""
    run = made(
        tmp_path, "segan", classes=["a", "b", "c"], window=[24, 16], fit="pad", temperature=0.7
    )
    model = mlseg.load(run)
    pipeline = Pipeline(model.ensemble)
    for size in ((32, 40), (71, 33), (20, 111), (9, 9)):
        image = picture(*size)
        with torch.no_grad():
            found, mask = pipeline(torch.from_numpy(image)[None])
        tensor = torch.from_numpy(image)
        expected = model(tensor, probabilities=True)
        np.testing.assert_allclose(found[0].numpy(), expected, atol=3e-6)
        sure = np.sort(expected, 0)[-1] - np.sort(expected, 0)[-2] > 1e-5
        assert np.array_equal(mask[0].numpy()[sure], model(tensor)[sure])
    assert resized(image, (9, 9)) is image


# ------------------------------------------------------------------------------------ the files


def by_onnx(path: Path, image: np.ndarray) -> list[np.ndarray]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == ["batch", image.shape[0], "height", "width"]
    return [part[0] for part in session.run(None, {"image": image[None]})]


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("unet", {"fit": "pad", "classes": ["a", "b", "c"]}),
        ("segan", {"window": [24, 24]}),
        ("deeplabv3", {}),
        ("fpn", {"settings": {"encoder": "resnet18"}}),
    ],
)
def test_onnx_gives_what_predict_gives(
    name: str, description: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    run = made(tmp_path, name, **description)
    assert export.main([str(run)]) == 0
    about = json.loads((run / "segmentor.onnx.json").read_text())
    assert about["classes"] == description.get("classes", ["background", "lesion"])
    assert about["threshold"] == 0.5
    assert about["checked"]["largest_difference"] <= 1e-5
    model = mlseg.load(run)
    for size in ((32, 40), (57, 90), (20, 17)):
        image = picture(*size)
        found, mask = by_onnx(run / "segmentor.onnx", image)
        expected = model(torch.from_numpy(image), probabilities=True)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
        assert mask.dtype == np.uint8
        assert mask.shape == size


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("unet", {"window": [24, 24], "in_channels": 1}),
        ("deeplabv3", {}),
        ("segan", {"window": [24, 24], "fit": "pad"}),
        ("fpn", {"settings": {"encoder": "resnet18"}}),
    ],
)
def test_torchscript_gives_what_predict_gives(
    name: str, description: dict[str, Any], tmp_path: Path
) -> None:
    run, out = made(tmp_path, name, **description), tmp_path / "model.ts"
    assert export.main([str(run), "--format", "torchscript", "--out", str(out)]) == 0
    files = {"mlseg.json": ""}
    read = torch.jit.load(str(out), _extra_files=files)
    assert json.loads(files["mlseg.json"])["classes"] == ["background", "lesion"]
    model = mlseg.load(run)
    for size in ((32, 40), (57, 90), (20, 17)):
        image = picture(*size, model.channels)
        with torch.no_grad():
            found, _ = read(torch.from_numpy(image)[None])
        expected = model(torch.from_numpy(image), probabilities=True)
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5, rtol=0)


def test_a_file_of_weights_is_loaded_as_a_run_is(tmp_path: Path) -> None:
    """With the k and threshold that were chosen, at the precision of the run."""
    run, out = made(tmp_path, precision="bf16"), tmp_path / "weights.pt"
    chosen = ["--k", "0.5", "--threshold", "0.4"]
    assert export.main([str(run), "--format", "torch", "--out", str(out), *chosen]) == 0
    model, image = mlseg.load(out), picture(50, 41)
    assert (model.threshold, model.ensemble.first.k) == (0.4, 0.5)
    expected = mlseg.load(run, k=0.5, threshold=0.4)
    for how in (False, True):
        mine, its = (m(torch.from_numpy(image), probabilities=how) for m in (model, expected))
        assert np.array_equal(mine, its)
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "image.png")
    assert predict.main([str(out), str(tmp_path / "image.png"), "--out", str(tmp_path / "m")]) == 0
    state = torch.load(out, weights_only=True)
    assert set(state) == {"format", "segmentor", "data", "engine", "problems", "export"}


# --------------------------------------------------------------------------- what can't be had


class Unusual(nn.Module):
    """Has an operator that no exporter knows."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.head(image))


class Unsteady(nn.Module):
    """Gives another answer each time."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image) + torch.rand(2, 1, 1)


@pytest.fixture
def own_networks() -> Any:
    SEGMENTORS.register("unusual")(Unusual)
    SEGMENTORS.register("unsteady")(Unsteady)
    yield
    SEGMENTORS.remove("unusual")
    SEGMENTORS.remove("unsteady")


@pytest.mark.usefixtures("own_networks")
def test_what_can_not_be_exported_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path, "unsteady")
    assert export.main([str(run), "--format", "torchscript"]) == 2
    assert "from mlseg's own, more than 1e-05; nothing is written" in one_line(capsys)
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    run = made(tmp_path, precision="bf16")
    assert export.main([str(run), "--format", "torchscript"]) == 2
    assert "--precision fp32 exports the same weights" in one_line(capsys)
    assert export.main([str(run), "--format", "torchscript", "--precision", "fp32"]) == 0
    capsys.readouterr()
    assert export.main([str(run), "--what", "generator", "--format", "torch"]) == 2
    assert "has none; it has segmentor" in one_line(capsys)
    assert export.main([str(tmp_path / "none")]) == 2
    assert "no such run directory" in one_line(capsys)
    assert export.main([str(run / "checkpoints" / "best.pt")]) == 2
    assert "a file; name the run directory that its weights are of" in one_line(capsys)
    assert export.main([str(run), "--format", "caffe"]) == 2
    assert "no such format; there are onnx, torch, torchscript" in one_line(capsys)
    state = checkpoint.load(run / "checkpoints" / "best.pt")
    checkpoint.save(run / "checkpoints" / "last.pt", {**state, "segmentor": None})
    assert export.main([str(run), "--weights", "last", "--format", "torch"]) == 2
    assert "this run has no segmentor to load" in one_line(capsys)

    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert export.main([str(run)]) == 2
    assert "--format onnx needs the extra 'export'" in one_line(capsys)


@pytest.mark.usefixtures("own_networks")
def test_an_operator_that_onnx_lacks_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    run = made(tmp_path, "unusual")
    capsys.readouterr()
    assert export.main([str(run)]) == 2
    said = one_line(capsys)
    assert "can't be written as onnx" in said
    assert "bessel_j0" in said
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    assert export.main([str(run), "--format", "torchscript"]) == 0


def test_export_overwrites_nothing_but_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path)

    def exported(*more: str) -> int:
        capsys.readouterr()
        return export.main([str(run), "--format", "torch", *more])

    theirs, about = tmp_path / "theirs.pt", tmp_path / "theirs.pt.json"
    for file, text in ((theirs, "precious"), (about, "[]"), (about, '{"software": 1}')):
        file.write_text(text)
        assert exported("--out", str(theirs)) == 2
        assert "is there already, and not by export" in one_line(capsys)
        assert file.read_text() == text
        file.unlink()
    theirs.write_text("precious")
    assert exported("--out", str(theirs), "--overwrite") == 0
    assert exported("--out", str(theirs)) == 0, "its own"
    theirs.write_bytes(theirs.read_bytes() + b"changed")
    assert exported("--out", str(theirs)) == 2
    assert exported("--out", str(tmp_path)) == 2
    assert "is a folder" in one_line(capsys)
    best = run / "checkpoints" / "best.pt"
    before = best.read_bytes()
    assert exported("--out", str(best), "--overwrite") == 2
    assert "--overwrite" not in one_line(capsys)
    (tmp_path / "link.pt").symlink_to(best)
    assert exported("--out", str(tmp_path / "link.pt"), "--overwrite") == 2
    assert best.read_bytes() == before
    assert exported() == 0
    assert exported() == 0


def test_every_format_has_a_suffix_and_a_writer() -> None:
    assert set(exporting.SUFFIXES) == set(exporting._WRITERS)
