"""From settings to data: find or replace, split, decode."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mlseg.errors import UserError
from mlseg.files import reachable
from mlseg.segmentation.data import contents, splits
from mlseg.segmentation.data.decode import decode, limit_pixels
from mlseg.segmentation.data.entry import Entry, Example, Part, data_set
from mlseg.segmentation.data.fetch import fetch, incomplete
from mlseg.segmentation.data.layout import MAX_FILES, find_examples
from mlseg.segmentation.data.placement import Fit
from mlseg.segmentation.data.presence import classes_missing, held_values, require_two_classes
from mlseg.segmentation.data.samples import DatasetSpec, Samples, blank, wants_shapes_alone
from mlseg.segmentation.data.settings import (
    OWN_DATA,
    DataSettings,
    check_fit,
    resolve_root,
    root_here,
)
from mlseg.segmentation.data.standins import COUNTS, POOL, draw_synthetic, shifted, synthetic_ids

Provenance = Literal["real", "synthetic"]


@dataclass(frozen=True)
class SegmentationData:
    """What a run trains and tests on.

    Attributes:
        train, val, test: disjoint; val and test may be empty.
        unlabelled: images beside them whose masks haven't been read: background everywhere, or the
            ignore index in padding; None where none were asked for.
        out_of_distribution: test-only sets by name.
        spec: of train, val and test.
        provenance: "real", or "synthetic" for stand-ins.
        manifest: what ``splits.json`` holds; see `mlseg.segmentation.data.splits.manifest`.
        notice: a line that a command must show at the start and at the end, or None.
        files: of every example; empty for drawn ones.
        digests: how much of a file its digest is of; see ``DataSettings.digests``.
    """

    train: Samples
    val: Samples
    test: Samples
    out_of_distribution: dict[str, Samples]
    spec: DatasetSpec
    provenance: Provenance
    manifest: dict[str, Any]
    notice: str | None = None
    files: contents.Files = field(default_factory=dict, repr=False)
    digests: contents.How = "sample"
    unlabelled: Samples | None = None

    @property
    def split_hash(self) -> str:
        """Over which example trains, validates and tests; images without masks don't matter."""
        return str(self.manifest.get("labelled_hash", self.manifest["hash"]))

    def contents(self) -> dict[str, Any]:
        """Digests of all files, for ``splits.json``."""
        return contents.record(self.files, self.digests)

    def changed(self, stored: Mapping[str, Any]) -> list[Path]:
        """The files that are no longer what they were when ``stored`` was made."""
        return contents.changed(self.files, stored)


def load_data(settings: DataSettings, unlabelled: bool = True) -> SegmentationData:
    """Load, or make, the data that `settings` name.

    Args:
        unlabelled: whether images without masks are decoded too, if `settings` want any; scoring
            has no use for them. Their ids belong to the manifest in any case.

    Raises:
        UserError: data are missing, bad, or fewer than asked for; one line that names the file.
        RunError: a download or the cache failed.
    """
    entry = settings.entry
    root = resolve_root(entry.spec.name, settings.root)
    limit_pixels(settings.max_megapixels)
    if entry.synthetic or not _available(entry, root, settings):
        return _synthetic(entry, root, settings, unlabelled)

    own_unlabelled = settings.unlabelled > 0 and settings.unlabelled_from is None
    everything = find_examples(entry, root, settings.max_files, unmasked=own_unlabelled)
    parts = {name: [e for e in found if e.masks] for name, found in everything.items()}
    split, how = _split(entry, parts, settings, root)
    chosen = {(e.id): e for examples in _of(parts, how).values() for e in examples}
    others, left_out = _others(entry, split, settings)
    tested = [e.image for _, examples in others.values() for e in examples]
    used = {path.resolve() for path in [*tested, *(chosen[id].image for id in split.ids)]}
    source, without = _unlabelled(entry, everything, how, split, settings, root, used)
    wanted: dict[str, tuple[Entry, list[Example]]] = {
        name: (entry, [chosen[id] for id in ids]) for name, ids in split.as_dict().items()
    }
    wanted |= {f"other {name}": found for name, found in others.items()}
    if without and unlabelled:
        wanted["unlabelled"] = source, without
    number = sum(len(examples) for _, examples in wanted.values())
    height, width = settings.size
    mib = number * (entry.spec.channels + 1) * height * width / 2**20
    cache = _cache(settings, mib)

    def decoded(key: str) -> Samples:
        of, examples = wanted[key]
        if wants_shapes_alone():
            return blank([e.id for e in examples], of.spec, settings.size, settings.fit)
        return decode(examples, of, of.spec, settings.size, cache, settings.fit)

    made = {name: decoded(name) for name in splits.SPLITS}
    notices = [] if wants_shapes_alone() else classes_missing(made, entry.spec, root)
    if left_out:
        notices.append(f"Not tested on, because missing: {'; '.join(left_out)}.")
    return SegmentationData(
        **made,
        out_of_distribution={name: decoded(f"other {name}") for name in others},
        spec=entry.spec,
        provenance="real",
        manifest=splits.manifest(
            split,
            dataset=settings.name,
            how=how,
            seed=settings.split_seed,
            provenance="real",
            out_of_distribution={n: [e.id for e in found] for n, (_, found) in others.items()},
            unlabelled=[e.id for e in without],
        ),
        notice=" ".join(notices) or None,
        files={
            "data": {id: _paths(chosen[id]) for ids in split.as_dict().values() for id in ids},
            **{name: {e.id: _paths(e) for e in found} for name, (_, found) in others.items()},
            **({"unlabelled images": {e.id: _paths(e) for e in without}} if without else {}),
        },
        digests=settings.digests,
        unlabelled=decoded("unlabelled") if "unlabelled" in wanted else None,
    )


def _paths(example: Example) -> tuple[Path, ...]:
    return (example.image, *example.masks)


def load_examples(
    name: str,
    root: str | None,
    size: tuple[int, int],
    spec: DatasetSpec,
    fit: Fit = "stretch",
    max_files: int = MAX_FILES,
    layout: Part | None = None,
) -> Samples:
    """All examples of a data set, for scoring a trained model on it.

    Args:
        name: registered, or a dotted path. Of a set with official parts the test part, or else the
            training part; the validation part where the test part's labels are not public.
        root: as `DataSettings.root`.
        size: (H, W) in pixels.
        spec: of the data the model was trained on; classes and channels must fit.
        fit: as `DataSettings.fit`.
        max_files: as `DataSettings.max_files`.
        layout: of an own folder, see `folder_layout`.

    Raises:
        UserError: data are missing, bad, of other classes, or can't be padded.
    """
    try:
        entry = _fitting(_as_trained(data_set(name), spec), spec)
        if layout is not None:
            entry = replace(entry, layouts=({"all": layout},))
        check_fit(fit, entry, "a model of padded images can only be scored on sets that have one")
    except ValueError as error:
        raise UserError(str(error)) from None
    folder = resolve_root(entry.spec.name, root)
    if entry.synthetic:
        ids = synthetic_ids(COUNTS["test"])
        return draw_synthetic(entry.spec, ids, size, fit, 0)
    if _absent(folder):
        raise _missing(entry, folder)
    examples = _whole(entry, find_examples(entry, folder, max_files))
    samples = decode(examples, entry, entry.spec, size, fit=fit)
    if fit == "stretch":  # padding is ignored in images of healthy people too
        require_two_classes(held_values(samples, spec), spec, fit)
    return samples


def _absent(root: Path) -> bool:
    try:
        return not root.exists() or (root.is_dir() and not any(root.iterdir()))
    except OSError as error:
        raise UserError(f"{root}: can't be looked into ({error.strerror})") from None


def _available(entry: Entry, root: Path, settings: DataSettings) -> bool:
    """Whether the data are there, after a download where that is wanted."""
    if settings.when_missing == "download" and (_absent(root) or incomplete(root)):
        fetch(entry, root, parts=_needed(entry, settings))
    elif incomplete(root):
        raise UserError(
            f"{root}: a download was interrupted; finish it with: "
            f"python -m mlseg.data {entry.spec.name} --root {root}"
        )
    if not _absent(root):
        return True
    if settings.when_missing == "error":
        raise _missing(entry, root)
    return False


def _needed(entry: Entry, settings: DataSettings) -> tuple[str, ...] | None:
    if settings.splits == "official":
        return tuple({archive.part: None for archive in entry.archives})
    return None


def _missing(entry: Entry, root: Path) -> UserError:
    for here in root_here(root):
        if not _absent(here):
            return UserError(
                f"{root}: no data of {entry.spec.name} here, where $MLSEG_DATA has a relative root "
                f"start; what lies in the working directory is named by its whole path: {here}"
            )
    expected = ", ".join(entry.expected) or "a CSV file with the columns image and mask"
    return UserError(
        f"{root}: no data of {entry.spec.name} here; get them from {entry.source}, laid out as "
        f"{expected}, or set data.root, or data.when_missing to synthetic or download"
    )


def _of(parts: dict[str, list[Example]], how: str) -> dict[str, list[Example]]:
    """The parts that a split is made from."""
    if how.startswith("official"):
        return parts
    return {"all": parts["all"] if "all" in parts else parts.get("train", [])}


def _split(
    entry: Entry, parts: dict[str, list[Example]], settings: DataSettings, root: Path
) -> tuple[splits.Split, str]:
    """The split and how it was made: `DataSettings.splits`, or the set's default of it."""
    name = f"{entry.spec.name} in {root}"
    by_default = entry.official or (entry.spec.name == "pairs" and "all" not in parts)
    how = settings.splits or ("official" if by_default else "drawn")
    counts = settings.train, settings.val, settings.test, settings.split_seed
    if how.startswith("official"):
        if "all" in parts:
            raise UserError(f"{name}: comes without an official split; set data.splits to drawn")
        ids = {part: [e.id for e in examples] for part, examples in parts.items()}
        if entry.withheld_test:
            if settings.test:
                raise UserError(
                    f"data.test: the test labels of {entry.spec.name} are not public; set it to 0 "
                    "or leave it out, and test on the validation split or the benchmark's server"
                )
            ids = {part: found for part, found in ids.items() if part != "test"} | {"test": []}
        if how == "official_test":
            ids.pop("val", None)  # drawn from the training part, then
        return splits.official(ids, *counts, name), how
    (pool,) = _of(parts, how).values()
    if not pool:
        raise UserError(f"{name}: the training part is missing; expected {entry.expected[0]}")
    return splits.draw([e.id for e in pool], *counts, name), how


def _others(
    entry: Entry, split: splits.Split, settings: DataSettings
) -> tuple[dict[str, tuple[Entry, list[Example]]], list[str]]:
    """Examples of the test-only sets, and those that are missing and left out."""
    found: dict[str, tuple[Entry, list[Example]]] = {}
    left_out = []
    for name in settings.out_of_distribution:
        if name == settings.name:
            raise UserError(f"data.out_of_distribution: {name!r} is what is trained on")
        other = _fitting(data_set(name), entry.spec)
        root = resolve_root(other.spec.name, settings.out_of_distribution_roots.get(name))
        if other.synthetic:
            raise UserError(
                f"data.out_of_distribution: {name!r} is no test of a model of real data"
            )
        if not _available(other, root, settings):
            # A drawn stand-in would say nothing about a model that has seen real images.
            left_out.append(f"{name} ({root}; get it from {other.source})")
            continue
        examples = _whole(other, find_examples(other, root, settings.max_files))
        shared = {e.id for e in examples} & set(split.train + split.val + split.test)
        if shared and other.ids == entry.ids:
            raise UserError(
                f"{root}: {min(shared)} of {name} is in {settings.name} too ({len(shared)} such "
                f"ids); it can't be an out-of-distribution test"
            )
        found[name] = other, examples
    return found, left_out


def _unlabelled(
    entry: Entry,
    parts: Mapping[str, list[Example]],
    how: str,
    split: splits.Split,
    settings: DataSettings,
    root: Path,
    used: Collection[Path],
) -> tuple[Entry, list[Example]]:
    """Images that no split uses, without their masks, and the set that they are of.

    Args:
        parts: examples of ``entry``, also those without a mask.
        used: files of images that train, validate or test, under whatever id.
    """
    if not settings.unlabelled:
        return entry, []
    if settings.unlabelled_from is not None:
        other = data_set(settings.unlabelled_from)
        source = replace(other, spec=replace(entry.spec, name=other.spec.name))
        root = resolve_root(source.spec.name, settings.unlabelled_root)
        if source.synthetic or not _available(source, root, settings):
            # Drawn stand-ins would teach a model of real images what isn't there.
            raise UserError(
                f"data.unlabelled_from: no images of {other.spec.name} in {root}; get them from "
                f"{other.source}, or set data.unlabelled_root"
            )
        found = find_examples(source, root, settings.max_files, unmasked=True)
        parts, how = found, "drawn" if "all" in found else "official"
    else:
        source = entry
    left_alone = ("test",) if how.startswith("official") else ()
    pool = {
        e.id: replace(e, masks=())
        for part, examples in (parts if left_alone else _of(dict(parts), how)).items()
        if part not in left_alone
        for e in examples
        if e.image.resolve() not in used
    }
    ids = splits.draw_unlabelled(
        list(pool), split, settings.unlabelled, settings.split_seed, f"{source.spec.name} in {root}"
    )
    return source, [pool[id] for id in ids]


def _whole(entry: Entry, parts: dict[str, list[Example]]) -> list[Example]:
    order = ("val", "train") if entry.withheld_test else ("all", "test", "train", "val")
    return next(parts[part] for part in order if part in parts)


def _as_trained(entry: Entry, spec: DatasetSpec) -> Entry:
    """Own data have the classes of the data that the model was trained on."""
    if entry.spec.name not in OWN_DATA:
        return entry
    binary = spec.num_classes == 2 and spec.ignore_index is None
    own = replace(spec, name=entry.spec.name)
    return replace(entry, spec=own, masks="binary" if binary else "index")


def _fitting(entry: Entry, spec: DatasetSpec) -> Entry:
    """The entry with the channels of the data trained on; its classes must be as many."""
    if entry.spec.num_classes != spec.num_classes:
        raise UserError(
            f"{entry.spec.name} has {entry.spec.num_classes} classes and can't test a model of "
            f"{spec.num_classes} ({spec.name})"
        )
    return replace(entry, spec=replace(entry.spec, channels=spec.channels))


def _cache(settings: DataSettings, mib: float) -> Path | None:
    if settings.cache_dir is not None:
        return reachable(settings.cache_dir)
    if mib <= settings.memory_limit_mib:
        return None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlseg"


def _synthetic(
    entry: Entry, root: Path, settings: DataSettings, unlabelled: bool
) -> SegmentationData:
    """A stand-in, or a synthetic set asked for by its name."""
    counts = {key: getattr(settings, key) for key in COUNTS}
    counts = {k: COUNTS[k] if v is None else v for k, v in counts.items()}
    name = entry.spec.name
    split = splits.draw(
        synthetic_ids(POOL), **counts, seed=settings.split_seed, name=f"synthetic {name}"
    )
    train, val, test = (
        draw_synthetic(entry.spec, ids, settings.size, settings.fit, 0)
        for ids in split.as_dict().values()
    )
    pool = synthetic_ids(POOL)
    ids_without = splits.draw_unlabelled(
        pool, split, settings.unlabelled, settings.split_seed, f"synthetic {name}"
    )
    without = None
    if ids_without and unlabelled:
        drawn = draw_synthetic(entry.spec, ids_without, settings.size, settings.fit, 0)
        without = replace(drawn, masks=torch.zeros_like(drawn.masks[:1]).expand_as(drawn.masks))
    others = {}
    for number, other in enumerate(settings.out_of_distribution, 1):
        spec = _fitting(data_set(other), entry.spec).spec
        ids = synthetic_ids(COUNTS["test"])
        drawn = draw_synthetic(spec, ids, settings.size, settings.fit, number)
        others[other] = shifted(drawn)
    if entry.synthetic:
        notice = f"SYNTHETIC DATA: {name} is drawn by mlseg"
    else:
        notice = (
            f"SYNTHETIC DATA: no data of {name} in {root}, so images drawn by mlseg stand in for "
            f"them (real ones: {entry.source})"
        )
    return SegmentationData(
        train,
        val,
        test,
        others,
        entry.spec,
        "synthetic",
        splits.manifest(
            split,
            dataset=settings.name,
            how="drawn",
            seed=settings.split_seed,
            provenance="synthetic",
            out_of_distribution={name: samples.ids for name, samples in others.items()},
            unlabelled=ids_without,
        ),
        notice + ". Its figures can't be compared with published ones.",
        unlabelled=without,
    )
