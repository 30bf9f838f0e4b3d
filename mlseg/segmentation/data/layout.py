"""Finding a data set's images and their masks in its folder."""

import codecs
import csv
import glob
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from mlseg.errors import UserError
from mlseg.files import reachable, require_file
from mlseg.segmentation.data import medical
from mlseg.segmentation.data.entry import IMAGE_EXTENSIONS, Entry, Example, Part

EXTENSIONS = (*IMAGE_EXTENSIONS, *(end[1:] for end in (*medical.DICOM, *medical.NIFTI)))
"""What ``{ext}`` stands for in a pattern."""


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
                "{ext}": f"(?:{'|'.join(map(re.escape, EXTENSIONS))})",
            }.get(piece) or re.escape(piece)
    return re.compile(found, re.IGNORECASE)


def folder_layout(
    images: str | None = None, masks: str | None = None, mask_pattern: str | None = None
) -> Part:
    """Where the images of an own folder are, and their masks.

    Args:
        images: folder within the data's; "." is that itself, "*" any one. Default images.
        masks: likewise; may hold {id}. Default masks.
        mask_pattern: name of an image's mask: {id} is the image's name, * anything; several that
            fit are united. Without an ending any image's. Default {id}.

    Raises:
        UserError: it is no such folder or pattern.
    """
    name = mask_pattern or "{id}"
    name += "" if "." in name else ".{ext}"
    found = {}
    for key, folder, last in (
        ("images", images or "images", "{id}.{ext}"),
        ("masks", masks or "masks", name),
    ):
        parts = [part for part in f"{folder}/{last}".split("/") if part not in ("", ".")]
        if folder.startswith(("/", "~")) or ".." in parts:
            raise UserError(f"data.{key}: {folder!r} is no folder within data.root")
        found[key] = "/".join(parts)
    if "{id}" not in found["masks"]:
        raise UserError(
            f"data.mask_pattern: {mask_pattern!r} doesn't say by {{id}} which image a mask is of, "
            "as {id}_mask does"
        )
    if found["masks"] == found["images"]:
        raise UserError(
            f"data.masks: {masks or 'masks'!r} is the images' folder too; say by data.mask_pattern "
            "how masks are named, such as {id}_mask"
        )
    return Part(found["images"], (found["masks"],))


_NO_DATA = {"__macosx", "lost+found", "thumbs.db", "desktop.ini"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is what a system keeps for itself."""
    return name.startswith(".") or name.lower() in _NO_DATA


MAX_FILES = 200_000
"""Files and folders that are looked through for a data set, unless a key or flag says otherwise."""
_MAX_LIST = 2**26
"""Bytes of a CSV file or a list of ids."""


def list_files(root: Path, most: int = MAX_FILES) -> list[str]:
    """Paths of all files below `root`, with forward slashes, sorted; hidden ones left out.

    Each folder comes once, under its own name if it lies below `root`; links that lead out are
    followed, those that lead to a folder above aren't.

    Raises:
        UserError: there are more than `most` files and folders.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    number = 0
    folders, links = [""], list[str]()
    while folders or links:
        prefix = folders.pop() if folders else links.pop(0)
        here = root / prefix
        try:
            state = here.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            names = sorted(os.listdir(here))
        except OSError:
            continue  # a folder that can't be read, lost+found say, is no part of the set
        number += len(names)
        if number > most:
            raise UserError(
                f"{root}: more than {most} files and folders in it; name the data set's own "
                "folder, or raise the limit (data.max_files in a config, --max-files)"
            )
        real = os.path.realpath(here)
        for name in names:
            path = here / name
            if is_hidden(name):
                continue
            if not os.path.isdir(path):
                found.append(prefix + name)
            elif not path.is_symlink():
                folders.append(f"{prefix}{name}/")
            elif not _lies_in(real, os.path.realpath(path)):
                links.append(f"{prefix}{name}/")
    return sorted(found)


def _lies_in(folder: str, other: str) -> bool:
    """Whether `folder` is `other` or lies below it; both without links."""
    return os.path.commonpath([folder, other]) == other


def find_examples(
    entry: Entry, root: Path, most: int = MAX_FILES, unmasked: bool = False
) -> dict[str, list[Example]]:
    """All examples of a data set by part ("all", or "train", "val", "test"), sorted by id.

    Args:
        entry: of the data set. For "pairs", `root` is a CSV file or a folder with pairs.csv.
        most: files and folders in `root`.
        unmasked: images without a mask are examples too.

    Raises:
        UserError: nothing in `root` fits a layout; an image without its mask, a mask without its
            image, two images of one id, several masks where the layout's pattern has no *; too
            many files.
    """
    if entry.examples is not None:
        return _own(entry, root, unmasked)
    files = list_files(root, most)
    layout = choose_layout(entry, files)
    if layout is None:
        expected = ", ".join(entry.expected)
        kinds = f" ({{ext}}: {', '.join(EXTENSIONS)})" if "{ext}" in expected else ""
        any_kind = pattern(entry.expected[0].replace("{ext}", "*"), entry.ids)
        other = next((f"; there is {path}" for path in files if any_kind.fullmatch(path)), "")
        raise UserError(
            f"{root}: no image of {entry.spec.name} found; expected {expected}{kinds}{other}"
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
            found[name] = _paired(entry, part, root, images, masks, unmasked)
    return found


def _own(entry: Entry, root: Path, unmasked: bool) -> dict[str, list[Example]]:
    """What an entry's own function finds."""
    assert entry.examples is not None
    own = entry.examples
    examples = read_pairs(root, unmasked) if own is read_pairs else own(root)
    found = {part: sorted(e, key=lambda example: example.id) for part, e in examples.items()}
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
    for found in masks:
        _spell_alike(found, images)
    return images, masks


def _spell_alike(masks: Matches, images: Matches) -> None:
    """Give masks their images' ids where only the code points of a letter differ.

    macOS takes apart what other systems write as one: "e" and its accent.
    """
    alone = [name for name in masks if name not in images]
    spelled = {normalize("NFC", name): name for name in images} if alone else {}
    for name in alone:
        image = spelled.get(normalize("NFC", name))
        if image is not None:
            masks.setdefault(image, []).extend(masks.pop(name))


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
    entry: Entry,
    part: Part,
    root: Path,
    images: Matches,
    masks: list[Matches],
    unmasked: bool,
) -> list[Example]:
    own = entry.spec.name == "folder"
    unite = "; to unite several, write * in data.mask_pattern" if own else ""
    elsewhere = ", or say by data.masks and data.mask_pattern where masks are" if own else ""
    for mask, found in zip(part.masks, masks, strict=True):
        united = "*" in PurePosixPath(mask).name
        for name, paths in sorted(found.items()):
            if len(paths) > 1 and not united:
                raise UserError(
                    f"{root / paths[0]}: a second mask of that image, {root / paths[1]}{unite}"
                )
            if name not in images:
                expected = part.images.replace("**/", "").replace("{id}", name)
                raise UserError(
                    f"{root / paths[0]}: mask without an image; expected {expected} "
                    f"(add the image or remove the mask){_instead(root, part.images, name)}"
                )
    examples = []
    for name, paths in sorted(images.items()):
        if len(paths) > 1:
            raise UserError(f"{root / paths[0]}: a second image of that name, {root / paths[1]}")
        missing = [
            expected for expected, found in zip(part.masks, masks, strict=True) if name not in found
        ]
        if len(missing) == len(masks) and (unmasked or entry.unmasked_images):
            if unmasked:
                examples.append(Example(name, root / paths[0], ()))
            continue
        if missing:
            expected = missing[0].replace("**/", "").replace("{id}", name)
            raise UserError(
                f"{root / paths[0]}: image without a mask; expected {expected} "
                f"(add the mask or remove the image{elsewhere})" + _instead(root, missing[0], name)
            )
        files = tuple(root / path for found in masks for path in found[name])
        examples.append(Example(name, root / paths[0], files))
    if not examples:
        raise UserError(f"{root}: {entry.spec.name} has images, but none of them has a mask")
    return examples


def _instead(root: Path, expected: str, name: str) -> str:
    """Says of a file of the expected name that its ending is none that is read; else empty."""
    beginning, ext, _ = expected.replace("{id}", glob.escape(name)).partition(".{ext}")
    found = sorted(p for end in ("", ".*") for p in root.glob(beginning + end) if p.is_file())
    if not ext or not found:
        return ""
    return f"; {found[0]} has an ending that isn't read (these are: {', '.join(EXTENSIONS)})"


def read_pairs(root: Path, unmasked: bool = False) -> dict[str, list[Example]]:
    """The pairs of a CSV file, or of the pairs.csv in a folder, by part.

    Commas, semicolons or tabs part its columns, as its first line says. Empty lines, and lines that
    begin with # and no file's name, are left out.

    Args:
        unmasked: the column mask may be empty.
    """
    path = root if root.suffix.lower() == ".csv" else root / "pairs.csv"
    rows = _read_rows(path)
    _, columns = next(rows, (0, []))
    columns = [name.lower() for name in columns]
    for column in ("image", "mask", "id", "split"):
        if columns.count(column) > 1:
            raise UserError(f"{path}: the first line names {column} twice")
        if column in ("image", "mask") and column not in columns:
            raise UserError(
                f"{path}: no column {column!r}; the first line must name image and mask"
            )
    found: dict[str, list[Example]] = {}
    seen: dict[str, int] = {}
    for line, cells in rows:
        if len(cells) > len(columns):
            raise UserError(
                f"{path}:{line}: {len(cells)} cells under {len(columns)} columns; put names that "
                "hold the separator in quotes"
            )
        row = dict(zip(columns, cells, strict=False))
        if not row.get("image") or not (unmasked or row.get("mask")):
            raise UserError(f"{path}:{line}: a pair needs an image and a mask")
        named_files = [row[column] for column in ("image", "mask") if row.get(column)]
        image, *masks = (path.parent / named for named in named_files)
        for named in (image, *masks):
            try:
                there = reachable(named).is_file()
            except UserError as error:
                raise UserError(f"{path}:{line}: {error}") from None
            if not there:
                raise UserError(f"{path}:{line}: no file {named}")
        name = row.get("id") or medical.stem(image)
        part = row.get("split") or "all"
        if part not in ("all", "train", "val", "test"):
            raise UserError(f"{path}:{line}: split {part!r}; there are train, val and test")
        if name in seen:
            raise UserError(
                f"{path}:{line}: id {name!r} is that of line {seen[name]} already; an example may "
                f"be in one split only, and once (a column id tells files of one name apart)"
            )
        seen[name] = line
        found.setdefault(part, []).append(Example(name, image, tuple(masks)))
    if not seen:
        raise UserError(f"{path}: no pairs below the first line")
    if "all" in found and len(found) > 1:
        raise UserError(f"{path}: split is given for some pairs and missing for others")
    return {part: sorted(examples, key=lambda e: e.id) for part, examples in found.items()}


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that says something, and its number in the file, from 1."""
    try:
        require_file(path, _MAX_LIST)
        content = path.read_bytes()
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        # Names of files may be any bytes.
        text = content.decode("utf-16") if utf16 else content.decode("utf-8-sig", "surrogateescape")
        lines = io.StringIO(text, newline="")
        first = next((line for line in lines if line.strip() and line.lstrip()[0] != "#"), "")
        separator = next((mark for mark in ",;\t" if mark in first), ",")
        lines.seek(0)
        reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
        begin = 1
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            cells = [cell.strip() for cell in cells]
            comment = "".join(cells).startswith("#") and not (path.parent / cells[0]).is_file()
            if any(cells) and not comment:
                yield line, cells
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
