"""A user's own folders and tables: in any layout, several masks, CSV files of any program."""

from pathlib import Path
from typing import Any

import pytest
from tiny_files import half_mask, write_image

from mlseg.errors import UserError
from mlseg.segmentation.data import DataSettings, load_data
from mlseg.segmentation.data.entry import data_set
from mlseg.segmentation.data.layout import find_examples


def own_layout(root: Path, **keys: Any) -> dict[str, int]:
    """The examples of a folder by id: how many masks each has."""
    found = find_examples(DataSettings(name="folder", root=str(root), **keys).entry, root)
    return {example.id: len(example.masks) for example in found["all"]}


@pytest.mark.parametrize(
    ("image", "masks", "keys"),
    [
        ("images/a.jpg", ["mask/a.png"], {"masks": "mask"}),
        ("images/a.jpg", ["masks/a_mask.png"], {"mask_pattern": "{id}_mask"}),
        ("images/a.jpg", ["images/a_mask.png"], {"masks": "images", "mask_pattern": "{id}_mask"}),
        ("a.jpg", ["a_m.png"], {"images": ".", "masks": ".", "mask_pattern": "{id}_m.png"}),
        (
            "img/a.jpg",
            ["gt/seg_a.gif"],
            {"images": "img", "masks": "gt", "mask_pattern": "seg_{id}"},
        ),
        (
            "benign/a.png",
            ["benign/a_mask.png", "benign/a_mask_1.png", "benign/a_mask_2.png"],
            {"images": "*", "masks": "*", "mask_pattern": "{id}_mask*"},
        ),
        (
            "a/images/a.png",
            ["a/masks/1.png", "a/masks/2.png"],
            {"images": "*/images", "masks": "{id}/masks", "mask_pattern": "*"},
        ),
    ],
)
def test_layouts_of_own_folders(
    image: str, masks: list[str], keys: dict[str, str], tmp_path: Path
) -> None:
    write_image(tmp_path / image, 5, "RGB")
    for mask in masks:
        write_image(tmp_path / mask, half_mask())
    assert own_layout(tmp_path, **keys) == {"a": len(masks)}


def test_several_masks_are_united_where_asked_for_alone(folder: Path) -> None:
    write_image(folder / "masks" / "p03.gif", half_mask()[:, ::-1].copy())
    with pytest.raises(UserError, match=r"p03\.gif: a second mask of that image, .*p03\.png; to"):
        own_layout(folder)
    assert own_layout(folder, mask_pattern="{id}.*")["p03"] == 2
    united = load_data(
        DataSettings(name="folder", root=str(folder), mask_pattern="{id}.*", image_size=[10, 12])
    )
    by_id: dict[str, Any] = {}
    for part in (united.train, united.val, united.test):
        by_id |= dict(zip(part.ids, part.masks, strict=True))
    assert by_id["p03"].all()
    assert by_id["p04"].float().mean() == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"masks": "/masks"}, r"data\.masks: '/masks' is no folder within data\.root"),
        ({"images": "../images"}, r"data\.images: '\.\./images' is no folder within"),
        ({"mask_pattern": "*_mask.png"}, r"data\.mask_pattern: .* doesn't say by \{id\}"),
        ({"masks": "images"}, r"data\.masks: 'images' is the images' folder too; say by"),
    ],
)
def test_faulty_layouts_of_own_folders(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(name="folder", **keys)


def test_layouts_are_for_own_folders() -> None:
    with pytest.raises(ValueError, match="masks is for name: folder; 'ph2' says where its own are"):
        DataSettings(name="ph2", masks="mask")


def test_where_masks_are_is_asked_for(folder: Path) -> None:
    (folder / "masks").rename(folder / "mask")
    with pytest.raises(UserError, match=r"without a mask; .* say by data\.masks and data"):
        find_examples(data_set("folder"), folder)


def pairs(folder: Path, *lines: str) -> Path:
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_pairs(folder: Path) -> None:
    path = pairs(
        folder,
        "mask,image,split",
        "masks/p01.png,images/p01.png,train",
        "masks/p02.png,images/p02.png,test",
    )
    for root in (path, folder):
        found = find_examples(data_set("pairs"), root)
        assert {part: [e.id for e in examples] for part, examples in found.items()} == {
            "train": ["p01"],
            "test": ["p02"],
        }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,label"], r"pairs\.csv: no column 'mask'"),
        (["image,mask"], r"pairs\.csv: no pairs"),
        ([], r"pairs\.csv: no column 'image'"),
        (["image,mask,mask"], r"pairs\.csv: the first line names mask twice"),
        (["image,mask", "", "a,b,c"], r"pairs\.csv:3: 3 cells under 2 columns; put names"),
        (["image,mask", '"a"b,c'], r"pairs\.csv: not a readable CSV file"),
        (["image,mask", "images/p01.png,"], r"pairs\.csv:2: a pair needs"),
        (["image,mask", "images/p99.png,masks/p01.png"], r"pairs\.csv:2: no file .*p99\.png"),
        (
            [
                "image,mask,split",
                "images/p01.png,masks/p01.png,train",
                "images/p01.png,masks/p01.png,test",
            ],
            r"pairs\.csv:3: id 'p01' is that of line 2 already",
        ),
        (
            ["image,mask,split", "images/p01.png,masks/p01.png,dev"],
            r"pairs\.csv:2: split 'dev'; there are",
        ),
        (
            [
                "image,mask,split",
                "images/p01.png,masks/p01.png,train",
                "images/p02.png,masks/p02.png,",
            ],
            r"missing for others",
        ),
    ],
)
def test_faults_in_pairs(folder: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_examples(data_set("pairs"), pairs(folder, *lines))


@pytest.mark.parametrize(
    ("separator", "begin", "end", "encoding"),
    [
        (",", "", "\n", "utf-8"),
        (";", "", "\r\n", "utf-8-sig"),
        ("\t", "# made by hand, on a Tuesday\n\n", "\n", "utf-16"),
        (", ", "\n", "\n\n", "utf-8"),
        (",", "", "\r", "utf-8"),
    ],
)
def test_pairs_as_programs_write_them(
    folder: Path, separator: str, begin: str, end: str, encoding: str
) -> None:
    rows = [
        ["Image", "mask", "split"],
        ["images/p01.png", "masks/p01.png", "train"],
        ["", "", ""],
        ["images/p02.png", '"masks/p02.png"', "test"],
        ["images/p03.png", "masks/none.png", "test"],
    ]
    text = begin + end.join(separator.join(row) for row in rows[:-1]) + end
    (folder / "pairs.csv").write_bytes(text.encode(encoding))
    found = find_examples(data_set("pairs"), folder)
    assert {part: [e.id for e in examples] for part, examples in found.items()} == {
        "train": ["p01"],
        "test": ["p02"],
    }
    text += end + "# the last one" + end + separator.join(rows[-1])
    (folder / "pairs.csv").write_bytes(text.encode(encoding))
    line = len(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    with pytest.raises(UserError, match=rf"pairs\.csv:{line}: no file .*none\.png"):
        find_examples(data_set("pairs"), folder)


def test_a_name_that_begins_as_a_comment_does(folder: Path) -> None:
    (folder / "#1.png").write_bytes((folder / "images" / "p01.png").read_bytes())
    path = pairs(folder, "image,mask", "#1.png,masks/p01.png", "#2.png,masks/p02.png")
    assert [e.id for e in find_examples(data_set("pairs"), path)["all"]] == ["#1"]


def test_no_csv_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.csv: not a readable CSV file"):
        find_examples(data_set("pairs"), tmp_path)
