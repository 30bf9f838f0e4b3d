"""Scores of padded images, at the masks' own sizes and at the padded one, by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_files import write_image
from torch import Tensor
from torch.nn import functional

from mlseg.segmentation import scoring
from mlseg.segmentation.data import DataSettings, Fit, Samples, load_data
from mlseg.segmentation.nets import decide
from mlseg.segmentation.scoring import at_native, label_map, score

SIZE = 24
IGNORED = 255
CLASSES = ["a", "b", "c"]


def padded_samples(folder: Path, shapes: list[tuple[int, int]]) -> Samples:
    """Samples of noise, in the order of these shapes: three classes, some pixels ignored."""
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(8, 8), *shapes]):  # one is for training
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        write_image(folder / "images" / f"{number}.png", image)
        mask = rng.choice([0, 1, 2, IGNORED], shape).astype(np.uint8)
        write_image(folder / "masks" / f"{number}.png", mask)
    lines = [f"images/{n}.png,masks/{n}.png,test" for n in range(1, len(shapes) + 1)]
    lines = ["image,mask,split", "images/0.png,masks/0.png,train", *lines]
    (folder / "pairs.csv").write_text("\n".join(lines))
    settings = DataSettings(
        name="pairs",
        root=str(folder),
        classes=CLASSES,
        ignore_index=IGNORED,
        image_size=SIZE,
        fit="pad",
        val=0,
    )
    test = load_data(settings).test
    return test.subset([test.ids.index(str(number)) for number in range(1, len(shapes) + 1)])


def predicted(image_BCHW: Tensor) -> Tensor:
    """Probabilities of three classes that change from pixel to pixel, in the padding too."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(1, 3, *image_BCHW.shape[-2:], generator=generator)
    return (own + image_BCHW).softmax(1)


def truth(folder: Path, samples: Samples, index: int) -> NDArray[np.uint8]:
    return np.asarray(Image.open(folder / "masks" / f"{samples.ids[index]}.png"))


def jaccards(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> list[float]:
    """By class, of all pixels together, one at a time."""
    inside, either = [0, 0, 0], [0, 0, 0]
    for found, true in pairs:
        for p, t in zip(found.flatten().tolist(), true.flatten().tolist(), strict=True):
            if t != IGNORED:
                for index in {p, t}:
                    either[index] += 1
                    inside[index] += p == t
    return [a / b for a, b in zip(inside, either, strict=True)]


def test_native_scores_of_what_fits_are_the_crops_own_and_the_trained_ones(tmp_path: Path) -> None:
    shapes = [(24, 24), (15, 23), (24, 9), (1, 5)]
    samples = padded_samples(tmp_path, shapes)
    probabilities = predicted(samples.images.float() / 127.5 - 1)
    pairs = []
    for index, (height, width) in enumerate(shapes):
        crop = probabilities[index, :, :height, :width].argmax(0).numpy().astype(np.uint8)
        pairs.append((crop, truth(tmp_path, samples, index)))
    expected = jaccards(pairs)
    for native in (True, False):
        found = score(predicted, samples, "cpu", native=native, batch_size=3).compute()
        assert [found[f"iou_{name}"] for name in CLASSES] == pytest.approx(expected), native


def test_native_scores_of_what_was_shrunk(tmp_path: Path) -> None:
    """The probabilities where the image lies, and no others, are brought to the mask's size."""
    places = {(48, 30): (24, 15), (20, 50): (10, 24), (31, 31): (24, 24)}
    samples = padded_samples(tmp_path, list(places))
    probabilities = predicted(samples.images.float() / 127.5 - 1)
    pairs = []
    for index, (native, (height, width)) in enumerate(places.items()):
        crop = probabilities[index : index + 1, :, :height, :width].clone()
        large = functional.interpolate(crop, native, mode="bilinear", align_corners=False)
        pairs.append((large[0].argmax(0).numpy().astype(np.uint8), truth(tmp_path, samples, index)))
    found = score(predicted, samples, "cpu", native=True, distances=True).compute()
    assert [found[f"iou_{name}"] for name in CLASSES] == pytest.approx(jaccards(pairs))
    trained = score(predicted, samples, "cpu").compute()
    at_size = [(probabilities[i].argmax(0).numpy(), samples.masks[i].numpy()) for i in range(3)]
    assert [trained[f"iou_{name}"] for name in CLASSES] == pytest.approx(jaccards(at_size))


def test_what_the_padding_is_taken_for_counts_nowhere(tmp_path: Path) -> None:
    samples = padded_samples(tmp_path, [(10, 20), (40, 10)])

    def otherwise(image_BCHW: Tensor) -> Tensor:
        found = predicted(image_BCHW)
        found[0, :, 10:], found[0, :, :, 20:] = 0.2, 0.7
        found[1, :, :, 6:] = torch.rand(3, 24, 18)
        return found

    for native in (True, False):
        figures = [
            score(by, samples, "cpu", native=native, distances=True).compute()
            for by in (predicted, otherwise)
        ]
        assert figures[0] == figures[1]


def test_stretched_probabilities_are_stretched_back() -> None:
    found = torch.rand(2, 3, 8, 6)
    expected = functional.interpolate(found, (5, 9), mode="bilinear", align_corners=False)
    assert torch.equal(at_native(found, (5, 9), "stretch"), expected)
    assert torch.equal(at_native(found, (8, 6), "stretch"), found)
    assert torch.equal(at_native(found, (8, 6), "pad"), found)
    assert torch.equal(at_native(found, (5, 4), "pad"), found[..., :5, :4])


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("at_once", [0, 10**9])
def test_a_label_map_class_by_class_is_the_decision_about_all(
    classes: int, fit: Fit, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(classes)
    found = torch.randn(1, classes, SIZE, SIZE, generator=generator).softmax(1)
    for native in ((SIZE, SIZE), (50, 37), (11, 90)):
        expected = decide(at_native(found, native, fit), 0.4)[0]
        assert torch.equal(label_map(found, native, fit, 0.4).long(), expected)
