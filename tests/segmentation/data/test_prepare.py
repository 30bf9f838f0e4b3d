from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from tiny_files import half_mask, own, write_image

from mlseg.config import load, parse
from mlseg.errors import UserError
from mlseg.segmentation.data import DataSettings, load_data, load_examples
from mlseg.segmentation.data.entry import DATA_SETS, data_set
from mlseg.segmentation.data.samples import DatasetSpec
from mlseg.segmentation.data.settings import resolve_root

pytestmark = pytest.mark.usefixtures("nowhere")


def test_own_folder(folder: Path) -> None:
    data = load_data(own(folder))
    assert (len(data.train), len(data.val), len(data.test)) == (4, 2, 3)
    assert data.provenance == "real"
    assert data.notice is None
    assert data.spec.classes == ("background", "foreground")
    assert data.train.images.shape == (4, 3, 16, 16)
    assert data.train.masks.float().mean() == 0.5
    assert data.manifest["train"] == data.train.ids
    assert data.manifest["how"] == "drawn"
    numbers = [int(name[1:]) for name in data.train.ids]  # image pNN has the grey 20 NN
    assert data.train.images[:, 0, 0, 0].tolist() == [20 * number for number in numbers]
    again = load_data(own(folder))
    assert again.manifest == data.manifest
    assert load_data(own(folder, split_seed=1)).manifest["hash"] != data.manifest["hash"]


def test_own_classes_channels_and_size(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        write_image(path, half_mask(value=2))
    settings = own(folder, classes=["a", "b", "c"], channels=1, metric="dice", image_size=[12, 20])
    data = load_data(settings)
    assert data.train.images.shape == (4, 1, 12, 20)
    assert data.train.masks.unique().tolist() == [0, 2]
    assert data.spec.metric == "dice"
    assert len(set(data.spec.palette)) == 3
    write_image(folder / "masks" / f"{data.val.ids[0]}.png", half_mask(value=3))
    with pytest.raises(UserError, match=rf"{data.val.ids[0]}\.png: mask value 3 is none of the 3"):
        load_data(settings)
    two = own(folder, classes=["a", "b"], ignore_index=2)
    with pytest.raises(UserError, match="mask value 3"):
        load_data(two)
    for id in (data.val.ids[0], data.train.ids[0]):
        write_image(folder / "masks" / f"{id}.png", half_mask(value=1))
    assert load_data(two).train.masks.unique().tolist() == [0, 1, 2]


def test_pairs_with_official_splits(folder: Path) -> None:
    lines = ["image,mask,split"]
    for number, split in enumerate(["train"] * 5 + ["val"] * 2 + ["test"] * 3):
        lines.append(f"images/p{number:02d}.png,masks/p{number:02d}.png,{split}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    data = load_data(DataSettings(name="pairs", root=str(folder / "pairs.csv"), image_size=8))
    assert sorted(data.train.ids) == [f"p{n:02d}" for n in range(5)]
    assert sorted(data.test.ids) == ["p07", "p08", "p09"]
    assert data.manifest["how"] == "official"


def test_the_official_test_part_and_a_drawn_validation(folder: Path) -> None:
    """No official validation image is seen; the seed draws within the training part."""
    parts = ["train"] * 6 + ["val"] * 2 + ["test"] * 3
    lines = [f"images/p{n:02d}.png,masks/p{n:02d}.png,{part}" for n, part in enumerate(parts)]
    (folder / "pairs.csv").write_text("\n".join(["image,mask,split", *lines]))
    keys: dict[str, Any] = {"name": "pairs", "root": str(folder / "pairs.csv"), "image_size": 8}
    keys |= {"splits": "official_test", "train": 4, "val": 2}
    drawn = set()
    for seed in range(4):
        data = load_data(DataSettings(**keys, split_seed=seed))
        assert {*data.train.ids, *data.val.ids} == {f"p{n:02d}" for n in range(6)}
        assert sorted(data.test.ids) == ["p08", "p09", "p10"]
        assert data.manifest["how"] == "official_test"
        drawn.add(frozenset(data.val.ids))
    assert len(drawn) > 1


def test_more_than_there_is(folder: Path) -> None:
    with pytest.raises(UserError, match="has 12 examples, but train"):
        load_data(own(folder, train=40))


def test_beyond_the_memory_limit_files_are_mapped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    in_memory = load_data(own(folder))
    assert not in_memory.train.mapped
    mapped = load_data(own(folder, memory_limit_mib=0))
    assert mapped.train.mapped
    assert len(list((tmp_path / "caches" / "mlseg").iterdir())) == 3
    assert torch.equal(mapped.train.images, in_memory.train.images)
    chosen = load_data(own(folder, cache_dir=str(tmp_path / "chosen")))
    assert chosen.train.mapped
    assert len(list((tmp_path / "chosen").iterdir())) == 3


@pytest.mark.parametrize("empty", [False, True])
def test_missing_data_are_an_error_that_says_where_to_get_them(tmp_path: Path, empty: bool) -> None:
    root = tmp_path / "isic"
    if empty:
        root.mkdir()
    with pytest.raises(UserError) as error:
        load_data(DataSettings(name="isic2018", root=str(root)))
    text = str(error.value)
    assert "\n" not in text
    for part in (str(root), "challenge.isic-archive.com", "ISIC2018_Task1_Training_GroundTruth"):
        assert part in text
    with pytest.raises(UserError, match="jsrt can't be downloaded by program; get it from"):
        load_data(DataSettings(name="jsrt", root=str(root), when_missing="download"))


def test_a_wrong_folder_is_an_error_even_where_a_stand_in_would_do(tmp_path: Path) -> None:
    write_image(tmp_path / "isic" / "pictures" / "a.png", 5)
    settings = DataSettings(name="isic2018", root=str(tmp_path / "isic"), when_missing="synthetic")
    with pytest.raises(UserError, match="no image of isic2018 found"):
        load_data(settings)


@pytest.mark.parametrize(
    "name", [name for name in DATA_SETS.names() if name not in ("folder", "pairs")]
)
def test_stand_ins_have_the_shape_of_what_they_stand_for(name: str) -> None:
    sizes: dict[str, Any] = {"train": 6, "val": 2, "test": 4, "image_size": [16, 24]}
    data = load_data(DataSettings(name=name, when_missing="synthetic", **sizes))
    spec = data_set(name).spec
    assert data.provenance == "synthetic"
    assert data.manifest["provenance"] == "synthetic"
    assert data.notice is not None
    assert "SYNTHETIC" in data.notice
    assert name in data.notice
    assert data.spec == spec
    assert data.train.images.shape == (6, spec.channels, 16, 24)
    values = set(data.train.masks.unique().tolist())
    assert values <= {*range(spec.num_classes), spec.ignore_index}
    assert len(values) >= min(spec.num_classes, 5)
    assert (len(data.val), len(data.test)) == (2, 4)
    assert len({*data.train.ids, *data.val.ids, *data.test.ids}) == 12


def test_a_stand_in_for_own_classes() -> None:
    settings: dict[str, Any] = {
        "name": "folder",
        "when_missing": "synthetic",
        "image_size": 24,
        "train": 20,
    }
    data = load_data(DataSettings(**settings, classes=["a", "b", "c"], channels=1))
    assert data.train.images.shape[1] == 1
    assert data.train.masks.unique().tolist() == [0, 1, 2]


def test_stand_ins_out_of_distribution_look_different() -> None:
    settings = DataSettings(
        name="isic2018",
        when_missing="synthetic",
        image_size=16,
        train=6,
        out_of_distribution=["ph2", "dermis"],
    )
    data = load_data(settings)
    assert list(data.out_of_distribution) == ["ph2", "dermis"]
    ph2, dermis = data.out_of_distribution.values()
    assert ph2.spec.name == "ph2"
    assert not torch.equal(ph2.masks, dermis.masks)
    assert data.manifest["out_of_distribution"]["ph2"]["test"] == ph2.ids


def tiny_set(root: Path, name: str) -> Path:
    for number in range(1, 9):
        if name == "ph2":
            base, mask_name = f"IMD{number:03d}", f"IMD{number:03d}_lesion.png"
        else:
            base, mask_name = f"{number}", f"{number}.png"
        write_image(root / "images" / f"{base}.png", 20 * number, "RGB")
        write_image(root / "masks" / mask_name, half_mask())
    return root


def test_real_out_of_distribution_sets_are_whole_and_missing_ones_are_named(tmp_path: Path) -> None:
    tiny_set(tmp_path / "data" / "dermis", "dermis")
    tiny_set(tmp_path / "elsewhere", "ph2")
    settings: dict[str, Any] = {
        "name": "ph2",
        "root": "elsewhere",
        "image_size": 8,
        "out_of_distribution": ["dermis", "isic2018"],
    }
    with pytest.raises(UserError, match="no data of isic2018"):
        load_data(DataSettings(**settings))
    data = load_data(DataSettings(**settings, when_missing="synthetic"))
    assert data.provenance == "real"
    assert list(data.out_of_distribution) == ["dermis"]
    assert len(data.out_of_distribution["dermis"]) == 8
    assert data.notice is not None
    assert "Not tested on, because missing: isic2018" in data.notice


def test_an_out_of_distribution_set_that_shares_images(tmp_path: Path) -> None:
    for name in ("ISIC2018_Task1-2_Training_Input", "ISIC-2017_Test_v2_Data"):
        for number in range(6):
            path = tmp_path / "data" / ("isic2018" if "2018" in name else "isic2017") / name
            write_image(path / f"ISIC_{number:07d}.jpg", 9, "RGB")
            masks = name.replace("1-2_Training_Input", "1_Training_GroundTruth")
            masks = masks.replace("v2_Data", "v2_Part1_GroundTruth")
            write_image(path.parent / masks / f"ISIC_{number:07d}_segmentation.png", half_mask())
    settings = DataSettings(name="isic2018", out_of_distribution=["isic2017"], image_size=8)
    with pytest.raises(UserError, match=r"ISIC_000000\d of isic2017 is in isic2018 too"):
        load_data(settings)


def test_classes_must_fit(tmp_path: Path) -> None:
    tiny_set(tmp_path / "data" / "dermis", "dermis")
    settings = DataSettings(name="dermis", out_of_distribution=["camvid"], image_size=8)
    with pytest.raises(UserError, match="camvid has 11 classes and can't test a model of 2"):
        load_data(settings)


def test_examples_for_scoring_a_trained_model(tmp_path: Path, folder: Path) -> None:
    tiny_set(tmp_path / "data" / "dermis", "dermis")
    spec = DatasetSpec("jsrt", 1, ("background", "lung"))
    samples = load_examples("dermis", None, (8, 8), spec)
    assert samples.images.shape == (8, 1, 8, 8)
    assert len(load_examples("folder", str(folder), (8, 8), spec)) == 12
    assert len(load_examples("synthetic_lesions", None, (8, 8), spec)) == 200
    with pytest.raises(UserError, match="no data of ph2"):
        load_examples("ph2", None, (8, 8), spec)
    with pytest.raises(UserError, match="no data set 'phh2'; did you mean 'ph2'"):
        load_examples("phh2", None, (8, 8), spec)


def test_a_folder_that_lies_here_and_is_looked_for_below_another(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder.relative_to(tmp_path)
    assert load_data(own(here)).provenance == "real"
    monkeypatch.setenv("MLSEG_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError) as caught:
        load_data(own(here))
    assert "where $MLSEG_DATA has a relative root start" in str(caught.value)
    assert str(caught.value).endswith(f"by its whole path: {folder}")
    with pytest.raises(UserError, match="get them from"):
        load_data(own(Path("nowhere")))
    with pytest.raises(UserError, match="no data of dermis here; get them from"):
        load_data(own(here, name="dermis", root=None))
    tiny_set(tmp_path / "data" / "dermis", "dermis")
    with pytest.raises(UserError, match=r"its whole path: .*data.dermis$"):
        load_data(own(here, name="dermis", root=None))


def test_padded_data_and_examples(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        write_image(path, half_mask(value=1))  # 10 rows of 12, as the images
    data = load_data(own(folder, ignore_index=9, fit="pad"))
    for samples in (data.train, data.val, data.test):
        assert samples.fit == "pad"
        assert (samples.masks[:, :10, :6] == 1).all()
        assert (samples.masks[:, :10, 6:12] == 0).all()
        assert (samples.masks == 9).sum() == len(samples) * (16 * 16 - 10 * 12)
    whole = load_examples("folder", str(folder), (16, 16), data.spec, "pad")
    assert whole.subset([whole.ids.index(data.val.ids[0])]).images.equal(data.val.images[:1])
    assert load_data(own(folder, ignore_index=9)).train.masks.max() == 1, "stretched by default"
    message = "data.fit: pad .* 'ph2' has none; a model of padded images"
    with pytest.raises(UserError, match=message) as error:
        load_examples("ph2", None, (16, 16), data.spec, "pad")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["voc2012", "synthetic_lesions"])
def test_what_is_drawn_needs_no_padding(name: str) -> None:
    stretched, data = (
        load_data(
            DataSettings(
                name=name, when_missing="synthetic", image_size=32, train=2, val=1, test=1, fit=fit
            )
        )
        for fit in ("stretch", "pad")
    )
    assert data.train.images.equal(stretched.train.images)
    assert data.train.masks.equal(stretched.train.masks)
    assert (stretched.val.fit, data.val.fit) == ("stretch", "pad")


def test_where_a_root_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_root("ph2", None) == Path("data/ph2")
    assert resolve_root("ph2", "there") == Path("there")
    monkeypatch.setenv("MLSEG_DATA", "/base")
    assert resolve_root("ph2", None) == Path("/base/ph2")
    assert resolve_root("ph2", "data/PH2") == Path("/base/PH2")
    assert resolve_root("ph2", "sets/PH2") == Path("/base/sets/PH2")
    assert resolve_root("ph2", "/else/PH2") == Path("/else/PH2")
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_root("ph2", "~/PH2") == Path("/home/someone/PH2")
    with pytest.raises(UserError, match="there is no user of that name"):
        resolve_root("ph2", "~nobody-of-that-name/PH2")
    monkeypatch.setenv("MLSEG_DATA", "~/sets")
    assert resolve_root("ph2", None) == Path("/home/someone/sets/ph2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "isic18"}, "did you mean 'isic2018'"),
        ({"name": "ph2", "classes": ["a", "b"]}, "classes is for own data"),
        ({"name": "ph2", "image_size": [1, 2, 3]}, "a number of pixels"),
        ({"name": "ph2", "image_size": 0}, "a number of pixels"),
        ({"name": "folder", "classes": ["a"]}, "two to 255 names"),
        ({"name": "ph2", "out_of_distribution": ["derm"]}, "no data set 'derm'"),
        ({"name": "ph2", "out_of_distribution": ["dermis", "dermis"]}, "named twice"),
        ({"name": "ph2", "out_of_distribution_roots": {"dermis": "x"}}, "isn't tested on"),
        ({"name": "ph2", "train": 0}, "greater than or equal to 1"),
        (
            {"name": "ph2", "fit": "pad"},
            r"data\.fit: pad .* 'ph2' has none; set data\.fit to stretch",
        ),
        (
            {"name": "pairs", "fit": "pad"},
            r"data\.fit: pad .* 'pairs' has none; set data\.ignore_index, or data\.fit to stretch",
        ),
        (
            {"name": "folder", "ignore_index": 9, "fit": "pad", "out_of_distribution": ["ph2"]},
            "'ph2' has none",
        ),
        ({"name": "ph2", "fit": "crop"}, "'stretch' or 'pad'"),
        ({"name": "ph2", "when_missing": "skip"}, "'error', 'synthetic' or 'download'"),
    ],
)
def test_faulty_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        DataSettings(**given)


def test_a_faulty_name_in_a_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: isic18\n")
    with pytest.raises(UserError, match="isic2018") as error:
        parse(DataSettings, load("a.yaml"))
    assert "\n" not in str(error.value)
    assert "a.yaml:1" in str(error.value)
