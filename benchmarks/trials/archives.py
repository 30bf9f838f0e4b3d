"""Archives of data sets that are damaged or made to get out of their folder."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mlseg import data
from mlseg.segmentation.data.entry import Archive, data_set
from mlseg.segmentation.data.fetch import fetch
from trials.child import LOGS, Task, call
from trials.fixtures import Fixtures
from trials.judge import Outcome, clean, expect, files, unchanged
from trials.mutations import damaged

IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
NUMBER = 4


def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """Two archives, one of them damaged, read member by member into a folder."""
    place, out = folder / "place", folder / "out"
    content = sorted(fixtures.pairs.glob("*/*.png"))[0].read_bytes()
    images = {f"{IMAGES}/ISIC_{n:07d}.jpg": content for n in range(NUMBER)}
    masks = {f"{MASKS}/ISIC_{n:07d}_segmentation.png": content for n in range(NUMBER)}
    archives = [_zip(images), _zip(masks)]
    number = draw.randrange(2)
    made = draw.random() < 0.5
    archives[number] = (
        _made(draw, (images, masks)[number], folder) if made else damaged(draw, archives[number])
    )
    paths = [place / "images.zip", place / "masks.zip"]
    for path, archive in zip(paths, archives, strict=True):
        path.write_bytes(archive)
    before = files(folder, but=(out, folder / LOGS))
    task = Task("archives:fetched", (str(out), *map(str, paths)), place)
    ended = call(task)
    clean(ended)
    unchanged(before, files(folder, but=(out, folder / LOGS)))
    if ended.code:
        return Outcome("refused")
    if not made:
        found = {p.name: p.read_bytes() for p in out.rglob("*.*") if p.is_file()}
        expect(set(found.values()) == {content}, "damaged content was taken")
    return Outcome("right")


def fetched(arguments: Sequence[str]) -> int:
    """``python -m mlseg.data isic2018`` with archives that lie here."""
    root, *urls = arguments
    archives = tuple(Archive(url, "train") for url in urls)

    def here(entry: object, where: Path, limit: int | None, parts: object) -> int:
        return fetch(data_set("isic2018"), where, limit, archives=archives, pause=0.01)

    setattr(data, "fetch", here)  # noqa: B010, it exports none
    return data.main(["isic2018", "--root", root])


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file.getvalue()


def _made(draw: random.Random, members: dict[str, bytes], folder: Path) -> bytes:
    """An archive that is whole and says odd things."""
    names = sorted(members)
    victim = draw.choice(names)
    kind = draw.randrange(9)
    file = io.BytesIO()
    if kind < 4:
        base = victim.rpartition("/")[2]
        odd = draw.choice(
            (f"../{victim}", f"{folder}/{victim}", f"x/../../{victim}", f"{victim}/{base}",
             f"{'y/' * 2000}{base}", f"{'z' * 300}/{victim}", f"{victim}/", f"..\\{victim}",
             f"C:{victim}", f"./{victim}", f"{victim.upper()}", f"a\nb/{victim}",
             f"\u202e/{victim}", f"[red]/{victim}", f"~/{victim}", f"/{victim}", f"/..{victim}")
        )  # fmt: skip
        kept = {n: c for n, c in members.items() if n != victim or draw.random() < 0.5}
        return _zip({**kept, odd: members[victim]})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        for name in names:
            info = zipfile.ZipInfo(name)
            content = members[name]
            if name == victim and kind == 4:  # a link that leads out
                info.external_attr = 0o120777 << 16
                content = str(folder / "place").encode()
            if name == victim and kind == 5:  # grows
                content = b"\0" * (5 * 2**28)
            if name == victim and kind == 6:
                info.compress_type = draw.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 0))
            else:
                info.compress_type = zipfile.ZIP_DEFLATED
            made.writestr(info, content)
            if name == victim and kind == 7:  # twice
                made.writestr(f"{name} ", content)
    data = bytearray(file.getvalue())
    if kind == 8:  # the directory says another size, method or flag than there is
        place = data.find(b"PK\x01\x02")
        field, size = draw.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)))
        value = draw.choice((0, 1, 99, 2**15, 2**31 - 1, 2**32 - 1)) & (256**size - 1)
        data[place + field : place + field + size] = struct.pack("<I", value)[:size]
    return bytes(data)
