"""What a data set is to mlseg, and where data sets are found by name.

An entry registers itself, or is named by dotted path; so may be a function that makes one of the
keywords that ``data.options`` gives it:

    @DATA_SETS.register("my_set")
    def my_set(year: int = 2020) -> Entry: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import pydantic

from mlseg.config.components import signature_settings
from mlseg.config.explaining import explain
from mlseg.config.registry import Registry
from mlseg.errors import UserError
from mlseg.segmentation.data.samples import DatasetSpec

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "bmp", "tif", "tiff", "gif", "webp")


@dataclass(frozen=True)
class Part:
    """Patterns of the images and of their masks.

    Attributes:
        listed: pattern of a text file with the ids that belong to the part, one a line; other
            images are left out.
    """

    images: str
    masks: tuple[str, ...]
    listed: str | None = None


@dataclass(frozen=True)
class Archive:
    """A zip file at a public address that holds a part's images or masks under the same paths."""

    url: str
    part: str


@dataclass(frozen=True)
class RawFormat:
    """Images without a header: big-endian unsigned 16-bit, `bits` of them used."""

    suffix: str
    height: int
    width: int
    bits: int
    white_is_zero: bool


@dataclass(frozen=True)
class Example:
    """An image and the files that make up its mask."""

    id: str
    image: Path
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class Entry:
    """A data set.

    Attributes:
        spec: what it is; see `DatasetSpec`.
        layouts: alternatives, tried in order. Each maps a part's name to its patterns: "all", or
            the official "train", "val", "test".
        source: where to get it, and its terms where they are strict.
        masks: "binary" masks are cut at half their range, "nonzero" ones above 0, "index" masks
            hold class indices.
        ids: regular expression of an example's name.
        remap: classes of "index" masks by the values in the files; a value that isn't named has
            the ignore index. None: the values are the classes.
        withheld_test: the labels of the official test part are not public.
        same_size: an image and its mask have the same size (else only the same shape).
        unmasked_images: images without a mask are left out instead of being an error.
        official: the official split is the default.
        archives: what can be fetched.
        raw: format of images without a header.
        examples: finds them in the data set's folder, by part, where patterns can't say it.
        synthetic: drawn, not read.
    """

    spec: DatasetSpec
    layouts: tuple[Mapping[str, Part], ...] = ()
    source: str = "its owner"
    masks: Literal["binary", "nonzero", "index"] = "binary"
    ids: str = r"[^/]+?"
    same_size: bool = True
    unmasked_images: bool = False
    official: bool = False
    archives: tuple[Archive, ...] = ()
    raw: RawFormat | None = None
    synthetic: bool = False
    remap: Mapping[int, int] | None = None
    withheld_test: bool = False
    examples: Callable[[Path], Mapping[str, Sequence[Example]]] | None = None

    @property
    def expected(self) -> list[str]:
        """The patterns of the first layout, for messages."""
        found: list[str] = []
        for part in self.layouts[0].values() if self.layouts else ():
            found += [part.images, *part.masks]
        return found


DATA_SETS: Registry[Entry | Callable[..., Entry]] = Registry(
    "data set",
    base=(Entry, FunctionType),
    packages=["mlseg.segmentation.data.catalog"],
    example="my_package.data:my_set",
)


def data_set(name: str, options: Mapping[str, Any] | None = None) -> Entry:
    """The entry of a data set.

    Args:
        name: registered name or dotted path.
        options: keywords of the function that makes it.

    Raises:
        UserError: there is no such data set, or it takes other options.
    """
    found = DATA_SETS.get(name)
    if isinstance(found, Entry):
        if options:
            raise UserError(f"{name!r} takes no options")
        return found
    schema = signature_settings(found)
    try:
        made = found(**dict(schema.model_validate(dict(options or {}))))
    except pydantic.ValidationError as error:
        path, text, _ = explain(error, schema, options or {})
        raise UserError(f"{'.'.join(map(str, path))}: {text}") from None
    if not isinstance(made, Entry):
        raise UserError(f"data set {name!r}: it must give a {Entry.__module__}.{Entry.__name__}")
    return made
