"""Settings of the data, and where a data set's folder is."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from mlseg.config import Settings
from mlseg.files import reachable
from mlseg.segmentation.data.contents import How
from mlseg.segmentation.data.decode import MEGAPIXELS
from mlseg.segmentation.data.entry import DATA_SETS, Entry, data_set
from mlseg.segmentation.data.layout import MAX_FILES, folder_layout
from mlseg.segmentation.data.palettes import class_palette
from mlseg.segmentation.data.placement import Fit

OWN_DATA = ("folder", "pairs")
Count = Annotated[int, pydantic.Field(ge=0)]


class DataSettings(Settings):
    """Which data set, which examples of it, at which size.

    Attributes:
        name: a registered data set (`python -m mlseg.data` lists them), or a dotted path to a
            `mlseg.segmentation.data.Entry` or a function that makes one; "folder" (images/ and
            masks/) and "pairs" (a CSV file) are a user's own data.
        options: keywords of that function.
        root: the data set's folder (for "pairs" the CSV file or its folder). A relative path
            starts at $MLSEG_DATA where that is set, and a leading "data/" stands for it; otherwise
            at the working directory. Not given: data/<name>.
        when_missing: what to do if the folder isn't there or is empty: stop, take a synthetic
            stand-in of the same number of channels and classes, or download.
        image_size: pixels, one number or [height, width].
        fit: how images get there. "stretch" gives them its shape. "pad" keeps theirs: what is
            larger is shrunk, nothing is enlarged; they lie at the top left, the rest is grey and,
            in the masks, ignored. Only for sets with an ignore index; drawn images have the size
            already.
        train, val, test: number of examples; not given: see `mlseg.segmentation.data.splits`.
        unlabelled: number of further images whose masks, if they have any, aren't read, for
            systems that learn from such too: drawn from those that no split uses. With a split of
            its own the data set's test part isn't drawn from.
        unlabelled_from: another data set that they are drawn from, by name; it can't be tested on.
            Of "folder" the images alone are needed.
        unlabelled_root: its folder, where that isn't data/<name>.
        split_seed: another seed, another draw of the examples.
        splits: "official" takes the split that the set comes with, "drawn" draws from its
            examples (from its training part where it comes split); "official_test" tests on the
            official test part and draws training and validation from the training part. Not given:
            the set's default.
        out_of_distribution: names of data sets that are only tested on, whole.
        out_of_distribution_roots: their folders by name, where they aren't data/<name>.
        images, masks: for "folder", where these are within `root` if not in images/ and masks/: "."
            is `root` itself, "*" any folder, {id} an image's name.
        mask_pattern: for "folder", how a mask is named: {id} is its image's name, * anything, and
            several masks that fit are united; "{id}_mask*" reads a_mask.png and a_mask_1.png of
            a.jpg. Default {id}.
        classes: names of the classes, for own data; two without an ignore index mean a binary mask
            (0 and 255, or 0 and 1), otherwise the mask's values are class indices.
        ignore_index: mask value that doesn't count, for own data.
        channels: 1 or 3, for own data. Default 3.
        metric: headline metric, for own data. Default jaccard.
        memory_limit_mib: decoded examples beyond this many MiB are kept in memory-mapped files.
        cache_dir: where those files are; if given, every data set is kept there, so that the next
            run doesn't decode. Default: the user's cache folder, used only beyond the limit.
        digests: by what a run that goes on, or is evaluated, knows its files again: "sample" (size
            and contents, of a file above 1 MiB 16 pieces of 64 KiB) or "all".
        max_files: files and folders that may lie in the data set's folder.
        max_megapixels: millions of pixels that an image or mask may have. Default: Pillow's limit.
            Decoding takes some 15 bytes a pixel.
    """

    name: str
    options: Annotated[dict[str, Any], pydantic.Field(validate_default=True)] = {}
    root: str | None = None
    when_missing: Literal["error", "synthetic", "download"] = "error"
    image_size: int | list[int] = 256
    fit: Fit = "stretch"
    train: Annotated[int, pydantic.Field(ge=1)] | None = None
    val: Count | None = None
    test: Count | None = None
    unlabelled: Count = 0
    unlabelled_from: str | None = None
    unlabelled_root: str | None = None
    split_seed: int = 0
    splits: Literal["drawn", "official", "official_test"] | None = None
    out_of_distribution: list[str] = []
    out_of_distribution_roots: dict[str, str] = {}
    images: str | None = None
    masks: str | None = None
    mask_pattern: str | None = None
    classes: list[str] | None = None
    ignore_index: Annotated[int, pydantic.Field(ge=0, le=255)] | None = None
    channels: Literal[1, 3] | None = None
    metric: Literal["jaccard", "dice"] | None = None
    memory_limit_mib: Count = 4096
    cache_dir: str | None = None
    digests: How = "sample"
    max_files: Annotated[int, pydantic.Field(ge=1)] = MAX_FILES
    max_megapixels: Annotated[float, pydantic.Field(gt=0)] = float(MEGAPIXELS)

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        DATA_SETS.get(name)
        return name

    @pydantic.field_validator("options")
    @classmethod
    def _taken(cls, options: dict[str, Any], info: pydantic.ValidationInfo) -> dict[str, Any]:
        if "name" in info.data:
            data_set(info.data["name"], options)
        return options

    @pydantic.field_validator("out_of_distribution")
    @classmethod
    def _known_and_once(cls, names: list[str]) -> list[str]:
        for name in names:
            DATA_SETS.get(name)
            if name in OWN_DATA:
                raise ValueError(f"{name!r} can't be tested on by name; it is for training data")
        if len(set(names)) < len(names):
            raise ValueError("a data set is named twice")
        return names

    @pydantic.field_validator("unlabelled_from")
    @classmethod
    def _known_source(cls, name: str | None) -> str | None:
        if name is not None:
            DATA_SETS.get(name)
        return name

    @pydantic.model_validator(mode="after")
    def _source_of_its_own(self) -> "DataSettings":
        source = self.unlabelled_from
        if source is None and self.unlabelled_root is not None:
            raise ValueError("unlabelled_root: is the folder of unlabelled_from; name it too")
        if source is not None and not self.unlabelled:
            raise ValueError("unlabelled_from: say by unlabelled how many images are wanted of it")
        if source is not None and source == self.name and source not in OWN_DATA:
            raise ValueError("unlabelled_from: leave it out to draw from the data set itself")
        if source in self.out_of_distribution:
            raise ValueError(
                f"unlabelled_from: {source!r} is tested on; drop it from out_of_distribution, or "
                "take another set"
            )
        return self

    @pydantic.field_validator("image_size")
    @classmethod
    def _positive(cls, size: int | list[int]) -> int | list[int]:
        numbers = [size] if isinstance(size, int) else size
        if len(numbers) not in (1, 2) or min(numbers) < 1:
            raise ValueError("a number of pixels, or [height, width], each at least 1")
        return size

    @pydantic.field_validator("classes")
    @classmethod
    def _at_least_two(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and not 2 <= len(set(names)) == len(names) <= 255:
            raise ValueError("two to 255 names, no name twice, the background first")
        return names

    @pydantic.model_validator(mode="after")
    def _own_data_only(self) -> "DataSettings":
        if self.name not in OWN_DATA:
            for key in ("classes", "ignore_index", "channels", "metric"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} is for own data (name: {' or '.join(OWN_DATA)}); "
                        f"{self.name!r} states its own"
                    )
        for key in ("images", "masks", "mask_pattern"):
            if self.name != "folder" and getattr(self, key) is not None:
                raise ValueError(f"{key} is for name: folder; {self.name!r} says where its own are")
        folder_layout(self.images, self.masks, self.mask_pattern)
        unused = sorted(set(self.out_of_distribution_roots) - set(self.out_of_distribution))
        if unused:
            raise ValueError(f"out_of_distribution_roots: {unused[0]!r} isn't tested on")
        return self

    @pydantic.model_validator(mode="after")
    def _can_pad(self) -> "DataSettings":
        stretch = "set data.fit to stretch"
        mend = stretch
        if self.name in OWN_DATA:
            mend = (
                f"set data.ignore_index, or {stretch[4:]}; with an ignore index masks hold class "
                "numbers (0 and 1, not 0 and 255)"
            )
        check_fit(self.fit, self.entry, mend)
        for name in self.out_of_distribution:
            check_fit(self.fit, data_set(name), stretch)
        return self

    @property
    def entry(self) -> Entry:
        """The data set; own data have the classes that are said here."""
        entry = data_set(self.name, self.options)
        if self.name not in OWN_DATA:
            return entry
        classes = tuple(self.classes or entry.spec.classes)
        spec = replace(
            entry.spec,
            channels=self.channels or 3,
            classes=classes,
            ignore_index=self.ignore_index,
            metric=self.metric or "jaccard",
            palette=class_palette(len(classes)),
        )
        binary = len(classes) == 2 and self.ignore_index is None
        entry = replace(entry, spec=spec, masks="binary" if binary else "index")
        if self.name != "folder":
            return entry
        layout = folder_layout(self.images, self.masks, self.mask_pattern)
        return replace(entry, layouts=({"all": layout},))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size[0], self.image_size[-1]


def check_fit(fit: Fit, entry: Entry, mend: str) -> None:
    """Check that a data set's images can be padded, if they are to be.

    Args:
        mend: what else to do, for the message.

    Raises:
        ValueError: its masks have no value for what is padded.
    """
    if fit == "pad" and entry.spec.ignore_index is None and not entry.synthetic:
        raise ValueError(
            f"data.fit: pad gives padding the ignore index, and {entry.spec.name!r} has none; "
            f"{mend}"
        )


def resolve_root(name: str, root: str | None) -> Path:
    """The folder of a data set; see `DataSettings.root`.

    Raises:
        UserError: no folder can be there.
    """
    path = reachable(root) if root is not None else Path("data") / name
    base = os.environ.get("MLSEG_DATA")
    if path.is_absolute() or not base:
        return path
    parts = path.parts[1:] if path.parts[:1] == ("data",) else path.parts
    return reachable(reachable(base).joinpath(*parts))


def root_here(root: Path) -> list[Path]:
    """Where a folder below $MLSEG_DATA might lie in the working directory instead.

    Args:
        root: what :func:`resolve_root` has given.
    """
    base = os.environ.get("MLSEG_DATA")
    if not base or not root.is_relative_to(base):
        return []
    below = root.relative_to(base)
    found = [path.absolute() for path in (below, Path("data") / below)]
    return [path for path in found if path != root.absolute()]
