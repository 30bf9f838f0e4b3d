"""Every data set's layout, as its official archive unpacks: names only, a few pixels each."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_files import half_mask, write_image

from mlseg.errors import UserError
from mlseg.segmentation.data import DataSettings, load_data
from mlseg.segmentation.data.decode import read_mask
from mlseg.segmentation.data.entry import DATA_SETS, data_set
from mlseg.segmentation.data.examples import decode
from mlseg.segmentation.data.layout import find_examples, list_files

_FPD = "Fetoscopy Placenta Dataset"
OFFICIAL: dict[str, tuple[list[str], dict[str, str]]] = {
    "isic2018": (
        [
            "ISIC2018_Task1-2_{Part}_Input/ISIC_{n:07d}.jpg",
            "ISIC2018_Task1_{Part}_GroundTruth/ISIC_{n:07d}_segmentation.png",
            "ISIC2018_Task1-2_{Part}_Input/LICENSE.txt",
            "ISIC2018_Task1-2_{Part}_Input/ATTRIBUTION.txt",
        ],
        {"train": "Training", "val": "Validation", "test": "Test"},
    ),
    "isic2017": (
        [
            "ISIC-2017_{Part}_Data/ISIC_{n:07d}.jpg",
            "ISIC-2017_{Part}_Data/ISIC_{n:07d}_superpixels.png",
            "ISIC-2017_{Part}_Part1_GroundTruth/ISIC_{n:07d}_segmentation.png",
        ],
        {"train": "Training", "val": "Validation", "test": "Test_v2"},
    ),
    "camvid": (
        ["{Part}/0001TP_{n:06d}.png", "{Part}annot/0001TP_{n:06d}.png"],
        {"train": "train", "val": "val", "test": "test"},
    ),
    "ph2": (
        [
            "PH2Dataset/PH2 Dataset images/IMD{n:03d}/IMD{n:03d}_Dermoscopic_Image/IMD{n:03d}.bmp",
            "PH2Dataset/PH2 Dataset images/IMD{n:03d}/IMD{n:03d}_lesion/IMD{n:03d}_lesion.bmp",
            "PH2Dataset/PH2 Dataset images/IMD{n:03d}/IMD{n:03d}_roi/IMD{n:03d}_R1_Label3.bmp",
        ],
        {"all": ""},
    ),
    "dermis": (
        [
            "Skin Image Data Set-1/skin_data/melanoma/dermis/{n}_orig.jpg",
            "Skin Image Data Set-1/skin_data/melanoma/dermis/{n}_contour.png",
            "Skin Image Data Set-2/skin_data/notmelanoma/dermquest/D{n}_orig.jpg",
        ],
        {"all": ""},
    ),
    "jsrt": (
        [
            "All247images/JPCLN{n:03d}.IMG",
            "scratch/fold1/masks/left lung/JPCLN{n:03d}.gif",
            "scratch/fold1/masks/right lung/JPCLN{n:03d}.gif",
            "scratch/fold1/masks/heart/JPCLN{n:03d}.gif",
        ],
        {"all": ""},
    ),
    "nlm_mc": (
        [
            "MontgomerySet/CXR_png/MCUCXR_{n:04d}_0.png",
            "MontgomerySet/ManualMask/leftMask/MCUCXR_{n:04d}_0.png",
            "MontgomerySet/ManualMask/rightMask/MCUCXR_{n:04d}_0.png",
        ],
        {"all": ""},
    ),
    "nlm_sz": (
        ["ChinaSet_AllFiles/CXR_png/CHNCXR_{n:04d}_0.png", "mask/CHNCXR_{n:04d}_0_mask.png"],
        {"all": ""},
    ),
    "busi": (
        [
            "Dataset_BUSI_with_GT/benign/benign ({n}).png",
            "Dataset_BUSI_with_GT/benign/benign ({n})_mask.png",
            "Dataset_BUSI_with_GT/normal/normal ({n}).png",
        ],
        {"all": ""},
    ),
    "fpd": (
        [
            f"{_FPD}/Vessel_segmentation_annotations/video01/images/anon001_{{n:05d}}.png",
            f"{_FPD}/Vessel_segmentation_annotations/video01/masks_gt/anon001_{{n:05d}}_mask.png",
            f"{_FPD}/Vessel_registration_unannotated_clips/video01/images/anon001_9{{n:04d}}.png",
        ],
        {"all": ""},
    ),
    "kvasir": (["Kvasir-SEG/images/cju{n}.jpg", "Kvasir-SEG/masks/cju{n}.jpg"], {"all": ""}),
    "voc2012": (
        [
            "VOCdevkit/VOC2012/JPEGImages/2007_{n:06d}.jpg",
            "VOCdevkit/VOC2012/SegmentationClass/2007_{n:06d}.png",
            "VOCdevkit/VOC2012/SegmentationObject/2007_{n:06d}.png",
            "VOCdevkit/VOC2012/JPEGImages/2008_9{n:05d}.jpg",
            "VOCdevkit/VOC2012/ImageSets/Segmentation/{Part}.txt",
        ],
        {"train": "train", "val": "val"},
    ),
    "cityscapes": (
        [
            "leftImg8bit/{Part}/ulm/ulm_{n:06d}_000019_leftImg8bit.png",
            "gtFine/{Part}/ulm/ulm_{n:06d}_000019_gtFine_labelIds.png",
            "gtFine/{Part}/ulm/ulm_{n:06d}_000019_gtFine_instanceIds.png",
            "gtFine/{Part}/ulm/ulm_{n:06d}_000019_gtFine_color.png",
        ],
        {"train": "train", "val": "val"},
    ),
    "stanford_background": (
        [
            "iccv09Data/images/60{n:05d}.jpg",
            "iccv09Data/labels/60{n:05d}.regions.txt",
            "iccv09Data/labels/60{n:05d}.layers.txt",
        ],
        {"all": ""},
    ),
    "folder": (["images/a {n}.tif", "masks/a {n}.png"], {"all": ""}),
}

ENTRIES = {name: data_set(name) for name in DATA_SETS.names()}


def write(root: Path, name: str, numbers: Sequence[int] = (1, 2, 3)) -> dict[str, str]:
    """A tiny copy; the numbers of a later part go on from those of the one before."""
    templates, parts = OFFICIAL[name]
    for step, (part, folder) in enumerate(parts.items()):
        for number in numbers:
            for template in templates:
                path = root / template.format(n=number + 10 * step, Part=folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.name in ("train.txt", "val.txt"):
                    with path.open("a", encoding="utf-8") as file:
                        file.write(f"2007_{number + 10 * step:06d}\n")
                elif path.name.endswith(".regions.txt"):
                    labels = np.where(half_mask((64, 64)) > 0, 1, -1)
                    np.savetxt(path, labels, fmt="%d")
                elif name == "cityscapes" and path.suffix == ".png" and "gtFine" in path.name:
                    write_image(path, half_mask((64, 64), 8))  # 8: sidewalk, class 1; 0: ignored
                elif name == "voc2012" and "SegmentationClass" in str(path):
                    write_image(path, half_mask((64, 64), 1), "P")
                elif path.suffix == ".txt":
                    path.write_text("terms")
                elif path.suffix == ".IMG":
                    np.full((2048, 2048), 1000, ">u2").tofile(path)
                elif "right" in str(path):
                    write_image(path, half_mask((64, 64))[:, ::-1].copy())
                elif path.suffix in (".jpg", ".tif") and "mask" not in str(path):
                    write_image(path, np.full((64, 64), 90, np.uint8), "RGB")
                elif part in ("train", "val", "test") and name == "camvid":
                    write_image(path, half_mask((64, 64), 11))
                else:
                    write_image(path, half_mask((64, 64)))
    return parts


def test_the_table_above_has_every_set_of_files() -> None:
    of_files = {name for name, entry in ENTRIES.items() if entry.layouts}
    assert of_files == set(OFFICIAL)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_layouts(name: str, tmp_path: Path) -> None:
    parts = write(tmp_path, name)
    entry = data_set(name)
    found = find_examples(entry, tmp_path)
    assert {part: len(examples) for part, examples in found.items()} == dict.fromkeys(parts, 3)
    examples = next(iter(found.values()))
    samples = decode(examples, entry, entry.spec, (32, 32))
    assert samples.images.shape == (3, entry.spec.channels, 32, 32)
    united = len(entry.layouts[0][next(iter(parts))].masks) == 2  # left and right lung
    foreground = 11 if name == "camvid" else 1
    assert (samples.masks == foreground).float().mean() == (1.0 if united else 0.5)


def test_a_nested_folder_is_no_obstacle_where_archives_bring_one(tmp_path: Path) -> None:
    write(tmp_path / "download" / "unpacked", "kvasir")
    assert len(find_examples(data_set("kvasir"), tmp_path)["all"]) == 3


def test_other_layouts_of_the_lungs(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "MCUCXR_0001_0.png", 90)
    write_image(tmp_path / "masks" / "MCUCXR_0001_0.png", half_mask())
    assert len(find_examples(data_set("nlm_mc"), tmp_path)["all"]) == 1


def test_several_masks_of_one_image_are_united(tmp_path: Path) -> None:
    write(tmp_path, "busi", (1,))
    base = tmp_path / "Dataset_BUSI_with_GT" / "benign"
    write_image(base / "benign (1)_mask_1.png", half_mask((64, 64))[:, ::-1].copy())
    entry = data_set("busi")
    (example,) = find_examples(entry, tmp_path)["all"]
    assert len(example.masks) == 2
    assert decode([example], entry, entry.spec, (16, 16)).masks.min() == 1


def test_images_without_a_mask_are_left_out_only_where_the_set_has_such(tmp_path: Path) -> None:
    write(tmp_path, "nlm_sz")
    (tmp_path / "mask" / "CHNCXR_0002_0_mask.png").unlink()
    assert [e.id for e in find_examples(data_set("nlm_sz"), tmp_path)["all"]] == [
        "CHNCXR_0001_0",
        "CHNCXR_0003_0",
    ]
    write(tmp_path, "nlm_mc")
    (tmp_path / "MontgomerySet/ManualMask/leftMask/MCUCXR_0002_0.png").unlink()
    with pytest.raises(UserError, match=r"MCUCXR_0002_0\.png: image without a mask"):
        find_examples(data_set("nlm_mc"), tmp_path)


def test_a_mask_without_an_image(folder: Path) -> None:
    (folder / "images" / "p03.png").unlink()
    with pytest.raises(
        UserError, match=r"masks.p03\.png: mask without an image; expected images/p03"
    ):
        find_examples(data_set("folder"), folder)


def test_an_image_without_a_mask(folder: Path) -> None:
    (folder / "masks" / "p03.png").unlink()
    with pytest.raises(UserError, match=r"images.p03\.png: image without.* expected masks/p03"):
        find_examples(data_set("folder"), folder)


def test_two_images_of_one_name(folder: Path) -> None:
    write_image(folder / "images" / "p03.jpg", 5)
    with pytest.raises(UserError, match=r"p03\.jpg: a second image of that name, .*p03\.png"):
        find_examples(data_set("folder"), folder)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures" / "a.png", 5)
    with pytest.raises(UserError, match="no image of isic2018 found; expected ISIC2018_Task1-2_Tr"):
        find_examples(data_set("isic2018"), tmp_path)


def test_hidden_files_are_no_data(folder: Path) -> None:
    (folder / "images" / "._p03.png").write_bytes(b"what macOS leaves")
    (folder / ".cache" / "images").mkdir(parents=True)
    assert len(find_examples(data_set("folder"), folder)["all"]) == 12


def test_each_folder_comes_once(folder: Path, tmp_path: Path) -> None:
    """Links above, to each other, out and in again; the folder's own names go before links."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    write_image(tmp_path / "elsewhere" / "deep" / "x.png", 5)
    links = {
        "again": folder,
        "all": folder.parent,
        "a_masks": folder / "masks",
        "images/up": folder,
        "out": tmp_path / "elsewhere",
        "out_too": tmp_path / "elsewhere" / "deep",
        "itself": folder / "itself",
        "top": Path("/"),
    }
    before = list_files(folder)
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    expected = [*before, "itself", "out/deep/x.png"]
    assert list_files(folder) == sorted(expected)
    assert len(find_examples(data_set("folder"), folder)["all"]) == 12
    (tmp_path / "link").symlink_to(folder)
    assert list_files(tmp_path / "link") == sorted(expected)


def test_what_systems_leave_behind_is_no_data(folder: Path) -> None:
    for place in (folder, folder / "images", folder / "masks"):
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._p03.png", ".hidden.png"):
            (place / name).write_bytes(b"what systems leave")
        (place / "__MACOSX").mkdir()
        (place / "__MACOSX" / "p01.png").write_bytes(b"what macOS leaves")
    assert len(find_examples(data_set("folder"), folder)["all"]) == 12


@pytest.mark.parametrize("to", ["/nowhere/p03.png", "p03.png"])
def test_a_link_to_nothing_is_one_line_with_and_without_a_cache(
    folder: Path, tmp_path: Path, to: str
) -> None:
    for part in ("images", "masks"):
        path = folder / part / "p03.png"
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(to)
        said = set()
        for cache in (None, str(tmp_path / "cache")):
            settings = DataSettings(name="folder", root=str(folder), cache_dir=cache)
            with pytest.raises(UserError, match=rf"{part}.p03\.png: not a readable image") as error:
                load_data(settings)
            said.add(str(error.value))
        assert len(said) == 1
        path.unlink()
        path.write_bytes(content)


def test_names_that_are_not_utf_8(folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    for part in ("images", "masks"):
        try:
            (folder / part / "p03.png").rename(folder / part / name)
        except OSError:
            pytest.skip("this file system takes UTF-8 alone")
    cache = str(tmp_path / "cache")
    data = load_data(DataSettings(name="folder", root=str(folder), image_size=8, cache_dir=cache))
    ids = {*data.train.ids, *data.val.ids, *data.test.ids}
    assert os.fsdecode(b"caf\xe9") in ids
    assert len(json.loads(json.dumps(data.manifest))["hash"]) == 64
    (folder / "pairs.csv").write_bytes(b"image,mask\nimages/caf\xe9.png,masks/caf\xe9.png\n")
    assert len(find_examples(data_set("pairs"), folder)["all"]) == 1


def test_letters_that_macos_takes_apart(folder: Path) -> None:
    """One name, by other code points: as a folder copied from there has it, in whole or in part."""
    whole, apart = "caf\u00e9.png", "cafe\u0301.png"
    (folder / "images/p03.png").rename(folder / "images" / whole)
    (folder / "masks/p03.png").rename(folder / "masks" / apart)
    found = {e.id: e for e in find_examples(data_set("folder"), folder)["all"]}
    example = found["caf\u00e9"]
    assert (example.image.name, [m.name for m in example.masks]) == (whole, [apart])
    # With one under each spelling they are two masks of one image.
    (folder / "masks" / whole).write_bytes((folder / "masks" / apart).read_bytes())
    with pytest.raises(UserError, match="second mask"):
        find_examples(data_set("folder"), folder)


def test_voc_is_what_its_lists_say(tmp_path: Path) -> None:
    write(tmp_path, "voc2012")
    entry = data_set("voc2012")
    found = find_examples(entry, tmp_path)
    assert [e.id for e in found["val"]] == ["2007_000011", "2007_000012", "2007_000013"]
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "val.txt").write_text("2007_000999\n")
    with pytest.raises(UserError, match="2007_000999 is listed for the part val, but there is no"):
        find_examples(entry, tmp_path)
    (lists / "val.txt").unlink()
    with pytest.raises(UserError, match=r"no ImageSets/Segmentation/val\.txt, which lists"):
        find_examples(entry, tmp_path)


def test_labels_that_are_no_class_are_ignored(tmp_path: Path) -> None:
    for name in ("cityscapes", "stanford_background"):
        write(tmp_path / name, name)
        entry = data_set(name)
        (example, *_) = next(iter(find_examples(entry, tmp_path / name).values()))
        masks = decode([example], entry, entry.spec, (64, 64)).masks
        assert masks[0, 0, 0] == 1
        assert masks[0, 0, -1] == entry.spec.ignore_index
    (tmp_path / "broken.regions.txt").write_text("1 2\n3 x\n")
    with pytest.raises(UserError, match=r"broken\.regions\.txt: not a readable image"):
        read_mask(tmp_path / "broken.regions.txt", "index", 8, 255)


def test_sets_whose_test_labels_are_kept_back(tmp_path: Path) -> None:
    write(tmp_path, "voc2012")
    settings = {"name": "voc2012", "root": str(tmp_path), "image_size": 32}
    data = load_data(DataSettings.model_validate(settings))
    assert (len(data.train), len(data.val), len(data.test)) == (3, 3, 0)
    with pytest.raises(UserError, match="test labels of voc2012 are not public"):
        load_data(DataSettings.model_validate(settings | {"test": 2}))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of three images and masks."""
    for number in range(3):
        write_image(tmp_path / f"images/{number}.png", 20 * number, "RGB")
        write_image(tmp_path / f"masks/{number}.png", half_mask())
    return tmp_path


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.png").touch()
        (tmp_path / name / "up").symlink_to(tmp_path)
        (tmp_path / name / "other").symlink_to(tmp_path / ("b" if name == "a" else "a"))
    assert set(list_files(tmp_path)) == {"a/file.png", "b/file.png"}  # each folder once


def test_more_files_than_a_data_set_has(small: Path) -> None:
    assert len(list_files(small, 8)) == 6  # and two folders
    with pytest.raises(UserError, match=r"more than 7 files.*data\.max_files"):
        list_files(small, 7)
    with pytest.raises(UserError, match=r"data\.max_files"):
        load_data(DataSettings(name="folder", root=str(small), max_files=3))


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pairs.csv")
    with pytest.raises(UserError, match="a pipe or a device"):
        find_examples(data_set("pairs"), tmp_path)
    (tmp_path / "own.csv").write_text("image,mask\n" + "x" * 300 + ",b.png\n")
    with pytest.raises(UserError, match=r"own\.csv:2: .*File name too long"):
        find_examples(data_set("pairs"), tmp_path / "own.csv")
