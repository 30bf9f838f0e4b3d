"""``mlseg.load``: a run as a function of images, equal to what ``predict`` writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commanding import train
from numpy.typing import NDArray
from PIL import Image

import mlseg
from mlseg import calibrate, checkpoint, predict
from mlseg.errors import UserError

pytestmark = pytest.mark.slow  # trains for seconds


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of two classes on windows, and one of seven classes."""
    folder = tmp_path_factory.mktemp("runs")
    two = [
        train(folder, f"seed={n}", changes={"augmentation": {"window": 24}}, name=f"seed_{n}")
        for n in (1, 2)
    ]
    return [*two, train(folder, changes={"data.name": "synthetic_scenes"}, name="scenes")]


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    """(41, 50, 3), with much of it on either side of a decision."""
    return np.asarray(Image.effect_noise((50, 41), 80).convert("RGB").copy())


def written(runs: list[Path], image: Path, folder: Path) -> NDArray[np.uint8]:
    """The mask of the command, as class numbers."""
    assert predict.main([*map(str, runs), str(image), "--out", str(folder)]) == 0
    mask = np.asarray(Image.open(folder / f"{image.stem}.png"))
    return mask // 255 if mlseg.load(runs).ensemble.first.spec.num_classes == 2 else mask


@pytest.mark.parametrize("which", [[0], [0, 1], [2]])
def test_it_gives_what_predict_writes(
    which: list[int], runs: list[Path], picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    chosen = [runs[index] for index in which]
    image = tmp_path / "image.png"
    Image.fromarray(picture).save(image)
    expected = written(chosen, image, tmp_path / "masks")
    model = mlseg.load(chosen[0] if len(chosen) == 1 else chosen, device="cpu")
    tensor = torch.from_numpy(picture.copy()).movedim(-1, 0)
    for given in (
        str(image),
        image,
        Image.open(image),
        picture,
        picture.astype(np.float32) / 255,
        picture / 255,
        tensor,
        tensor.float() / 255,
        tensor.to("cpu", torch.float64).div(255).requires_grad_(),
    ):
        mask = model(given)
        assert (mask.dtype, mask.shape) == (np.uint8, (41, 50))
        assert np.array_equal(mask, expected), type(given)
    batches: list[Any] = [torch.stack([tensor, tensor.flip(-1)]), [picture, image]]
    for batch in batches:
        assert np.array_equal(model(batch)[0], expected)
    assert model(torch.stack([tensor, tensor])).shape == (2, 41, 50)
    chances = model(picture, probabilities=True)
    assert (chances.dtype, chances.shape) == (np.float32, (len(model.class_names), 41, 50))
    np.testing.assert_allclose(chances.sum(0), 1, atol=1e-5)
    decided = chances[1] > model.threshold if len(chances) == 2 else chances.argmax(0)
    assert np.array_equal(decided, expected)
    assert "seed_1" in repr(model) or "scenes" in repr(model)


def test_grey_16_bits_and_turned_files(runs: list[Path], tmp_path: Path) -> None:
    """In memory as in a file: grey repeated, 16 bits by the range in use, EXIF heeded."""
    model = mlseg.load(runs[0])
    wide = (np.arange(40 * 30).reshape(40, 30) * 3).astype(np.uint16)  # of 12 bits
    Image.fromarray(wide).save(tmp_path / "wide.png")
    grey = (wide >> 4).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.effect_noise((30, 40), 90).convert("RGB")
    turned.save(tmp_path / "turned.png", exif=exif)
    turned.save(tmp_path / "turned.tif", exif=exif)
    for name, array in (("wide.png", wide), ("grey.png", grey)):
        expected = written([runs[0]], tmp_path / name, tmp_path / name.split(".")[0])
        for given in (array, array[..., None], Image.open(tmp_path / name)):
            assert np.array_equal(model(given), expected), name
    assert np.array_equal(model(torch.from_numpy(grey)[None]), model(grey))
    for name in ("turned.png", "turned.tif"):
        expected = written([runs[0]], tmp_path / name, tmp_path / name.replace(".", "_"))
        assert expected.shape == (30, 40)
        lazy, loaded = Image.open(tmp_path / name), Image.open(tmp_path / name)
        loaded.load()
        for picture in (lazy, loaded):
            assert np.array_equal(model(picture), expected), name


def test_what_it_knows(runs: list[Path]) -> None:
    model = mlseg.load(runs[0], threshold=0.3)
    assert model.class_names == ("background", "lesion")
    assert (model.threshold, model.channels, model.image_size) == (0.3, 3, (32, 32))
    assert model.device == next(model.module.parameters()).device
    assert not model.module.training
    assert model.module(torch.zeros(2, 3, 32, 32)).shape == (2, 2, 32, 32)
    assert len(model.palette) == 2
    ensemble = mlseg.load(runs[:2])
    assert len(ensemble.modules) == 2
    assert ensemble.runs == tuple(runs[:2])
    with pytest.raises(UserError, match=r"ensemble of 2 networks; take them from model\.modules"):
        ensemble.module  # noqa: B018


def test_it_takes_what_calibrate_chose(runs: list[Path], picture: NDArray[np.uint8]) -> None:
    assert calibrate.main([str(runs[1]), "--k", "0.4", "--thresholds", "0.7"]) == 0
    model = mlseg.load(runs[1])
    assert model.threshold == 0.7
    assert mlseg.load(runs[1], threshold=0.2).threshold == 0.2
    chances = model(picture, probabilities=True)
    assert np.array_equal(model(picture), chances[1] > 0.7)


def test_threads_are_put_back(runs: list[Path], picture: NDArray[np.uint8]) -> None:
    before = torch.get_num_threads()
    assert mlseg.load(runs[0], threads=before + 1)(picture).any() in (True, False)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((3, 40, 50), np.uint8), r"an array of shape \(3, 40, 50\)"),
        (np.zeros((40, 50, 4), np.uint8), r"drop the transparency"),
        (np.zeros((2, 40, 50, 3), np.uint8), r"\(H, W\) or \(H, W, 3\) is expected"),
        (np.zeros((0, 50), np.uint8), "no pixels"),
        (np.zeros((40, 50), np.int64), "values of type int64"),
        (np.zeros((40, 50), bool), "values of type bool"),
        (np.full((40, 50), "a"), "values of type <U1"),
        (np.full((40, 50), np.nan), "NaN or infinite"),
        (np.full((40, 50, 3), np.inf, np.float32), "NaN or infinite"),
        (np.full((40, 50), 200.0), "floats from 200 to 200"),
        (torch.full((3, 40, 50), -1.0), "floats from -1 to -1"),
        (torch.zeros(40, 50), r"a tensor of shape \(40, 50\)"),
        (torch.zeros(4, 40, 50), r"a tensor of shape \(4, 40, 50\)"),
        (torch.zeros(2, 1, 2, 40, 50), "a tensor of shape"),
        (torch.zeros(0, 3, 40, 50), "a batch without images"),
        (torch.zeros(3, 40, 50, dtype=torch.complex64), "values of type complex64"),
        (torch.full((2, 3, 8, 8), float("nan")), "image 0: holds NaN"),
        ([np.zeros((8, 8), np.uint8), 3], "image 1: a int"),
        (None, "the image: a NoneType; a path, a PIL image"),
        (b"image.png", "the image: a bytes"),
        ("nowhere.png", "nowhere.png: not a readable image"),
        (Path(__file__), "test_model.py: not a readable image"),
        (Image.new("F", (8, 8)), "floating-point"),
        (Image.new("RGB", (0, 8)), "no pixels"),
    ],
)
def test_what_is_no_image_is_one_line(given: Any, said: str, runs: list[Path]) -> None:
    with pytest.raises(UserError, match=said) as caught:
        mlseg.load(runs[0])(given)
    assert "\n" not in str(caught.value)


def test_what_can_not_be_loaded_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    def said(named: Any, **how: Any) -> str:
        with pytest.raises(UserError) as caught:
            mlseg.load(named, **how)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such run directory" in said(tmp_path / "none")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "(damaged: it holds more than tensors and plain" in said(tmp_path / "module.pt")
    assert "config.yaml: truncated or not a checkpoint" in said(str(runs[0] / "config.yaml"))
    assert "no run is named" in said([])
    assert "is no path" in said([3])
    assert "neither best nor last" in said(runs[0], weights="first")
    assert "there is no user of that name" in said("~nobody-at-all/run")
    assert "device" in said(runs[0], device="abacus")
    assert "k: 0 isn't above 0" in said(runs[0], k=0)
    assert "threshold: 1 doesn't lie" in said(runs[0], threshold=1)
    assert "its classes are sky" in said([runs[0], runs[2]])

    interrupted = train(tmp_path, name="interrupted")
    best = interrupted / "checkpoints" / "best.pt"
    state = checkpoint.load(best)
    best.unlink()
    assert 'weights="last"' in said(interrupted)
    assert mlseg.load(str(interrupted), weights="last").class_names
    checkpoint.save(best, {**state, "segmentor": None})
    assert "this run has no segmentor" in said(interrupted)
    best.write_bytes(best.read_bytes()[:-100])
    assert "truncated or not a checkpoint" in said(interrupted)
    checkpoint.save(best, {**state, "segmentor": {**state["segmentor"], "module": "evil"}})
    assert "trust=True, which imports evil" in said(interrupted)
