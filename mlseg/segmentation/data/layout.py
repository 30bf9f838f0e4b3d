"""Finding a data set's images and their masks in its folder."""

import csv
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath

from mlseg.errors import UserError
from mlseg.files import reachable, require_file
from mlseg.segmentation.data.entry import IMAGE_EXTENSIONS, Entry, Example, Part


@cache
def pattern(text: str, ids: str) -> re.Pattern[str]:
    """A catalog pattern as a regular expression over paths with forward slashes."""
    pieces = re.split(r"(\*\*/|\*|\{id\}|\{ext\})", text)
    found = ""
    for piece in pieces:
        if piece == "{id}":
            found += "(?P=id)" if "(?P<id>" in found else f"(?P<id>{ids})"
        else:
            found += {
                "**/": "(?:.*/)?",
                "*": "[^/]*",
                "{ext}": f"(?:{'|'.join(IMAGE_EXTENSIONS)})",
            }.get(piece) or re.escape(piece)
    return re.compile(found, re.IGNORECASE)


MAX_FILES = 200_000
"""Files and folders that are looked through for a data set, unless a key or flag says otherwise."""
_MAX_LIST = 2**26
"""Bytes of a CSV file or a list of ids."""


def list_files(root: Path, most: int = MAX_FILES) -> list[str]:
    """Paths of all files below `root`, with forward slashes, sorted; hidden ones left out.

    Links are followed, but not back into a folder that a path comes through.

    Raises:
        UserError: there are more than `most` files and folders.
    """
    found: list[str] = []
    number = 0
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        prefix, above = waiting.pop()
        try:
            state = (root / prefix).stat()
            here = state.st_dev, state.st_ino
            if here in above:
                continue
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    number += 1
                    if number > most:
                        raise UserError(
                            f"{root}: more than {most} files and folders in it; name the data "
                            "set's own folder, or raise the limit (data.max_files in a config, "
                            "--max-files)"
                        )
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        waiting.append((f"{prefix}{entry.name}/", above | {here}))
                    else:
                        found.append(prefix + entry.name)
        except OSError:
            continue  # a folder that can't be read, lost+found say, is no part of the set
    return sorted(found)


def find_examples(entry: Entry, root: Path, most: int = MAX_FILES) -> dict[str, list[Example]]:
    """All examples of a data set by part ("all", or "train", "val", "test"), sorted by id.

    Args:
        entry: of the data set. For "pairs", `root` is a CSV file or a folder with pairs.csv.
        most: files and folders in `root`.

    Raises:
        UserError: nothing in `root` fits a layout; an image without its mask, a mask without its
            image, two images of one id; too many files.
    """
    if entry.examples is not None:
        return _own(entry, root)
    files = list_files(root, most)
    layout = choose_layout(entry, files)
    if layout is None:
        raise UserError(
            f"{root}: no image of {entry.spec.name} found; expected {', '.join(entry.expected)}"
        )
    found = {}
    for name, part in layout.items():
        images, masks = match(part, files, entry.ids)
        if part.listed is not None:
            listed = _read_list(root, part, files)
            images, masks = _only(listed, images), [_only(listed, mask) for mask in masks]
            absent = sorted(set(listed) - set(images))
            if absent:
                expected = part.images.replace("**/", "").replace("{id}", absent[0])
                raise UserError(
                    f"{root}: {absent[0]} is listed for the part {name}, but there is no {expected}"
                )
        if images or any(masks):
            found[name] = _paired(entry, part, root, images, masks)
    return found


def _own(entry: Entry, root: Path) -> dict[str, list[Example]]:
    """What an entry's own function finds."""
    assert entry.examples is not None
    found = {
        part: sorted(e, key=lambda example: example.id) for part, e in entry.examples(root).items()
    }
    if not any(found.values()):
        raise UserError(f"{root}: no image of {entry.spec.name} found")
    strange = sorted(found.keys() - {"all", "train", "val", "test"})
    if strange or ("all" in found and len(found) > 1):
        raise UserError(
            f"{entry.spec.name}: its examples are in the parts {', '.join(found)}; there is all, "
            "or train, val and test"
        )
    return found


def choose_layout(entry: Entry, files: Iterable[str]) -> Mapping[str, Part] | None:
    """The first layout that fits images and masks, else the first that fits an image, else None."""
    files = list(files)
    with_images = None
    for layout in entry.layouts:
        for part in layout.values():
            images, masks = match(part, files, entry.ids)
            if images and any(masks):
                return layout
            if images and with_images is None:
                with_images = layout
    return with_images


Matches = dict[str, list[str]]


def match(part: Part, files: Iterable[str], ids: str) -> tuple[Matches, list[Matches]]:
    """Paths by id: of the images, and of each of the masks' patterns."""
    image_pattern = pattern(part.images, ids)
    mask_patterns = [pattern(mask, ids) for mask in part.masks]
    images: Matches = {}
    masks: list[Matches] = [{} for _ in mask_patterns]
    for path in files:
        is_mask = False
        for expression, found in zip(mask_patterns, masks, strict=True):
            if hit := expression.fullmatch(path):
                found.setdefault(hit["id"], []).append(path)
                is_mask = True
        if not is_mask and (hit := image_pattern.fullmatch(path)):
            images.setdefault(hit["id"], []).append(path)
    return images, masks


def _read_list(root: Path, part: Part, files: Iterable[str]) -> list[str]:
    """Ids of the text file that lists a part's examples, in its order."""
    assert part.listed is not None
    paths = [path for path in files if pattern(part.listed, "").fullmatch(path)]
    if not paths:
        name = part.listed.replace("**/", "")
        raise UserError(f"{root}: no {name}, which lists the images of the part")
    try:
        require_file(root / paths[0], _MAX_LIST)
        lines = (root / paths[0]).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{root / paths[0]}: not a readable list ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def _only(names: Iterable[str], matches: Matches) -> Matches:
    return {name: matches[name] for name in names if name in matches}


def _paired(
    entry: Entry, part: Part, root: Path, images: Matches, masks: list[Matches]
) -> list[Example]:
    for found in masks:
        for name, paths in sorted(found.items()):
            if name not in images:
                expected = part.images.replace("**/", "").replace("{id}", name)
                raise UserError(
                    f"{root / paths[0]}: mask without an image; expected {expected} "
                    f"(add the image or remove the mask)"
                )
    examples = []
    for name, paths in sorted(images.items()):
        if len(paths) > 1:
            raise UserError(f"{root / paths[0]}: a second image of that name, {root / paths[1]}")
        missing = [
            expected for expected, found in zip(part.masks, masks, strict=True) if name not in found
        ]
        if missing and entry.unmasked_images and len(missing) == len(masks):
            continue
        if missing:
            expected = missing[0].replace("**/", "").replace("{id}", name)
            raise UserError(
                f"{root / paths[0]}: image without a mask; expected {expected} "
                f"(add the mask or remove the image)"
            )
        files = tuple(root / path for found in masks for path in found[name])
        examples.append(Example(name, root / paths[0], files))
    if not examples:
        raise UserError(f"{root}: {entry.spec.name} has images, but none of them has a mask")
    return examples


def read_pairs(root: Path) -> dict[str, list[Example]]:
    """The pairs of a CSV file, or of the pairs.csv in a folder, by part."""
    path = root if root.suffix.lower() == ".csv" else root / "pairs.csv"
    try:
        require_file(path, _MAX_LIST)
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    for column in ("image", "mask"):
        if column not in columns:
            raise UserError(
                f"{path}: no column {column!r}; the first line must name image and mask"
            )
    if not rows:
        raise UserError(f"{path}: no pairs below the first line")
    found: dict[str, list[Example]] = {}
    seen: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        if not row["image"] or not row["mask"]:
            raise UserError(f"{path}:{line}: a pair needs an image and a mask")
        image, mask = path.parent / row["image"], path.parent / row["mask"]
        for named in (image, mask):
            try:
                there = reachable(named).is_file()
            except UserError as error:
                raise UserError(f"{path}:{line}: {error}") from None
            if not there:
                raise UserError(f"{path}:{line}: no file {named}")
        name = row.get("id") or PurePosixPath(image.as_posix()).stem
        part = row.get("split") or "all"
        if part not in ("all", "train", "val", "test"):
            raise UserError(f"{path}:{line}: split {part!r}; there are train, val and test")
        if name in seen:
            raise UserError(
                f"{path}:{line}: id {name!r} is that of line {seen[name]} already; an example may "
                f"be in one split only, and once (a column id tells files of one name apart)"
            )
        seen[name] = line
        found.setdefault(part, []).append(Example(name, image, (mask,)))
    if "all" in found and len(found) > 1:
        raise UserError(f"{path}: split is given for some pairs and missing for others")
    return {part: sorted(examples, key=lambda e: e.id) for part, examples in found.items()}
