"""Sheets of pictures: where things are on them, and that classes can be told apart."""

from itertools import combinations

import numpy as np
import pytest
import torch

from mlseg.segmentation.data import DatasetSpec, DataSettings
from mlseg.segmentation.data.entry import DATA_SETS, data_set
from mlseg.segmentation.data.palettes import class_palette
from mlseg.segmentation.pictures import (
    FRAME,
    GAP,
    LINE,
    SIDE,
    TRUTH,
    TWO_CLASSES,
    colour,
    comparison,
    enlarged,
    heat,
    ignored_colour,
    overlay,
)

THREE = DatasetSpec("own", 3, ("background", "wall", "nucleus"), 255, palette=class_palette(3))


def drawn(height: int, width: int, spec: DatasetSpec, words: list[str] | None) -> np.ndarray:
    images = torch.full((2, 3, height, width), 200, dtype=torch.uint8)
    truths = torch.zeros(2, height, width, dtype=torch.uint8)
    truths[:, : height // 2] = 1
    truths[1, 0, 0] = 255 if spec.ignore_index == 255 else 0
    return comparison(images, truths, 1 - truths.clamp(max=1), spec, words)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 48), (300, 257)])
def test_panels_are_large_enough_and_in_their_places(height: int, width: int) -> None:
    times = max(1, -(-SIDE // min(height, width)))
    tall, wide = height * times, width * times
    assert min(tall, wide) >= SIDE
    sheet = drawn(height, width, THREE, ["one   dice 0.5", "two   dice 0.25"])
    assert sheet.shape[1] == 4 * (wide + GAP) + GAP
    top = LINE + 2 * GAP
    for _ in range(2):
        words = sheet[top : top + LINE + GAP // 2]
        assert words.min() < 100, "the row's name and score"
        top += LINE + GAP // 2
        panels = [sheet[top : top + tall, GAP + i * (wide + GAP) :][:, :wide] for i in range(4)]
        assert (panels[0] == 200).all()
        for i in range(4):
            left, right = GAP + i * (wide + GAP) - 1, GAP + i * (wide + GAP) + wide
            around = [sheet[(top - 1, top + tall), left : right + 1]]
            around.append(sheet[top : top + tall, (left, right)])
            assert all((edge == FRAME).all() for edge in around), "a line around each"
        assert panels[1][times, -1].tolist() == list(THREE.palette[1])
        assert panels[2][times, -1].tolist() == list(THREE.palette[0])
        assert panels[2][-1, -1].tolist() == list(THREE.palette[1])
        top += tall + GAP
    heads, legend = sheet[: LINE + GAP], sheet[top:]
    for i in range(4):
        assert heads[:, GAP + i * (wide + GAP) :][:, :100].min() < 100
    colours = {tuple(pixel) for pixel in legend.reshape(-1, 3)}
    assert {*THREE.palette, ignored_colour(THREE.palette)} <= colours


def test_names_are_written_whatever_they_hold() -> None:
    strange = ["caf\udce9 " * 60, "\u4e2d\u6587 \u00e9 " * 60]
    assert drawn(8, 8, THREE, strange).shape == drawn(8, 8, THREE, ["a", "b"]).shape
    many = DatasetSpec(
        "own", 3, tuple(f"class {i} " * 9 for i in range(40)), palette=class_palette(40)
    )
    assert drawn(8, 8, many, None).shape[0] > drawn(8, 8, THREE, None).shape[0] + 10 * LINE


def test_contours_grow_with_the_picture() -> None:
    widths = []
    for side in (32, 300, 1200):
        mask = np.zeros((side, side), np.uint8)
        mask[side // 4 : side // 2] = 1
        over = overlay(np.zeros((side, side, 3), np.uint8), mask, ((0, 0, 0), (255, 255, 255)))
        edge = (over == TWO_CLASSES).all(-1)
        assert edge[:, 5].sum() == edge[:, side // 2].sum()
        widths.append(edge[:, 5].sum() / 2)  # an edge above and one below
    assert widths == [1, 2, 8]


TWO = DatasetSpec("own", 3, ("background", "lesion"), None)


@pytest.mark.parametrize("spec", [TWO, THREE], ids=["two classes", "three"])
def test_probabilities_stand_beside_the_masks_with_their_scale(spec: DatasetSpec) -> None:
    images = torch.full((1, 3, SIDE, SIDE), 200, dtype=torch.uint8)
    truths = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    found = torch.zeros(1, spec.num_classes, SIDE, SIDE)
    found[:, 0], found[:, 1] = 0.8, 0.2
    found[0, :2, : SIDE // 2] = torch.tensor([0.1, 0.9])[:, None, None]
    labels = found.argmax(1).to(torch.uint8)
    plain = comparison(images, truths, labels, spec)
    sheet = comparison(images, truths, labels, spec, probabilities=found)
    assert sheet.shape[1] == plain.shape[1] + SIDE + GAP
    top, left = LINE + 2 * GAP, GAP + 3 * (SIDE + GAP)
    panel = sheet[top : top + SIDE, left : left + SIDE]
    low = 0.2 if spec.num_classes == 2 else 0.8  # the foreground's, or that of the class chosen
    assert (panel[: SIDE // 2] == heat(np.full((1, 1), 0.9))).all()
    assert (panel[SIDE // 2 :] == heat(np.full((1, 1), low))).all()
    shown = {tuple(pixel) for pixel in sheet[top + SIDE :].reshape(-1, 3)}
    assert {tuple(heat(np.full((1, 1), end))[0, 0]) for end in (0.0, 1.0)} <= shown


def test_heat_is_even_in_lightness_and_that_of_its_source() -> None:
    colormaps = pytest.importorskip("matplotlib").colormaps
    places = np.linspace(0, 1, 17)  # between them it is linear
    theirs = (colormaps["cividis"](places)[:, :3] * 255).round()
    # The nearest of 256 steps: off by half of one, in which no channel moves by more than 2.
    assert np.abs(heat(places[None])[0] - theirs).max() <= 2
    own = heat(np.linspace(0, 1, 256)[None])[0]
    for eyes in ("trichromat", *DICHROMATS):
        lightness = [seen(tuple(rgb), eyes)[0] for rgb in own[::16]]
        assert np.diff(lightness).min() > 1, eyes
    assert (heat(np.array([[-1.0, 2.0]])) == heat(np.array([[0.0, 1.0]]))).all()


def test_of_two_classes_the_truth_is_outlined_too() -> None:
    image = np.zeros((60, 60, 3), np.uint8)
    truth, predicted = np.zeros((2, 60, 60), np.uint8)
    truth[10:30, 10:30] = 1
    predicted[40:50, 40:50] = 1
    over = overlay(image, predicted, TWO.palette, truth)
    assert (over[20, 9:11] == TRUTH).all(-1).any()
    assert not (over[15:25, 15:25] == TRUTH).all(-1).any(), "an outline alone"
    assert (over[44, 39:42] == TWO_CLASSES).all(-1).any()
    assert not (overlay(image, predicted, TWO.palette) == TRUTH).all(-1).any()


def test_one_pixel_is_seen() -> None:
    assert enlarged(np.zeros((1, 1), np.uint8)).shape == (SIDE, SIDE)


# ------------------------------------------------------------------------- colours

# From linear RGB to what eyes without the cones for long, or for middle waves see: Vienot, Brettel
# and Mollon 1999, "Digital video colourmaps for checking the legibility of displays by dichromats".
LINEAR_TO_LMS = np.array(
    [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
)
DICHROMATS = {
    "protan": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
    "deutan": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of linear sRGB."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(np.clip(to_xyz @ linear, 0, None) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def seen(rgb: tuple[int, ...], eyes: str) -> np.ndarray:
    linear = (np.array(rgb) / 255) ** 2.2
    if eyes in DICHROMATS:
        lms = DICHROMATS[eyes] @ LINEAR_TO_LMS @ linear
        linear = np.clip(np.linalg.solve(LINEAR_TO_LMS, lms), 0, 1)
    return lab(linear)


@pytest.mark.parametrize("eyes", ["trichromat", *DICHROMATS])
def test_own_classes_are_told_apart_by_all_eyes(eyes: str) -> None:
    """A difference (CIE 1976) of 10 is seen at a glance; colours by an index's bits have 3.5."""
    colours = [seen(rgb, eyes) for rgb in class_palette(8)]
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) > 10


def test_palettes_have_a_colour_for_every_class() -> None:
    for number in (2, 3, 8, 21, 22, 23, 255):
        palette = class_palette(number)
        assert len(set(palette)) == len(palette) == number
    assert class_palette(2) == ((0, 0, 0), (255, 255, 255))
    settings = DataSettings(name="folder", classes=["a", "b", "c"])
    assert settings.entry.spec.palette == class_palette(3)


def test_what_is_ignored_has_no_classs_colour() -> None:
    for name in DATA_SETS.names():
        palette = data_set(name).spec.palette
        shown = colour(np.array([[255]], np.uint8), palette)[0, 0]
        assert tuple(shown) not in palette, name
