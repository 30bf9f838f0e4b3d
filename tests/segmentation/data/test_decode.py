import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_files import half_mask, write_image

from mlseg.errors import UserError
from mlseg.segmentation.data.decode import (
    MEGAPIXELS,
    image_size,
    limit_pixels,
    read_image,
    read_mask,
)
from mlseg.segmentation.data.entry import DATA_SETS, Entry, Example, RawFormat, data_set
from mlseg.segmentation.data.examples import decode as decode_examples
from mlseg.segmentation.data.layout import find_examples

SIZE = (20, 24)

ENTRIES = {name: data_set(name) for name in DATA_SETS.names()}


def test_images_are_resized_with_an_antialiased_filter(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: without antialiasing they would alias to stripes
    path = write_image(tmp_path / "a.png", stripes)
    small = read_image(path, 1, (16, 16))
    assert small.shape == (1, 16, 16)
    assert abs(small.astype(int) - 127).max() < 25


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "LA"])
def test_any_mode_gives_the_channels_asked_for(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    path = write_image(tmp_path / f"a.{suffix}", np.full((10, 12, 3), 204, np.uint8), mode)
    for channels in (1, 3):
        image = read_image(path, channels, SIZE)
        assert image.shape == (channels, *SIZE)
        assert abs(image.astype(int) - 204).max() <= 2


def test_colour_to_grey_is_bt601(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", np.full((4, 4, 3), (200, 100, 50), np.uint8))
    expected = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert abs(int(read_image(path, 1)[0, 0, 0]) - expected) <= 1


@pytest.mark.parametrize(("top", "bits"), [(255, 8), (4095, 12), (40000, 16)])
def test_16_bit_files_are_scaled_by_the_bits_they_use(tmp_path: Path, top: int, bits: int) -> None:
    values = np.array([[0, top // 2], [top // 4, top]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", 1)[0]
    assert np.array_equal(found, np.rint(values * (255 / (2**bits - 1))))


def test_files_without_a_header(tmp_path: Path) -> None:
    raw = RawFormat("IMG", 4, 6, 12, white_is_zero=True)
    values = np.linspace(0, 4095, 24).astype(">u2").reshape(4, 6)
    values.tofile(tmp_path / "a.IMG")
    found = read_image(tmp_path / "a.IMG", 1, raw=raw)[0]
    assert image_size(tmp_path / "a.IMG", raw) == (4, 6)
    assert np.array_equal(found, np.rint(255 - values * (255 / 4095)).astype(np.uint8))
    values[:2].tofile(tmp_path / "short.IMG")
    with pytest.raises(UserError, match=r"short\.IMG: 24 bytes, but 4x6 pixels of 16 bits are 48"):
        read_image(tmp_path / "short.IMG", 1, raw=raw)


def test_a_turned_photo_is_set_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((10, 16), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == (16, 10)
    assert read_image(tmp_path / "a.jpg", 1).shape == (1, 16, 10)


@pytest.mark.parametrize(
    ("values", "mode", "suffix"),
    [
        (half_mask(), None, "png"),
        (half_mask(value=1), None, "png"),
        (half_mask() > 0, None, "png"),
        (half_mask(), "RGB", "png"),
        (half_mask(), None, "gif"),
        (half_mask(), None, "bmp"),
        (half_mask().astype(np.uint16) * 257, None, "png"),
        (half_mask((80, 96)), None, "jpg"),
    ],
)
def test_binary_masks_in_any_form(tmp_path: Path, values: Any, mode: str, suffix: str) -> None:
    path = write_image(tmp_path / f"m.{suffix}", values, mode)
    mask = read_mask(path, "binary", 2)
    assert np.array_equal(mask, half_mask(mask.shape, 1))


def test_a_palette_that_is_no_scale_of_greys_gives_its_indices(tmp_path: Path) -> None:
    image = Image.fromarray(half_mask(value=1), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "m.png")
    for kind in ("binary", "index"):
        assert np.array_equal(read_mask(tmp_path / "m.png", kind, 2), half_mask(value=1))


def test_the_cut_comes_after_resizing_and_at_half_the_range(tmp_path: Path) -> None:
    """Against a resize in numpy: the centre of each output pixel picks the source pixel."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random((50, 70)) < 0.5, 255, 0).astype(np.uint8)
    path = write_image(tmp_path / "m.png", values)
    rows = ((np.arange(20) + 0.5) * 50 / 20).astype(int)
    columns = ((np.arange(24) + 0.5) * 70 / 24).astype(int)
    expected = values[rows][:, columns] > 127
    assert np.array_equal(read_mask(path, "binary", 2, size=SIZE), expected)
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    path = write_image(tmp_path / "g.png", grey)
    assert read_mask(path, "binary", 2).tolist() == [[0, 0, 1, 1]]


def test_resizing_keeps_the_foregrounds_share(tmp_path: Path) -> None:
    disc = np.hypot(*(np.mgrid[:400, :400] - 200)) < 120
    path = write_image(tmp_path / "m.png", disc)
    share = read_mask(path, "binary", 2, size=(64, 64)).mean()
    assert abs(share / disc.mean() - 1) < 0.01


def test_index_masks(tmp_path: Path) -> None:
    values = np.array([[0, 3, 11], [2, 1, 0]], np.uint8)
    path = write_image(tmp_path / "m.png", values)
    assert np.array_equal(read_mask(path, "index", 4, 11), values)
    with pytest.raises(
        UserError, match=r"m\.png: mask value 11 is none of the 4 classes \(0 to 3\)"
    ):
        read_mask(path, "index", 4)
    with pytest.raises(UserError, match=r"value 3 is none of the 3 classes \(0 to 2 and 11"):
        read_mask(path, "index", 3, 11)
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[0, 0] = 7, 1, 0
    with pytest.raises(UserError, match=r"c\.png: a colour picture"):
        read_mask(write_image(tmp_path / "c.png", colour), "index", 4)


def test_a_binary_mask_of_strange_values(tmp_path: Path) -> None:
    path = write_image(tmp_path / "m.png", half_mask(value=38))
    with pytest.raises(UserError, match=r"m\.png: mask value 38 is neither"):
        read_mask(path, "binary", 2)
    assert read_mask(path, "nonzero", 2).mean() == 0.5
    empty = write_image(tmp_path / "empty.png", 0)
    assert read_mask(empty, "binary", 2).sum() == 0


def folder_examples(root: Path) -> tuple[list[Example], Entry]:
    entry = data_set("folder")
    return find_examples(entry, root)["all"], entry


def test_decoding_a_set_in_memory_and_in_a_cache(folder: Path, tmp_path: Path) -> None:
    examples, entry = folder_examples(folder)
    samples = decode_examples(examples, entry, entry.spec, SIZE)
    assert samples.ids == [f"p{index:02d}" for index in range(12)]
    assert samples.images[:, 0, 0, 0].tolist() == [20 * index for index in range(12)]
    assert samples.masks.shape == (12, *SIZE)
    assert samples.masks[3].tolist() == half_mask(SIZE, 1).tolist()

    cache = tmp_path / "cache"
    cached = decode_examples(examples, entry, entry.spec, SIZE, cache)
    assert cached.mapped
    assert cached.images.equal(samples.images)
    assert cached.masks.equal(samples.masks)
    (made,) = cache.iterdir()
    stamp = made.stat().st_mtime_ns
    cached.images.zero_()  # must not reach the file
    again = decode_examples(examples, entry, entry.spec, SIZE, cache)
    assert again.images.equal(samples.images)
    assert [made] == list(cache.iterdir())
    assert made.stat().st_mtime_ns == stamp
    write_image(folder / "images" / "p03.png", 250, "RGB")  # a changed file is decoded anew
    assert decode_examples(examples, entry, entry.spec, SIZE, cache).images[3].max() == 250


def test_padded_images_keep_their_shape(folder: Path, tmp_path: Path) -> None:
    size, ignore = (20, 24), 255
    shapes = [(20, 24), (7, 11), (20, 9), (5, 24), (40, 30), (21, 60)]
    seen = [(20, 24), (7, 11), (20, 9), (5, 24), (20, 15), (8, 24)]  # 21 * 24 / 60 = 8.4
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    masks = [rng.choice([0, 1, ignore], shape).astype(np.uint8) for shape in shapes]
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        write_image(folder / "images" / f"p{number:02d}.png", image)
        write_image(folder / "masks" / f"p{number:02d}.png", mask)
    examples, entry = folder_examples(folder)
    examples, entry = examples[: len(shapes)], replace(entry, masks="index")
    spec = replace(entry.spec, ignore_index=ignore)
    samples = decode_examples(examples, entry, spec, size, fit="pad")
    assert samples.fit == samples.subset([1]).fit == "pad"
    for number, (height, width) in enumerate(seen):
        photo, labelled = Image.fromarray(images[number]), Image.fromarray(masks[number])
        if shapes[number] != seen[number]:
            photo = photo.resize((width, height), Image.Resampling.BILINEAR)
            labelled = labelled.resize((width, height), Image.Resampling.NEAREST)
        expected = np.full((*size, 3), 128, np.uint8)
        expected[:height, :width] = np.asarray(photo)
        assert np.array_equal(samples.images[number].permute(1, 2, 0), expected)
        labels = np.full(size, ignore, np.uint8)
        labels[:height, :width] = np.asarray(labelled)
        assert np.array_equal(samples.masks[number], labels)
    for own, mask in zip(samples.native_masks(), masks, strict=True):
        assert np.array_equal(own, mask)

    cache = tmp_path / "cache"
    for fit in ("pad", "stretch", "pad"):  # each has its own files
        cached = decode_examples(examples, entry, spec, size, cache, fit)
        assert cached.images.equal(samples.images) == (fit == "pad")
        assert cached.masks.equal(samples.masks) == (fit == "pad")
    assert len(list(cache.iterdir())) == 2


def test_a_turned_photo_is_padded_as_it_is_shown(folder: Path) -> None:
    examples, entry = folder_examples(folder)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn: 10 rows of 12 are shown as 12 rows of 10
    path = folder / "images" / "p00.png"
    with Image.open(path) as image:
        image.save(path, exif=turned)
    write_image(folder / "masks" / "p00.png", np.ones((12, 10), np.uint8))
    spec = replace(entry.spec, ignore_index=255)
    masks = decode_examples(examples[:1], entry, spec, (16, 16), fit="pad").masks
    assert (masks != 255).sum() == 120
    assert (masks[0, :12, :10] == 1).all()


def test_the_mask_of_what_can_be_padded_has_its_images_size() -> None:
    """Scoring finds the image's place from the mask's size."""
    assert all(e.same_size for e in ENTRIES.values() if e.spec.ignore_index is not None)


def test_a_fault_leaves_no_half_written_cache(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "p05.png").write_bytes(b"nothing")
    examples, entry = folder_examples(folder)
    with pytest.raises(UserError, match=r"p05\.png: not a readable image"):
        decode_examples(examples, entry, entry.spec, SIZE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("which", ["images", "masks"])
@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_unreadable_files(folder: Path, which: str, content: bytes | None) -> None:
    path = folder / which / "p04.png"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    examples, entry = folder_examples(folder)
    with pytest.raises(UserError, match=rf"{which}.p04\.png: not a readable image") as error:
        decode_examples(examples, entry, entry.spec, SIZE)
    assert "\n" not in str(error.value)


def test_sizes_that_differ(folder: Path) -> None:
    write_image(folder / "masks" / "p07.png", half_mask((12, 12)))
    examples, entry = folder_examples(folder)
    with pytest.raises(
        UserError, match=r"p07\.png: mask of 12x12 pixels for the image p07\.png of 12x10"
    ):
        decode_examples(examples, entry, entry.spec, SIZE)


@pytest.fixture
def few_pixels() -> Iterator[None]:
    limit_pixels(1e-4)  # 100
    yield
    limit_pixels(MEGAPIXELS)


@pytest.mark.usefixtures("few_pixels")
def test_a_file_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    for width, refused in ((10, False), (11, True), (40, True)):  # beyond twice Pillow itself stops
        path = write_image(tmp_path / f"{width}.png", np.zeros((10, width), np.uint8))
        for read in (lambda p: read_image(p, 3), lambda p: read_mask(p, "binary", 2), image_size):
            if not refused:
                read(path)
                continue
            with pytest.raises(UserError, match=r"more than 0 million.*data\.max_megapixels"):
                read(path)


def test_pipes_and_devices_are_no_images(tmp_path: Path) -> None:
    raw = RawFormat("IMG", 4, 6, 12, white_is_zero=True)
    for name in ("a.png", "a.IMG", "a.txt"):
        os.mkfifo(tmp_path / name)
    for path in (tmp_path / "a.png", tmp_path / "a.IMG", Path("/dev/zero")):
        with pytest.raises(UserError, match="a pipe or a device, not a file"):
            read_image(path, 1, raw=raw)
    for name in ("a.png", "a.txt"):
        with pytest.raises(UserError, match="a pipe or a device, not a file"):
            read_mask(tmp_path / name, "index", 2)
    with pytest.raises(UserError, match="not a readable image"):
        read_image(tmp_path, 3)
