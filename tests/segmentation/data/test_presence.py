"""Classes that a split's masks don't hold: said, or refused where nothing could be learned."""

from pathlib import Path

import numpy as np
import pytest
from tiny_files import half_mask, own, write_image

from mlseg.errors import UserError
from mlseg.segmentation.data import load_data, load_examples
from mlseg.segmentation.data.samples import DatasetSpec

pytestmark = pytest.mark.usefixtures("nowhere")


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_an_ignore_index_that_takes_all_of_the_foreground(folder: Path, fit: str) -> None:
    with pytest.raises(UserError, match=r"no example of any split holds class 1 \(foreground\)"):
        load_data(own(folder, ignore_index=255, fit=fit))
    spec = DatasetSpec("folder", 3, ("background", "foreground"), 255)
    with pytest.raises(UserError, match="no example of any split holds class 1"):
        load_examples("folder", str(folder), (8, 8), spec)
    three = own(folder, ignore_index=255, classes=["a", "b", "c"])
    with pytest.raises(UserError, match=r"no example of any split holds class 1 \(b\)"):
        load_data(three)


def test_a_class_that_no_training_example_holds_is_said(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        write_image(path, half_mask(value=1))
    settings = own(folder, classes=["a", "b", "c", "d"])
    data = load_data(settings)
    assert data.notice == "No training example holds class 2 (c), 3 (d)."
    write_image(folder / "masks" / f"{data.val.ids[0]}.png", half_mask(value=2))
    assert load_data(settings).notice == data.notice, "validation isn't trained on"
    write_image(folder / "masks" / f"{data.train.ids[3]}.png", half_mask(value=2))
    assert load_data(settings).notice == "No training example holds class 3 (d)."
    write_image(folder / "masks" / f"{data.train.ids[1]}.png", half_mask(value=3))
    assert load_data(settings).notice is None


def fill(folder: Path, ids: list[str], value: int) -> None:
    """Masks of one number all over."""
    for id in ids:
        write_image(folder / "masks" / f"{id}.png", np.full((10, 12), value, np.uint8))


@pytest.mark.parametrize(("value", "name"), [(0, "0 (background)"), (255, "1 (foreground)")])
def test_training_masks_of_one_class_are_refused(folder: Path, value: int, name: str) -> None:
    data = load_data(own(folder))
    fill(folder, data.train.ids, value)
    with pytest.raises(UserError) as caught:
        load_data(own(folder))
    said = str(caught.value)
    assert said == (
        f"folder in {folder}: the masks of all 4 training images hold class {name} alone, from "
        "which no segmentation can be learned; check the masks there, or train on others "
        "(data.train, data.split_seed)"
    )
    fill(folder, [*data.val.ids, *data.test.ids], value)
    with pytest.raises(UserError, match=r"check the masks there$"):
        load_data(own(folder))


def test_a_single_mask_of_one_class_is_as_good_as_any(folder: Path) -> None:
    data = load_data(own(folder))
    fill(folder, [split.ids[0] for split in (data.train, data.val, data.test)], 0)
    assert load_data(own(folder)).notice is None


def test_of_several_classes_two_suffice_to_learn(folder: Path) -> None:
    data = load_data(own(folder))
    ids = [*data.train.ids, *data.val.ids, *data.test.ids]
    settings = own(folder, classes=["a", "b", "c"])
    fill(folder, ids, 2)
    with pytest.raises(UserError, match=r"all 4 training images hold class 2 \(c\) alone"):
        load_data(settings)
    fill(folder, ids[:1], 1)
    said = load_data(settings).notice
    assert said is not None
    assert said.startswith("No training example holds class 0 (a). The masks of all 2 validation")
    ignoring = own(folder, classes=["a", "b", "c"], ignore_index=255, fit="pad")
    fill(folder, ids[1:], 255)
    with pytest.raises(UserError, match=r"training images hold class 1 \(b\) alone"):
        load_data(ignoring)
    fill(folder, ids[:4], 255)
    fill(folder, ids[4:], 1)
    with pytest.raises(UserError, match="training images hold ignored pixels alone"):
        load_data(ignoring)


def test_validation_and_test_masks_of_one_class_are_said(folder: Path) -> None:
    data = load_data(own(folder, val=1))
    fill(folder, [*data.val.ids, *data.test.ids], 0)
    assert load_data(own(folder, val=1)).notice == (
        "The mask of the one validation image holds class 0 (background) alone: scores there "
        "hardly choose weights. The masks of all 3 test images hold class 0 (background) alone: "
        "scores there hardly tell how good they are."
    )
    fill(folder, data.val.ids, 255)
    assert "holds class 1 (foreground) alone" in str(load_data(own(folder, val=1)).notice)


def test_masks_that_are_not_read_may_be_of_one_class(folder: Path) -> None:
    data = load_data(own(folder, unlabelled=3))
    assert data.unlabelled is not None
    fill(folder, data.unlabelled.ids, 0)
    assert load_data(own(folder, unlabelled=3)).notice is None
