"""What masks look like in the world: turned, with palettes, transparent, of any depth."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from tiny_files import half_mask, write_image

from mlseg.errors import UserError
from mlseg.segmentation.data.decode import image_size, read_image, read_mask
from mlseg.segmentation.data.entry import Example, data_set
from mlseg.segmentation.data.examples import decode

SHOWN: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}
"""What TIFF 6.0, tag Orientation, says of rows and columns as they are stored."""


def corner(dtype: Any = np.uint8) -> NDArray[Any]:
    """No turn and no mirror image of it is itself."""
    values = np.zeros((6, 10), dtype)
    values[:3, :2] = values[0, :7] = np.iinfo(dtype).max
    return values


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize(
    ("suffix", "dtype", "compression"),
    [
        ("png", np.uint8, None),
        ("png", np.uint16, None),
        ("tif", np.uint8, None),
        ("tif", np.uint16, None),
        ("tif", np.uint8, "tiff_lzw"),
        ("webp", np.uint8, None),
    ],
)
def test_images_and_masks_are_turned_alike(
    orientation: int, suffix: str, dtype: Any, compression: str | None, tmp_path: Path
) -> None:
    values = corner(dtype)
    path = tmp_path / f"a.{suffix}"
    turned = Image.Exif()
    turned[0x0112] = orientation
    image = Image.fromarray(values)
    if suffix == "tif":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        image.save(path, tiffinfo=tags, compression=compression)
    else:
        image.save(path, exif=turned, lossless=True)
    expected = SHOWN[orientation](values) > 0
    assert image_size(path) == expected.shape
    assert np.array_equal(read_image(path, 1)[0] > 127, expected)
    assert np.array_equal(read_mask(path, "binary", 2), expected)
    entry = data_set("folder")
    samples = decode([Example("a", path, (path,))], entry, entry.spec, (12, 12))
    assert samples.native_mask is not None
    assert np.array_equal(samples.native_mask(0), expected)
    # Resized images have grey borders, which foreground doesn't have; the rest agrees.
    sure = (samples.images[0, 0] < 30) | (samples.images[0, 0] > 225)
    agree = (samples.images[0, 0] > 127) == (samples.masks[0] == 1)
    assert agree[sure].all()


def test_a_photograph_and_a_mask_that_was_drawn_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((10, 16, 3), np.uint8)).save(photograph, exif=turned)
    entry = data_set("folder")
    mask = write_image(tmp_path / "m.png", half_mask((16, 10)))
    assert decode([Example("a", photograph, (mask,))], entry, entry.spec, (8, 8)).masks.sum() == 32
    mask = write_image(tmp_path / "m.png", half_mask((10, 16)))
    with pytest.raises(
        UserError, match=r"m\.png: mask of 16x10 .*a\.jpg may be turned by its EXIF"
    ):
        decode([Example("a", photograph, (mask,))], entry, entry.spec, (8, 8))


# ---------------------------------------------------------------------------------- binary

LEFT = half_mask(value=1)


def picture(tmp_path: Path, name: str) -> Path:
    """A mask whose left half is the object, in one of the ways that there are."""
    white = half_mask()
    suffix, image = "png", Image.fromarray(white)
    options: dict[str, Any] = {}
    if name in ("palette of colours", "inverted palette", "green on red", "grey palette"):
        colours = {
            "palette of colours": [0, 0, 0, 200, 30, 30],
            "inverted palette": [255, 255, 255, 0, 0, 0],
            "green on red": [255, 0, 0, 0, 255, 0],
            "grey palette": [0, 0, 0, 1, 1, 1],
        }[name]
        image = Image.fromarray(1 - LEFT if name == "inverted palette" else LEFT, "P")
        image.putpalette(colours)
    elif name.startswith(("gif", "optimised")):
        suffix = "gif" if name == "gif" else "png"
        image = Image.fromarray(255 - white)  # most of the file is light: its index may be 0
        image = Image.fromarray(white).convert("RGB").quantize(2)
        options = {"optimize": True}
    elif name == "bilevel":
        image = Image.fromarray(white > 0)
    elif name in ("CMYK", "YCbCr"):
        suffix = "jpg"
        white = half_mask((80, 96))
        image = Image.fromarray(white).convert("RGB").convert(name)
    elif name == "float":
        suffix, image = "tif", Image.fromarray(LEFT.astype(np.float32))
    elif name == "soft float":
        suffix, image = "tif", Image.fromarray(LEFT * np.float32(0.6) + np.float32(0.2))
    elif name == "float to 255":
        suffix, image = "tif", Image.fromarray(white.astype(np.float32))
    elif name.startswith("32 bits"):
        suffix, image = "tif", Image.fromarray(white.astype(np.int32) * int(name[7:]))
    elif name.startswith("16 bits"):
        image = Image.fromarray((LEFT * np.uint16(int(name[7:]))).astype(np.uint16))
    elif name.startswith("alpha"):
        _, mode, dark, light = name.split()
        colour = np.where(white > 0, np.uint8(int(light)), np.uint8(int(dark)))
        image = Image.fromarray(np.stack([colour] * (len(mode) - 1) + [white], -1))
        suffix = "tif" if mode == "RGBA" and dark == "7" else "png"
    elif name == "opaque":
        image = image.convert("RGBA")
    elif name == "half opaque":
        image = image.convert("RGBA")
        image.putalpha(100)
    elif name in ("min is white", "min is white, bilevel"):
        suffix = "tif"
        image = image if name == "min is white" else Image.fromarray(white > 0)
        path = tmp_path / "m.tif"
        image.save(path)
        _white_is_zero(path)
        Image.fromarray(255 - white).convert(image.mode).save(tmp_path / "other.tif")
        _white_is_zero(tmp_path / "other.tif")
        return tmp_path / "other.tif"
    path = tmp_path / f"m.{suffix}"
    image.save(path, **options)
    return path


def _white_is_zero(path: Path) -> None:
    """Set the tag PhotometricInterpretation of a little-endian TIFF to 0."""
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<HHI", 262, 3, 1))
    content[place + 8 : place + 10] = b"\0\0"
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name",
    [
        "palette of colours",
        "inverted palette",
        "grey palette",
        "gif",
        "optimised",
        "bilevel",
        "CMYK",
        "YCbCr",
        "float",
        "soft float",
        "float to 255",
        "32 bits 1",
        "32 bits 257",
        "16 bits 1",
        "16 bits 255",
        "16 bits 65535",
        "alpha RGBA 0 0",
        "alpha LA 0 0",
        "alpha RGBA 255 255",
        "alpha LA 255 255",
        "alpha RGBA 0 200",
        "opaque",
        "half opaque",
        "min is white",
        "min is white, bilevel",
    ],
)
def test_a_mask_is_what_it_shows(name: str, tmp_path: Path) -> None:
    found = read_mask(picture(tmp_path, name), "binary", 2)
    assert np.array_equal(found, half_mask(found.shape, 1))


def test_palettes_of_any_order_give_what_rgb_files_give(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        palette = rng.permutation([[0, 0, 0], [255, 255, 255], [250, 40, 40], [20, 20, 90]])
        image = Image.fromarray(rng.integers(0, 4, (9, 7), np.uint8), "P")
        image.putpalette(palette.astype(np.uint8).ravel().tolist())
        image.save(tmp_path / f"{number}.png")
        image.convert("RGB").save(tmp_path / f"{number}_rgb.png")
        by_palette, by_rgb = (
            read_mask(tmp_path / f"{number}{end}.png", "binary", 2) for end in ("", "_rgb")
        )
        assert np.array_equal(by_palette, by_rgb)
        assert 0 < by_palette.mean() < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.array([[0, 1, 255]], np.uint8),
            "holds 0, 1 and 255; if 255 doesn't count, set",
        ),
        (np.array([[200, 255]], np.uint8), "all of it is foreground, though not of one colour"),
        (np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8), "all of it is foreground, though not"),
        (np.array([[0.0, 0.3]], np.float32), "mask value 0.3.* is neither background nor foregr"),
        (np.array([[0.0, -1.0]], np.float32), "mask value -1.0 is neither"),
        (np.array([[0.0, np.nan]], np.float32), "mask value nan is neither"),
        (np.array([[0, -1]], np.int32), "mask value -1 is neither"),
        (np.array([[0, 70000]], np.int32), "mask value 70000 is neither"),
        (np.array([[[0, 0, 0, 0], [255, 255, 255, 0]]], np.uint8), "wholly transparent"),
        (
            np.array([[[0, 0, 0, 255], [255, 255, 255, 0]]], np.uint8),
            "its colours and its transparency show different objects",
        ),
    ],
)
def test_a_mask_that_can_be_read_in_two_ways_is_refused(
    values: NDArray[Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / ("m.png" if values.dtype == np.uint8 else "m.tif")
    Image.fromarray(values).save(path)
    with pytest.raises(UserError, match=rf"m\.\w+: {message}"):
        read_mask(path, "binary", 2)


def test_what_resizing_would_leave_out_decides_too(tmp_path: Path) -> None:
    """One pixel of 255 says that the pixels of 1 are no foreground."""
    values = np.full((40, 40), 1, np.uint8)
    values[0, 0], values[0, 1] = 255, 90
    found = read_mask(write_image(tmp_path / "m.png", values), "binary", 2, size=(4, 4))
    assert not found.any()


def test_a_wholly_transparent_mask_is_empty(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "m.png")
    assert not read_mask(tmp_path / "m.png", "binary", 2).any()


# ------------------------------------------------------------------------------ class numbers


def png(path: Path, rows: list[list[int]], bits: int, kind: int = 0) -> Path:
    """A PNG whose samples have any number of bits, written by hand."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    lines = b""
    for row in rows:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    samples = {0: 1, 2: 3, 4: 2}[kind]
    header = struct.pack(">IIBBBBB", len(rows[0]) // samples, len(rows), bits, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_few_bits_keeps_its_numbers(bits: int, tmp_path: Path) -> None:
    rows = [[value % 2**bits for value in range(start, start + 5)] for start in (0, 9, 13)]
    path = png(tmp_path / "m.png", rows, bits)
    assert read_mask(path, "index", 18).tolist() == rows
    tif = tmp_path / "m.tif"
    if bits in (8, 16):
        Image.fromarray(np.array(rows, f"u{bits // 8}")).save(tif)
        assert read_mask(tif, "index", 18).tolist() == rows


@pytest.mark.parametrize("bits", [2, 4])
def test_binary_masks_of_few_bits(bits: int, tmp_path: Path) -> None:
    for top in (1, 2**bits - 1):
        path = png(tmp_path / "m.png", [[0, top, top, 0]], bits)
        assert read_mask(path, "binary", 2).tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(("form", "maxval"), [("P2", 20), ("P5", 20), ("P2", 300), ("P5", 300)])
def test_a_portable_greymap_keeps_its_numbers(form: str, maxval: int, tmp_path: Path) -> None:
    values = [0, 1, 7, 20]
    width = ">u2" if maxval > 255 else "u1"
    raw = np.array(values, width).tobytes() if form == "P5" else b"0 1 7 20\n"
    (tmp_path / "m.pgm").write_bytes(f"{form}\n4 1\n{maxval}\n".encode() + raw)
    assert read_mask(tmp_path / "m.pgm", "index", 21).tolist() == [values]


def test_label_maps_in_other_forms(tmp_path: Path) -> None:
    values = np.array([[0, 3, 2], [2, 1, 0]], np.uint8)
    image = Image.fromarray(values, "P")
    image.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9, 128, 0, 0])
    image.save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(np.stack([values] * 3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(np.stack([values, np.full_like(values, 255)], -1)).save(tmp_path / "la.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "long.tif")
    Image.fromarray(np.stack([values] * 3, -1)).save(tmp_path / "l.webp", lossless=True)
    for path in tmp_path.iterdir():
        assert np.array_equal(read_mask(path, "index", 4), values), path.name


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_mask(path, "index", 4, 255)
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)


def test_label_maps_whose_numbers_cannot_be_had(tmp_path: Path) -> None:
    values = half_mask((16, 16), 3)
    for name in ("a.jpg", "a.webp", "a.jp2"):
        Image.fromarray(values).convert("RGB").save(tmp_path / name)
        refused(tmp_path / name, "compressed with loss")
    Image.fromarray(values).convert("RGB").save(tmp_path / "a.tif", compression="jpeg")
    refused(tmp_path / "a.tif", "compressed with loss")
    Image.fromarray(values).save(tmp_path / "white.tif")
    _white_is_zero(tmp_path / "white.tif")
    refused(tmp_path / "white.tif", "whose zero is white")
    (tmp_path / "m.pbm").write_bytes(b"P4\n8 1\n\xf0")
    refused(tmp_path / "m.pbm", "whose zero is white")
    refused(png(tmp_path / "wide.png", [[0, 0, 0, 256, 256, 256]], 16, 2), "16 bits a colour")
    Image.fromarray(values / np.float32(2)).save(tmp_path / "half.tif")
    refused(tmp_path / "half.tif", "aren't whole numbers")
    hidden = np.stack([np.zeros_like(values), half_mask((16, 16))], -1)
    Image.fromarray(hidden).save(tmp_path / "la.png")
    refused(tmp_path / "la.png", "its colours and its transparency show different objects")


def test_a_palette_of_greys_in_another_order_is_refused(tmp_path: Path) -> None:
    """What a program that makes files small does to a grey label map; colours are left alone."""
    values = np.array([[0, 0, 1, 2]], np.uint8)
    for palette, fine in (
        ([1, 1, 1, 2, 2, 2, 0, 0, 0], False),
        ([0, 0, 0, 1, 1, 1, 2, 2, 2, 9, 9, 9], True),
        ([0, 0, 0, 120, 120, 120, 240, 240, 240], True),
        ([1, 1, 1, 200, 0, 0, 0, 200, 0], True),
    ):
        image = Image.fromarray(values, "P")
        image.putpalette(palette)
        image.save(tmp_path / "m.png")
        if fine:
            assert np.array_equal(read_mask(tmp_path / "m.png", "index", 4, 255), values)
        else:
            refused(tmp_path / "m.png", "a palette of greys that are class numbers")


def test_faint_masks_compressed_with_loss_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jpg"
    Image.fromarray(half_mask((40, 44), 1)).save(path)
    with pytest.raises(UserError, match=r"m\.jpg: values up to \d, compressed with loss"):
        read_mask(path, "binary", 2)
    Image.fromarray(half_mask((40, 44))).save(path)
    with pytest.raises(UserError, match=r"m\.jpg: compressed with loss"):
        read_mask(path, "nonzero", 2)
    Image.fromarray(np.zeros((40, 44), np.uint8)).save(path)
    assert not read_mask(path, "binary", 2).any()


def test_16_bit_pictures_whose_zero_is_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(half_mask().astype(np.uint16) * 257).save(tmp_path / "m.tif")
    _white_is_zero(tmp_path / "m.tif")
    for read in (lambda p: read_mask(p, "binary", 2), lambda p: read_image(p, 1)):
        with pytest.raises(UserError, match=r"m\.tif: 16 bits of grey whose zero is white"):
            read(tmp_path / "m.tif")


# ------------------------------------------------------------------- more than one picture


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_stacks_and_animations_are_refused(suffix: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(half_mask(value=v)).convert("RGB") for v in (255, 90, 10)]
    path = tmp_path / f"m.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    for read in (lambda: read_mask(path, "binary", 2), lambda: read_image(path, 3)):
        with pytest.raises(UserError, match=rf"m\.{suffix}: 3 pictures in one file"):
            read()


def test_previews_are_no_stack(tmp_path: Path) -> None:
    image = Image.fromarray(half_mask((32, 48)))
    preview = image.resize((12, 8))
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    image.save(tmp_path / "m.tif", save_all=True, append_images=[preview])
    assert read_mask(tmp_path / "m.tif", "binary", 2).shape == (32, 48)
    colour = image.convert("RGB")
    colour.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[preview])
    assert read_image(tmp_path / "phone.jpg", 3).shape == (3, 32, 48)


# ------------------------------------------------------------------------- of several files


def test_masks_of_one_image_may_not_contradict(tmp_path: Path) -> None:
    paths = (
        write_image(tmp_path / "a.png", half_mask(value=1)),
        write_image(tmp_path / "b.png", half_mask(value=2)[:, ::-1].copy()),
    )
    image = write_image(tmp_path / "image.png", 9)
    folder = data_set("folder")
    entry = replace(folder, masks="index", spec=replace(folder.spec, classes=("a", "b", "c")))
    samples = decode([Example("a", image, paths)], entry, entry.spec, (10, 12))
    assert samples.masks[0, 0].tolist() == [1] * 6 + [2] * 6
    write_image(paths[1], half_mask(value=2))
    with pytest.raises(UserError, match=r"b\.png: says another class than a\.png"):
        decode([Example("a", image, paths)], entry, entry.spec, (10, 12))
