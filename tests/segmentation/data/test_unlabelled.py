"""Images beside the splits, without their masks: which, and that no mask of theirs is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_files import half_mask, own, write_image

from mlseg.errors import UserError
from mlseg.segmentation.data import DataSettings, SegmentationData, load_data

pytestmark = pytest.mark.usefixtures("nowhere")


def load(folder: Path, unlabelled: int = 3, **changes: Any) -> SegmentationData:
    """Twelve pairs, of which seven are split up."""
    split = {"train": 3, "val": 2, "test": 2, "unlabelled": unlabelled}
    return load_data(own(folder, **split | changes))


def ids(data: SegmentationData) -> list[str]:
    assert data.unlabelled is not None
    return data.unlabelled.ids


def test_they_are_none_of_the_splits_and_change_none(folder: Path) -> None:
    data, plain = load(folder), load(folder, 0)
    assert plain.unlabelled is None
    assert "unlabelled" not in plain.manifest
    for split in ("train", "val", "test"):
        assert data.manifest[split] == plain.manifest[split]
        assert not set(ids(data)) & set(data.manifest[split])
    assert data.manifest["unlabelled"] == ids(data)
    assert len(set(ids(data))) == 3
    numbers = [int(name[1:]) for name in ids(data)]  # image pNN has the grey 20 NN
    assert data.unlabelled is not None
    assert data.unlabelled.images[:, 0, 0, 0].tolist() == [20 * number for number in numbers]
    json.dumps(data.manifest)


def test_the_draw_is_seeded_and_nested_and_the_hash_covers_it(folder: Path) -> None:
    assert load(folder).manifest == load(folder).manifest
    assert ids(load(folder, 2)) == ids(load(folder, 5))[:2]
    hashes = {load(folder, n).manifest["hash"] for n in (0, 2, 3)}
    assert len(hashes) == 3
    assert {load(folder, n).split_hash for n in (0, 2, 3)} == {load(folder, 0).manifest["hash"]}
    assert load(folder, split_seed=1).manifest["hash"] != load(folder).manifest["hash"]


@pytest.mark.parametrize("how", ["random", "missing", "no image at all", "of another size"])
def test_their_masks_are_not_read(folder: Path, how: str) -> None:
    before = load(folder)
    for name in ids(before):
        path = folder / "masks" / f"{name}.png"
        if how == "random":
            noise = torch.Generator().manual_seed(0)
            write_image(path, torch.randint(0, 256, (12, 12), generator=noise).byte().numpy())
        elif how == "missing":
            path.unlink()
        elif how == "of another size":
            write_image(path, half_mask()[:2])
        else:
            path.write_text("no mask")
    after = load(folder)
    assert after.manifest == before.manifest
    assert before.unlabelled is not None
    assert after.unlabelled is not None
    assert torch.equal(after.unlabelled.images, before.unlabelled.images)
    assert torch.equal(after.unlabelled.masks, before.unlabelled.masks)
    assert not after.unlabelled.masks.any()
    assert not after.changed(before.contents()), "nor do they belong to the run's files"


def test_an_image_without_a_mask_is_an_error_where_none_are_asked_for(folder: Path) -> None:
    (folder / "masks" / "p00.png").unlink()
    with pytest.raises(UserError, match="image without a mask"):
        load(folder, 0)


def test_padding_is_marked(folder: Path) -> None:
    for name in range(12):
        write_image(folder / "masks" / f"p{name:02d}.png", half_mask(value=1))
    settings: dict[str, Any] = {"fit": "pad", "ignore_index": 255, "classes": ["a", "b"]}
    data = load(folder, image_size=[40, 60], **settings)
    assert data.unlabelled is not None
    masks = data.unlabelled.masks
    assert set(masks.unique().tolist()) == {0, 255}
    assert torch.equal(masks == 255, (data.unlabelled.images[:, 0] == 128) & (masks == 255))


@pytest.mark.parametrize("number", [6, 1000])
def test_more_than_there_are(folder: Path, number: int) -> None:
    with pytest.raises(UserError) as caught:
        load(folder, number)
    text = str(caught.value)
    assert text.startswith(f"data.unlabelled: {number} images are asked for, and folder in ")
    assert "has 5 that no split uses; set it to 5 at most" in text
    assert "\n" not in text
    assert len(ids(load(folder, 5))) == 5


def test_none_left(folder: Path) -> None:
    with pytest.raises(UserError, match="has 0 that no split uses; make the splits smaller"):
        load(folder, 1, train=8)


def test_of_another_set(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "more"
    for number in range(4):
        write_image(other / "images" / f"q{number}.png", 9 * number, "RGB")
    more = {"unlabelled_from": "folder", "unlabelled_root": str(other)}
    data = load(folder, 4, **more)
    assert sorted(ids(data)) == ["q0", "q1", "q2", "q3"]
    with pytest.raises(UserError, match=r"data.unlabelled: 5 images .* has 4 that no split uses"):
        load(folder, 5, **more)
    # The same files under another name are used already.
    more = {"unlabelled_from": "folder", "unlabelled_root": str(folder)}
    assert len(ids(load(folder, 5, **more))) == 5
    with pytest.raises(UserError, match="has 5 that no split uses"):
        load(folder, 6, **more)
    with pytest.raises(UserError, match=r"data.unlabelled_from: no images of folder in .*nowhere"):
        load(
            folder, 1, unlabelled_from="folder", unlabelled_root="nowhere", when_missing="synthetic"
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unlabelled_root": "x"}, "unlabelled_root: is the folder of unlabelled_from"),
        ({"unlabelled": 0, "unlabelled_from": "ph2"}, "say by unlabelled how many"),
        ({"unlabelled_from": "ph3"}, "did you mean 'ph2'"),
        ({"unlabelled_from": "isic2018"}, "leave it out to draw from the data set itself"),
        ({"unlabelled_from": "ph2", "out_of_distribution": ["ph2"]}, "'ph2' is tested on"),
    ],
)
def test_mistakes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataSettings(**{"name": "isic2018", "unlabelled": 3, **changes})


def test_an_official_test_part_is_left_alone(tmp_path: Path) -> None:
    lines = ["image,mask,split"]
    for number in range(12):
        write_image(tmp_path / f"i{number}.png", 20 * number, "RGB")
        write_image(tmp_path / f"m{number}.png", half_mask())
        lines.append(f"i{number}.png,m{number}.png,{'test' if number < 5 else 'train'}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    settings: dict[str, Any] = {
        "name": "pairs",
        "root": str(tmp_path),
        "train": 3,
        "val": 2,
        "test": 2,
    }
    data = load_data(DataSettings(**settings, image_size=8, unlabelled=2))
    assert all(int(name[1:]) >= 5 for name in ids(data))
    with pytest.raises(UserError, match="has 2 that no split uses"):
        load_data(DataSettings(**settings, image_size=8, unlabelled=3))


def test_stand_ins_have_them_too() -> None:
    settings = {"name": "isic2018", "when_missing": "synthetic", "image_size": 16}
    settings |= {"train": 2, "val": 1, "test": 1, "unlabelled": 3}
    data = load_data(DataSettings.model_validate(settings))
    assert len(ids(data)) == 3
    assert data.unlabelled is not None
    assert not data.unlabelled.masks.any()
    used = {id for split in ("train", "val", "test") for id in data.manifest[split]}
    assert not used & set(ids(data))
    without = load_data(DataSettings.model_validate(settings), unlabelled=False)
    assert without.unlabelled is None
    assert without.manifest == data.manifest


def test_a_line_of_a_list_may_have_no_mask(tmp_path: Path) -> None:
    lines = ["image,mask"]
    for number in range(9):
        write_image(tmp_path / f"i{number}.png", 20 * number, "RGB")
        write_image(tmp_path / f"m{number}.png", half_mask())
        lines.append(f"i{number}.png,{'' if number < 3 else f'm{number}.png'}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    settings: dict[str, Any] = {"name": "pairs", "root": str(tmp_path), "image_size": 8}
    settings |= {"train": 3, "val": 1, "test": 1}
    data = load_data(DataSettings(**settings, unlabelled=4))
    assert {"i0", "i1", "i2"} < set(ids(data))
    with pytest.raises(UserError, match=r"pairs.csv:2: a pair needs an image and a mask"):
        load_data(DataSettings(**settings))
